"""Which collectives a step ran, of what size, and how long each took.

They are classified by the call on the thread that issued them: gloo runs a reduce-scatter as an all-reduce, and names
it so. Size and time are those of the backend's own event; calls and backend events come in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from lightning_efficient.dissect.events import Event, is_collective_backend
from lightning_efficient.dissect.intervals import Interval, overlap
from lightning_efficient.dissect.result import Collective

_OPS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
    "alltoall": "all_to_all",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "recv": "recv",
    "barrier": "barrier",
}


def collectives_of(events: Iterable[Event], steps: list[Interval], n_steps: int) -> tuple[Collective, ...]:
    """Return the collectives of the profiled steps, largest in total time first.

    Args:
        events: all of a record.
        steps: when the steps ran.
        n_steps: how many there were.
    """
    events = sorted(events, key=lambda each: each.start)
    calls = [each for each in events if each.name.startswith("c10d::") and _op(each.name)]
    runs = [each for each in events if is_collective_backend(each.name)]
    paired = list(zip(calls, runs, strict=True)) if len(calls) == len(runs) else [(call, call) for call in calls]
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for call, run in paired:
        if overlap(call.start, call.end, steps):
            seconds[_op(call.name), run.n_bytes or call.n_bytes].append(1e-9 * (run.end - run.start))
    found = (
        Collective(op, n_bytes, len(times) / n_steps, sum(times) / len(times))
        for (op, n_bytes), times in seconds.items()
    )
    return tuple(sorted(found, key=lambda each: -each.calls * each.seconds))


def _op(name: str) -> str:
    called = name.removeprefix("c10d::").lstrip("_")
    return next((op for prefix, op in _OPS.items() if called.startswith(prefix)), "")
