"""What a rank does in a layer, step by step: the one account from which traffic and time are both derived.

The steps of backward are those of forward from the last to the first, where waiting for a collective becomes starting
its adjoint and starting becomes waiting, as in :mod:`lightning_efficient.moe.collectives`.

Dimension letters: M model size, E experts, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_efficient.moe.planning.shape import LayerShape, Rows, rows
from lightning_efficient.moe.schedule import Schedule, Transport
from lightning_efficient.moe.topology import Axis, MoESizes
from lightning_efficient.moe.traffic import Traffic

Op: TypeAlias = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce"]
Work: TypeAlias = Literal["gate", "move", "experts"]

_AUXILIARY_ITEMSIZE, _COUNT_ITEMSIZE = 4, 8
_Pair: TypeAlias = tuple[Op | None, Op | None]
#: What runs over ESP before the experts and after them, forward and backward, by transport.
_AROUND_EXPERTS: dict[Transport, tuple[tuple[_Pair, ...], tuple[_Pair, ...]]] = {
    "fused": ((), ()),
    "plain": ((), (("all_reduce", "all_reduce"),)),
    "hierarchical": ((("all_gather", "reduce_scatter"),), (("reduce_scatter", "all_gather"),)),
    "all_reduce": ((("all_gather", None), (None, "all_reduce")), (("all_reduce", None), (None, "all_gather"))),
}


@dataclass(frozen=True, slots=True)
class Message:
    """A collective.

    Attributes:
        op: which.
        axis: of the group.
        elements: of the whole message: what each rank hands in, or, for an all-gather, the result.
        itemsize: bytes of an element.
    """

    op: Op
    axis: Axis
    elements: int
    itemsize: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole message."""
        return self.elements * self.itemsize

    def sent(self, ranks: int) -> float:
        """Elements that each rank of a group of so many sends, as a ring does."""
        return self.elements * (2 if self.op == "all_reduce" else 1) * (ranks - 1) / ranks


@dataclass(frozen=True, slots=True)
class Start:
    """Starts a collective; None: nothing is sent in that direction."""

    flight: int
    forward: Message | None
    backward: Message | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Waits for one."""

    start: Start


@dataclass(frozen=True, slots=True)
class Compute:
    """Work of the device: ``gate`` on tokens, ``move`` of rows through memory, ``experts`` on rows."""

    work: Work
    rows: int


Step: TypeAlias = Start | Wait | Compute


def steps(
    schedule: Schedule, shape: LayerShape, sizes: MoESizes, *, backward: bool = False, uneven: float = 1.0
) -> list[Step]:
    """Return what a rank does in a layer, in order.

    Args:
        schedule: with its chunks.
        shape: of the layer.
        sizes: of the groups.
        backward: that direction.
        uneven: as :func:`~lightning_efficient.moe.planning.shape.rows` takes it.
    """
    forward = _Forward(schedule, shape, sizes, uneven).steps
    if not backward:
        return [step for step in forward if isinstance(step, Compute) or _start_of(step).forward is not None]
    turned: list[Step] = []
    for step in reversed(forward):
        if isinstance(step, Compute):
            turned.append(step)
        elif (start := _start_of(step)).backward is not None:
            adjoint = Start(start.flight, start.backward, start.forward)
            turned.append(adjoint if isinstance(step, Wait) else Wait(adjoint))
    return turned


def _start_of(step: Start | Wait) -> Start:
    return step.start if isinstance(step, Wait) else step


def traffic(schedule: Schedule, shape: LayerShape, sizes: MoESizes, *, backward: bool = False) -> Traffic:
    """Return what a rank sends in a layer: exactly where slots are sent whether filled or not, else with even routing.

    It is the table of section 2.5 of the research, with padding, and what
    :func:`~lightning_efficient.moe.count_traffic` counts.

    Args:
        schedule: with its chunks.
        shape: of the layer.
        sizes: of the groups.
        backward: in that direction.
    """
    ranks = ranks_of(sizes)
    total = Traffic()
    for step in steps(schedule, shape, sizes, backward=backward):
        if isinstance(step, Start) and (message := step.forward) is not None:
            total.add(message.op, message.axis, message.sent(ranks[message.axis]), message.itemsize)
    return total


def ranks_of(sizes: MoESizes) -> dict[Axis, int]:
    """Return how many ranks the groups have that a layer uses."""
    return {
        "mp": sizes.model_parallel,
        "ep": sizes.expert_parallel,
        "esp": sizes.expert_sharding,
        "block": sizes.expert_parallel * sizes.expert_sharding,
    }


class _Forward:
    """Writes the steps down as the layer takes them."""

    def __init__(self, schedule: Schedule, shape: LayerShape, sizes: MoESizes, uneven: float) -> None:
        self.steps: list[Step] = []
        self._schedule, self._shape = schedule, shape
        self._rows: Rows = rows(schedule, shape, sizes, uneven=uneven)
        self._ranks = ranks_of(sizes)
        self._counts_vary = schedule.packed or shape.capacity_factor is None
        self._flights = 0
        {"gather": self._paper, "before": self._before, "after": self._after}[schedule.split]()

    def _paper(self) -> None:
        M, N = self._shape.dim, self._rows
        self._run(self._start("esp", "all_gather", N.gate * M, "reduce_scatter", self._shape.token_itemsize))
        self._gate()
        self._tell_counts()
        self._run(self._start("ep", "all_to_all", N.own * M))
        self._experts(1)
        self._run(self._start("ep", "all_to_all", N.own * M))
        self._compute("move", N.gate * self._shape.top_k)

    def _before(self) -> None:
        M, N = self._shape.dim, self._rows
        self._run(self._start("mp", None, N.tokens * M, "all_gather", self._shape.token_itemsize))
        auxiliary = self._start("mp", "all_reduce", 2 * self._shape.num_experts + 1, None, _AUXILIARY_ITEMSIZE)
        self._gate(auxiliary)
        self._chunks()
        self._compute("move", N.gate * self._shape.top_k)
        self._run(self._start("mp", "all_gather", N.tokens * M, None))
        self._wait(auxiliary)

    def _after(self) -> None:
        self._gate()
        self._chunks()
        self._compute("move", self._rows.gate * self._shape.top_k)

    def _chunks(self) -> None:
        """Split, dispatch, experts, combine and merge in chunks."""
        chunks = self._schedule.chunks
        self._tell_counts()
        # Rows as many as there are have no slots in common: they are not sent together.
        together = self._schedule.overlap == "merge" and not self._counts_vary
        there = 1 if together else chunks
        shared = [self._launch(self._over_mp(chunks, None, "all_gather")) for _ in range(chunks)]
        dispatched = []
        for number, flight in enumerate(shared, start=1):
            self._wait(flight)
            if number * there % chunks == 0:
                self._copy_for_shards(there)
                dispatched.append(self._launch(self._exchange(there)))
        combined: list[Start] = []
        for flight in dispatched:
            self._wait(flight)
            self._experts(there)
            combined += [self._launch(self._exchange(chunks)) for _ in range(chunks // there)]
        merged: list[Start] = []
        for flight in combined:
            self._wait(flight)
            self._copy_for_shards(chunks)  # their sum
            merged.append(self._launch(self._over_mp(chunks, "all_gather", None)))
        for flight in merged:
            self._wait(flight)

    def _tell_counts(self) -> None:
        """Without a capacity, or packed, ranks tell each other how many rows will come."""
        if self._shape.capacity_factor is not None and not self._schedule.packed:
            return
        transport, counts = self._schedule.transport, self._schedule.chunks * self._shape.num_experts
        if transport == "fused":
            self._run(self._start("block", "all_to_all", counts * self._ranks["esp"], None, _COUNT_ITEMSIZE))
        else:
            self._run(self._start("ep", "all_to_all", counts, None, _COUNT_ITEMSIZE))
        if transport in ("hierarchical", "all_reduce"):
            self._run(self._start("esp", "all_gather", counts * self._ranks["esp"], None, _COUNT_ITEMSIZE))

    def _over_mp(self, parts: int, forward: Op | None, backward: Op | None) -> Start:
        if self._schedule.split != "after":
            return self._start("mp", None, 0, None)
        return self._start("mp", forward, self._rows.slots // parts * self._shape.dim, backward)

    def _copy_for_shards(self, parts: int) -> None:
        if self._schedule.transport == "fused" and self._ranks["esp"] > 1:
            self._compute("move", self._rows.experts // parts)

    def _exchange(self, parts: int) -> Start:
        fused = self._schedule.transport == "fused"
        copies = self._ranks["esp"] if fused else 1
        return self._start("block" if fused else "ep", "all_to_all", self._rows.own * copies // parts * self._shape.dim)

    def _experts(self, parts: int) -> None:
        part, M = self._rows.experts // parts, self._shape.dim
        before, after = _AROUND_EXPERTS[self._schedule.transport]
        for forward, backward in before:
            self._run(self._start("esp", forward, part * M, backward))
        moved = 2 * part if self._counts_vary else part  # into the order of experts, besides
        self._compute("move", moved)
        self._compute("experts", part)
        self._compute("move", moved)
        for forward, backward in after:
            self._run(self._start("esp", forward, part * M, backward))

    def _gate(self, auxiliary: Start | None = None) -> None:
        self._compute("gate", self._rows.gate)
        if auxiliary is not None:
            self._launch(auxiliary)
        self._compute("move", self._rows.slots)

    def _start(
        self,
        axis: Axis,
        forward: Op | None,
        elements: int,
        backward: Op | Literal["same"] | None = "same",
        itemsize: int = 0,
    ) -> Start:
        backward = forward if backward == "same" else backward
        self._flights += 1
        messages = [
            Message(op, axis, elements, itemsize or self._shape.itemsize) if op and self._ranks[axis] > 1 else None
            for op in (forward, backward)
        ]
        return Start(self._flights, *messages)

    def _launch(self, start: Start) -> Start:
        self.steps.append(start)
        return start

    def _wait(self, start: Start) -> None:
        self.steps.append(Wait(start))

    def _run(self, start: Start) -> None:
        self._wait(self._launch(start))

    def _compute(self, work: Work, amount: int) -> None:
        self.steps.append(Compute(work, amount))
