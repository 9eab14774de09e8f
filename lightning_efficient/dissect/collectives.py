r"""What collectives cost on a link: times over sizes, bandwidths, and the line :math:`t = \alpha + \beta N`.

N is the size of the whole message in bytes: what each rank hands in, and for an all-gather, whose result is larger than
that, the result. The factors of ``busbw`` are those of nccl-tests: ``busbw`` is the rate at which a link has to carry
bytes, comparable to the link's own whatever the number of ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_efficient._links import AlphaBeta as AlphaBeta
from lightning_efficient._links import collective_of, device_of, fit_line, seconds_of, wait_for
from lightning_efficient.dissect.result import SCHEMA, Collective

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
#: Bytes: 1 KiB to 16 MiB, by factors of 4.
SIZES = tuple(4**power for power in range(5, 13))

# What torch says of a collective that a backend lacks; the last one where a group in Python has no such method. An
# all-reduce has run on this device before, hence it is not about the device.
_UNSUPPORTED = ("not support", "not implement", "No backend type associated")
_WARM_UP = 5  # backends connect when they are first used


@dataclass(frozen=True, slots=True)
class CollectivePoint:
    """The time of a collective of one size.

    Attributes:
        op: one of ``OPS``.
        n_bytes: of the whole message.
        seconds: the median of the repeats on the slowest rank.
        world_size: number of ranks n.
    """

    op: str
    n_bytes: int
    seconds: float
    world_size: int

    @property
    def algbw(self) -> float:
        """Bytes of the message per second."""
        return self.n_bytes / self.seconds

    @property
    def busbw(self) -> float:
        r"""Bytes per second that a link carries: ``algbw`` times :math:`2(n-1)/n` for an all-reduce, :math:`(n-1)/n`
        for an all-gather, a reduce-scatter and an all-to-all, 1 for a broadcast.
        """  # noqa: D205
        return self.algbw * bus_factor(self.op, self.world_size)


@dataclass(frozen=True, slots=True)
class CommReport:
    """A sweep over collectives and sizes.

    Attributes:
        backend: of the process group.
        world_size: number of ranks.
        points: what was measured.
        fits: the line of each collective that has two sizes or more.
        unsupported: why a collective is missing, by its name.
        schema: number of the layout.
    """

    backend: str
    world_size: int
    points: tuple[CollectivePoint, ...]
    fits: Mapping[str, AlphaBeta]
    unsupported: Mapping[str, str]
    schema: int = SCHEMA


def bus_factor(op: str, world_size: int) -> float:
    """Return ``busbw / algbw`` of a collective over ``world_size`` ranks."""
    share = (world_size - 1) / world_size
    return {"all_reduce": 2 * share, "broadcast": 1.0, "reduce": 1.0}.get(op, share)


def sweep(
    group: dist.ProcessGroup | None = None,
    *,
    ops: Sequence[str] = OPS,
    sizes: Sequence[int] = SIZES,
    repeats: int = 5,
    budget_s: float = 30.0,
    timeout_s: float = 60.0,
    device: torch.device | str | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> CommReport:
    """Time collectives over a process group. Every rank of the group calls it, and gets the same answer.

    Args:
        group: the process group; the default one if None.
        ops: of ``OPS``.
        sizes: bytes of the messages, rounded up to a whole element for every rank.
        repeats: timed runs per size, after an untimed one.
        budget_s: seconds for the whole sweep, roughly, shared out evenly; larger sizes are left out where the time of
            the last one says that they would not fit. Two sizes are always measured.
        timeout_s: seconds one collective may take before the link counts as dead.
        device: where the messages live; the current CUDA device for NCCL, else the CPU, if None.
        progress: called with the collective and its size before each measurement.

    Returns:
        Times, lines, and what the backend does not support.

    Raises:
        ValueError: the group has one rank only, or an argument is wrong.
        RuntimeError: no process group is initialised, or a rank is gone.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "cannot time collectives: no process group is initialised. Call torch.distributed.init_process_group first."
        )
    world_size, sizes, ops = dist.get_world_size(group), sorted(set(sizes)), list(dict.fromkeys(ops))
    if world_size < 2:
        raise ValueError("cannot time collectives (world size 1): one process has no link. Start 2 ranks or more.")
    if unknown := [op for op in ops if op not in OPS]:
        raise ValueError(f"There is no collective {unknown[0]!r}: known are {', '.join(OPS)}. Give one of these.")
    if not ops or not sizes or sizes[0] < 1 or repeats < 1 or timeout_s <= 0:
        raise ValueError(
            f"bad sweep (ops={ops}, sizes={sizes}, repeats={repeats}, timeout_s={timeout_s:g}): a collective, a size "
            "of 1 byte or more, one repeat and a time above 0 are needed. Leave them out for the defaults."
        )
    on = device_of(group) if device is None else torch.device(device)
    clock = _Clock(group, on, repeats, timeout_s)
    points: list[CollectivePoint] = []
    unsupported: dict[str, str] = {}
    for op in ops:
        try:
            points += clock.measure(op, sizes, budget_s=budget_s / len(ops), progress=progress)
        except NotImplementedError as error:
            unsupported[op] = str(error)
    by_op = {op: [each for each in points if each.op == op] for op in ops}
    return CommReport(
        backend=dist.get_backend(group),
        world_size=world_size,
        points=tuple(points),
        # Sizes are rounded to whole messages: two may have become one.
        fits={op: fit(own) for op, own in by_op.items() if len({each.n_bytes for each in own}) > 1},
        unsupported=unsupported,
    )


def fit(points: Sequence[CollectivePoint]) -> AlphaBeta:
    r"""Fit :math:`t = \alpha + \beta N`, both at 0 or above, to the least absolute relative errors.

    Not to their squares: a link that lets short bursts pass unslowed makes small messages look too fast, and squares
    bend the whole line towards them.

    Args:
        points: of one collective, two sizes or more.

    Raises:
        ValueError: the points do not determine a line.
    """
    return AlphaBeta(*fit_line([(each.n_bytes, each.seconds) for each in points], robust=True))


def predict_step(fits: Mapping[str, AlphaBeta], collectives: Sequence[Collective], *, world_size: int) -> float:
    r"""Return the seconds that a step's collectives take one after the other, :math:`\sum_i \alpha + \beta N_i`.

    Args:
        fits: a line for each kind of collective.
        collectives: of a step, as a dissection found them.
        world_size: number of ranks.

    Raises:
        ValueError: a kind of collective has no line.
    """
    if missing := sorted({each.op for each in collectives} - fits.keys()):
        raise ValueError(
            f"There is no line for {', '.join(missing)}: its time is unknown. Let the sweep measure it too."
        )
    return sum(each.calls * fits[each.op].predict(message_bytes(each, world_size)) for each in collectives)


def message_bytes(collective: Collective, world_size: int) -> int:
    """Return the size of the whole message; an all-gather's is that of its result."""
    return collective.n_bytes * (world_size if collective.op == "all_gather" else 1)


class _Clock:
    """Times one collective after the other; what it decides, all ranks decide alike."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, repeats: int, timeout_s: float) -> None:
        self._group, self._device, self._repeats, self._timeout_s = group, device, repeats, timeout_s
        self._world_size = dist.get_world_size(group)
        for _ in range(_WARM_UP):
            self._slowest(0.0)

    def measure(
        self, op: str, sizes: Sequence[int], *, budget_s: float, progress: Callable[[str, int], None] | None
    ) -> list[CollectivePoint]:
        begin, points = time.perf_counter(), list[CollectivePoint]()
        elapsed = 0.0
        for position, size in enumerate(sizes):
            # The last size's time, scaled, bounds the next one's from above: latency does not grow.
            if (
                position >= 2
                and elapsed + points[-1].seconds * size / points[-1].n_bytes * (self._repeats + 1) > budget_s
            ):
                break
            if progress is not None:
                progress(op, size)
            n_bytes, run = self._message(op, size)
            median = statistics.median(seconds_of(run, self._repeats, self._device))
            seconds, elapsed = self._slowest(median, time.perf_counter() - begin)
            points.append(CollectivePoint(op, n_bytes, seconds, self._world_size))
        return points

    def _message(self, op: str, size: int) -> tuple[int, Callable[[], None]]:
        """The size in whole elements for every rank, and what runs the collective once."""
        n_bytes, start = collective_of(op, size, group=self._group, device=self._device)
        what = f"{op} of {n_bytes} bytes over {self._world_size} ranks"

        def run() -> None:
            try:
                work = start()
            except RuntimeError as error:
                if any(words in str(error) for words in _UNSUPPORTED):
                    backend = dist.get_backend(self._group)
                    raise NotImplementedError(f"{backend} does not support it: {error}") from error
                raise
            wait_for(work, what=what, timeout_s=self._timeout_s, device=self._device)

        return n_bytes, run

    def _slowest(self, *values: float) -> list[float]:
        agreed: Tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        work = dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        wait_for(work, what="the ranks' agreement", timeout_s=self._timeout_s, device=self._device)
        slowest: list[float] = agreed.tolist()
        return slowest
