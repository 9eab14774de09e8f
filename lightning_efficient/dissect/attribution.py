"""Cuts profiled steps into rows that add up to the step: modules, and what lies beside them.

Every instant of the training thread belongs to the innermost event that covers it, and every event to one row:

- an operator to the module whose forward (or recomputation) range encloses it;
- a node of backward to the module whose operator made it. Both carry autograd's sequence number: an operator records
  the number that the next node will get, so the last operator that recorded a number is the one that used it up. What
  the engine does between two nodes, handing on the results of the first and freeing its inputs, is the first one's;
- everything else to the nearest range around it: the optimizer, the data loader, the engine of backward, ...

What a range or the engine spends by itself while a collective is in flight is *exposed communication*: nothing was
computed meanwhile. Optimizers run forward and backward inside of ``step`` when they are given a closure, hence only the
time of their own counts as theirs.

The definitions are those of "Dissecting the Runtime Performance of the Training, Fine-tuning, and Inference of Large
Language Models" (arXiv 2311.03687, phases, modules and operators); the attribution by sequence number is ours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

from lightning_efficient.dissect.collective_events import collectives_of
from lightning_efficient.dissect.events import FORWARD, PHASE, RECOMPUTE, STEP, Event, is_collective_backend
from lightning_efficient.dissect.intervals import Interval, overlap, union
from lightning_efficient.dissect.operators import kind_of
from lightning_efficient.dissect.result import Breakdown, Collective, Operator, Phase, Row

TRAINING_STEP, ENGINE, GRAD_ACCUMULATE = "<training_step>", "<engine>", "<grad-accumulate>"
ZERO_GRAD, BUCKETS = "<zero_grad>", "<gradient buckets>"
COMMUNICATION, UNATTRIBUTED, LOOP, IDLE = "<communication>", "<unattributed>", "<loop>", "<device idle>"
OPERATORS_KEPT = 40

_NODE = "autograd::engine::evaluate_function: "
_SECONDS = 1e-9


class Label(NamedTuple):
    """Where an event's time goes."""

    row: str
    phase: Phase


@dataclass(frozen=True, slots=True)
class Attribution:
    """What the profiled steps came down to, as means over them.

    Attributes:
        steps: how many there were.
        host: by the training thread's clock.
        device: by the GPU's; None where nothing ran on one.
        collectives: by kind and size.
        operators: the most expensive first; of the GPU where there is one.
    """

    steps: int
    host: Breakdown
    device: Breakdown | None
    collectives: tuple[Collective, ...]
    operators: tuple[Operator, ...]


def attribute(events: Iterable[Event], modules: Mapping[str, tuple[str, str]]) -> Attribution:
    """Cut profiled steps into rows.

    Args:
        events: of one or several records; the steps are their ``le::step`` ranges.
        modules: role and class of each watched module by path, in the order of the model.

    Returns:
        Means over the steps.

    Raises:
        ValueError: there is no step in the events.
    """
    events = list(events)
    steps = [each for each in events if each.name == STEP]
    if not steps:
        raise ValueError(
            "The record holds no step: nothing can be cut into rows. Run one step at least between start() and stop()."
        )
    host = [each for each in events if not each.on_device]
    walk = _Walk(main_thread=steps[0].thread, steps=union((s.start, s.end) for s in steps))
    walk.run(sorted((e for e in host if not _is_in_flight(e)), key=lambda e: (e.start, -e.end)))
    in_flight = union((e.start, e.end) for e in host if _is_in_flight(e))
    walk.expose(in_flight)
    step_ns = sum(s.end - s.start for s in steps)
    rows = _rows(walk.times, walk.calls, modules, len(steps))
    kernels = [each for each in events if each.on_device and each.correlation in walk.label_of]
    device, device_operators = _device(kernels, walk, modules, len(steps)) if kernels else (None, None)
    return Attribution(
        steps=len(steps),
        host=Breakdown("host", _SECONDS * step_ns / len(steps), rows),
        device=device,
        collectives=collectives_of(events, walk.steps, len(steps)),
        operators=_operators(device_operators or walk.operators, len(steps)),
    )


@dataclass(slots=True)
class _Open:
    """An event that has begun and not ended: of it, what its children leave over is its own."""

    event: Event
    end: int
    label: Label | None
    module: str
    waits: bool
    cursor: int
    children: int = 0
    node_before: Label | None = None


@dataclass(slots=True)
class _Walk:
    """One pass over the host's events in the order of their start, with a stack for each thread."""

    main_thread: int
    steps: list[Interval]
    times: dict[Label, int] = field(default_factory=lambda: defaultdict(int))
    calls: Counter[str] = field(default_factory=Counter)
    operators: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    label_of: dict[int, Label] = field(default_factory=dict)
    _module_of: dict[tuple[int, int], str] = field(default_factory=dict)
    _stacks: dict[int, list[_Open]] = field(default_factory=lambda: defaultdict(list))
    _gaps: list[tuple[int, int, Label, int]] = field(default_factory=list)
    _elsewhere: list[Interval] = field(default_factory=list)

    def run(self, events: Sequence[Event]) -> None:
        for event in events:
            self._push(event)
        for stack in self._stacks.values():
            while stack:
                self._pop(stack)

    def expose(self, in_flight: list[Interval]) -> None:
        """Move what was waited for out of the rows that waited: collectives, and backward on other threads."""
        elsewhere = union(self._elsewhere)
        for start, end, label, thread in self._gaps:
            # Backward that another thread runs has rows of its own.
            hidden = overlap(start, end, elsewhere) if thread == self.main_thread else 0
            exposed = min(overlap(start, end, in_flight), end - start - hidden)
            self.times[label] -= hidden + exposed
            if exposed:
                self.times[Label(COMMUNICATION, "communication")] += exposed

    def _push(self, event: Event) -> None:
        stack = self._stacks[event.thread]
        while stack and stack[-1].end <= event.start:
            self._pop(stack)
        parent = stack[-1] if stack else None
        # Also outside of the steps: the graph of a step may be older than it.
        module = self._module(event, parent.module if parent else TRAINING_STEP)
        label = self._label(event, parent.label if parent else None)
        end = min(event.end, parent.end) if parent else event.end
        if (
            parent is not None
            and parent.event.name.startswith("Optimizer.step")
            and label
            and label.phase == "optimizer"
        ):
            parent.label = label  # torch's range knows the class, the one in it which of several it is
        if parent is not None:
            is_node = event.name.startswith(_NODE)
            if is_node and parent.node_before is not None:
                # Between two nodes the engine hands on the results of the first, and frees what it was given.
                self.times[parent.node_before] += event.start - parent.cursor
                parent.children += event.start - parent.cursor
            else:
                self._gap(parent, event.start)
            parent.node_before = label if is_node else None
            parent.cursor = end
            parent.children += end - event.start
        elif label is not None and event.thread != self.main_thread and event.name.startswith(_NODE):
            self._elsewhere.append((event.start, end))
        stack.append(_Open(event, end, label, module, _may_wait(event), event.start))

    def _pop(self, stack: list[_Open]) -> None:
        done = stack.pop()
        if done.label is None:
            return
        self._gap(done, done.end)
        own = done.end - done.event.start - done.children
        self.times[done.label] += own
        if not done.event.name.startswith("le::"):
            totals = self.operators[done.event.name]
            totals[0] += own
            totals[1] += 1
        if done.event.correlation:
            self.label_of[done.event.correlation] = done.label

    def _gap(self, open_: _Open, until: int) -> None:
        if open_.waits and open_.label is not None and until > open_.cursor:
            self._gaps.append((open_.cursor, until, open_.label, open_.event.thread))

    def _module(self, event: Event, around: str) -> str:
        """The module whose nodes an event makes, or else the training step."""
        for prefix in (FORWARD, RECOMPUTE):
            if event.name.startswith(prefix):
                return event.name[len(prefix) :]
        if event.name.startswith(_NODE):
            return self._maker(event, TRAINING_STEP)  # a node may make others: for gradients of gradients
        if event.sequence >= 0 and not event.forward_thread:
            self._module_of[event.sequence, event.thread] = around
        return around

    def _maker(self, node: Event, otherwise: str) -> str:
        return self._module_of.get((node.sequence, node.forward_thread), otherwise)

    def _label(self, event: Event, around: Label | None) -> Label | None:
        """The row of an event; None outside of the steps."""
        name = event.name
        if name == STEP:
            return Label(LOOP, "other")
        inside = around is not None or (event.thread != self.main_thread and self._in_a_step(event))
        if name.startswith(FORWARD):
            self.calls[name[len(FORWARD) :]] += inside
            return Label(name[len(FORWARD) :], "forward") if inside else None
        if name.startswith(RECOMPUTE):
            return Label(name[len(RECOMPUTE) :], "recompute") if inside else None
        if name.startswith(_NODE):
            return self._node(event) if inside else None
        if around is None:
            return None  # other threads count only for backward
        if name.startswith(PHASE):
            phase, _, row = name[len(PHASE) :].partition(":")
            return Label(row, cast(Phase, phase))
        if name.startswith("torch.distributed.ddp.reducer::"):
            return Label(BUCKETS, "backward")  # copies to and from what is sent
        if name.startswith("Optimizer.zero_grad"):
            return Label(ZERO_GRAD, "optimizer")  # of whichever optimizer: the event does not say
        if name.startswith("Optimizer."):
            return Label(f"<optimizer {name.partition('#')[2].partition('.')[0]}>", "optimizer")
        if name.startswith("enumerate(DataLoader)"):
            return Label("<data>", "data")
        return around

    def _node(self, event: Event) -> Label:
        if event.name.endswith("AccumulateGrad"):
            return Label(GRAD_ACCUMULATE, "backward")
        return Label(self._maker(event, UNATTRIBUTED), "backward")

    def _in_a_step(self, event: Event) -> bool:
        return overlap(event.start, event.end, self.steps) > 0


def _is_in_flight(event: Event) -> bool:
    return event.is_async or is_collective_backend(event.name)


def _may_wait(event: Event) -> bool:
    """Whether the event's own time may be a wait for a collective: it computes nothing itself."""
    return (
        event.is_range
        or event.name.startswith(("le::", "c10d::"))
        or event.name == f"{_NODE}torch::autograd::AccumulateGrad"
    )


def _rows(
    times: Mapping[Label, int], calls: Mapping[str, int], modules: Mapping[str, tuple[str, str]], steps: int
) -> tuple[Row, ...]:
    by_row: dict[str, dict[str, float]] = {path: {} for path in modules}
    for (row, phase), nanoseconds in times.items():
        by_row.setdefault(row, {})[f"{phase}_s"] = _SECONDS * nanoseconds / steps
    rows = []
    for name, phases in by_row.items():
        role, cls = modules.get(name, ("loss" if name == TRAINING_STEP else "other", ""))
        if phases or calls.get(name):
            empty = Row(name=name, role=role, cls=cls, calls=calls.get(name, 0) / steps)
            rows.append(replace(empty, **phases))  # type: ignore[arg-type]
    return tuple(rows)


def _operators(totals: Mapping[str, Sequence[int]], steps: int) -> tuple[Operator, ...]:
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])[:OPERATORS_KEPT]
    return tuple(
        Operator(name.removeprefix(_NODE), kind_of(name), count / steps, _SECONDS * own / steps)
        for name, (own, count) in ordered
    )


def _device(
    kernels: list[Event], walk: _Walk, modules: Mapping[str, tuple[str, str]], steps: int
) -> tuple[Breakdown, dict[str, list[int]]]:
    """The GPU's time by the rows of the operators that launched its kernels; idle where there was none."""
    kernels = sorted(kernels, key=lambda each: (each.start, each.end))
    compute = [each for each in kernels if not is_collective_backend(each.name)]
    in_flight = union((each.start, each.end) for each in kernels if is_collective_backend(each.name))
    times: dict[Label, int] = defaultdict(int)
    operators: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    cursor = kernels[0].start
    busy = union((each.start, each.end) for each in compute)
    for kernel in compute:
        # Where streams overlap, the kernel that began first has the time.
        own = max(0, kernel.end - max(kernel.start, cursor))
        cursor = max(cursor, kernel.end)
        times[walk.label_of[kernel.correlation]] += own
        operators[kernel.name][0] += own
        operators[kernel.name][1] += 1
    exposed = sum(end - start - overlap(start, end, busy) for start, end in in_flight)
    if exposed:
        times[Label(COMMUNICATION, "communication")] += exposed
    # Whatever the GPU does between two steps, such as validation, belongs to neither, and is no idleness.
    first, last = kernels[0].start, max(each.end for each in kernels)
    in_steps = union([*walk.steps, *busy, *in_flight])
    total = overlap(first, last, in_steps)
    times[Label(IDLE, "other")] += total - sum(times.values())
    return Breakdown("device", _SECONDS * total / steps, _rows(times, walk.calls, modules, steps)), operators
