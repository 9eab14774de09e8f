"""How long a layer takes by each schedule, and which to try."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from lightning_efficient.moe.planning.device import DeviceCost, Direction
from lightning_efficient.moe.planning.links import Links
from lightning_efficient.moe.planning.shape import LayerShape, rows
from lightning_efficient.moe.planning.steps import Compute, Message, steps
from lightning_efficient.moe.planning.timeline import Timeline, play
from lightning_efficient.moe.schedule import SCHEDULES, Schedule, Split
from lightning_efficient.moe.topology import MoESizes

SPLITS: tuple[Split, ...] = ("before", "after")
#: Chunks that are tried.
CHUNKS = (1, 2, 4, 8)

#: Rows of the busiest rank over the mean: a router that has learned nothing does about so well with eight experts.
_UNEVEN = 1.1
_LEAST_SLOTS = 4
_MOST_PADDING = 1.2


@dataclass(frozen=True, slots=True)
class Prediction:
    """How long a layer takes by a schedule.

    Args:
        schedule: that one.
        forward_s: seconds.
        backward_s: seconds.
        parts: seconds of each kind of step by itself, both directions; together they are more than the layer takes
            where they overlap.
        exposed_s: seconds in which the device waits for links.
    """

    schedule: Schedule
    forward_s: float
    backward_s: float
    parts: Mapping[str, float] = field(default_factory=dict)
    exposed_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Of both directions."""
        return self.forward_s + self.backward_s

    @property
    def dominant(self) -> str:
        """What takes most."""
        return max(self.parts, key=lambda name: self.parts[name], default="nothing")


def predict(schedule: Schedule, shape: LayerShape, *, sizes: MoESizes, links: Links, device: DeviceCost) -> Prediction:
    """Play a schedule through.

    Args:
        schedule: with its chunks.
        shape: of the layer.
        sizes: of the groups.
        links: what they cost.
        device: what the layer's own work costs.

    Raises:
        ValueError: the links were measured without a collective that the schedule needs.
    """
    forward = _play(schedule, shape, sizes, links, device, "forward")
    backward = _play(schedule, shape, sizes, links, device, "backward")
    parts = dict(forward.busy)
    for name, seconds in backward.busy.items():
        parts[name] = parts.get(name, 0.0) + seconds
    exposed_s = forward.seconds + backward.seconds - forward.device - backward.device
    return Prediction(schedule, forward.seconds, backward.seconds, parts, max(exposed_s, 0.0))


def candidates(
    shape: LayerShape,
    sizes: MoESizes,
    *,
    splits: Collection[Split] = SPLITS,
    chunks: int | None = None,
    name: str | None = None,
) -> list[Schedule]:
    """Return the schedules worth comparing, the simpler first.

    Of schedules that do the same with these sizes the simplest is there. The paper's baseline never is, and DeepSpeed's
    order where there are as many shards as MP ranks, as it needs; without shards it is S2.

    Args:
        shape: of the layer.
        sizes: of the groups.
        splits: where tokens may be split; before and after the gate other tokens are dropped.
        chunks: only this number, as far as a schedule can be cut; None: all that are sensible.
        name: only this schedule, wherever it splits.

    Raises:
        ValueError: no schedule is left.
    """
    names = ["s1", "s2", "deepspeed", "s1_hier", "s2_hier", "s2_saa"]
    moves = sizes.expert_parallel * sizes.expert_sharding > 1
    if moves and shape.capacity_factor is not None:  # without a capacity, all are packed
        names += ["s1_packed", "s2_packed", "s1_hier_packed", "s2_hier_packed"]
    found: list[Schedule] = []
    for schedule in [SCHEDULES[each] for each in names if _differs(SCHEDULES[each], sizes, splits)]:
        found += _in_chunks(schedule, shape, sizes, chunks)
    # Merging in one part overlaps nothing: it is S2. Packing what is full saves nothing.
    found = [each for each in found if each.name != "s2_saa" or each.chunks > 1]
    found = [each for each in found if not each.packed or _saves_rows(each, shape, sizes)]
    if name is not None:
        found = _in_chunks(SCHEDULES[name], shape, sizes, chunks)
    if not found:
        raise ValueError(f"no schedule is left (splits={sorted(splits)}): allow 'before', 'after' or both.")
    return sorted(found, key=lambda each: each.chunks)


def _in_chunks(schedule: Schedule, shape: LayerShape, sizes: MoESizes, chunks: int | None) -> list[Schedule]:
    if not schedule.can_be_chunked:
        return [schedule]
    if chunks is not None:
        return [schedule.with_chunks(chunks)]
    cut = [schedule.with_chunks(number) for number in CHUNKS]
    return [each for each in cut if each.chunks == 1 or _worth_cutting(each, shape, sizes)]


def choose(
    predictions: Iterable[Prediction], *, measured: Mapping[str, float] | None = None, tie: float = 0.03
) -> Schedule:
    """Return the fastest, by what was measured if anything was; of those within ``tie`` of it the simplest.

    Args:
        predictions: of the candidates, the simpler first.
        measured: seconds by label.
        tie: share of the best time.
    """
    own = list(predictions)
    seconds = {each.schedule: each.seconds for each in own}
    if measured:
        seconds = {each.schedule: measured[each.schedule.label] for each in own if each.schedule.label in measured}
    best = min(seconds.values())
    return next(schedule for schedule, took in seconds.items() if took <= (1 + tie) * best)


def fallback(sizes: MoESizes, splits: Collection[Split]) -> Schedule:
    """Return what runs where measurements are no ground to choose by.

    It is the hierarchical form of S1, which sends least; where tokens must be split after the gate, DeepSpeed's order,
    or else the hierarchical form of S2.
    """
    if "before" in splits:
        return SCHEDULES["s1_hier"]
    return SCHEDULES["deepspeed" if _is_deepspeed(sizes) else "s2_hier"]


def _play(
    schedule: Schedule, shape: LayerShape, sizes: MoESizes, links: Links, device: DeviceCost, direction: Direction
) -> Timeline:
    def cost(step: Compute | Message) -> tuple[float, float]:
        if isinstance(step, Message):
            return links.cost(step)
        return 0.0, device.cost(step.work, step.rows, direction)

    program = steps(schedule, shape, sizes, backward=direction == "backward", uneven=_UNEVEN)
    return play(program, cost, links.share, lanes=links.lanes)


def _is_deepspeed(sizes: MoESizes) -> bool:
    return sizes.expert_sharding in (1, sizes.model_parallel)


def _differs(schedule: Schedule, sizes: MoESizes, splits: Collection[Split]) -> bool:
    """Whether the schedule may run, and does something that no simpler one does."""
    mp, esp = sizes.model_parallel, sizes.expert_sharding
    if schedule.split not in splits:
        return False
    if mp == 1 and schedule.split == "after" and "before" in splits and schedule.name != "deepspeed":
        return False
    if schedule.name == "deepspeed":
        return esp > 1 and _is_deepspeed(sizes)  # without shards it is S2
    if schedule.name == "s2_saa" and mp == 1:
        return False
    return schedule.transport != "hierarchical" or esp > 1


def _saves_rows(schedule: Schedule, shape: LayerShape, sizes: MoESizes) -> bool:
    """Whether slots stay empty."""
    return rows(schedule, shape, sizes).own < rows(replace(schedule, packed=False), shape, sizes).own


def _worth_cutting(schedule: Schedule, shape: LayerShape, sizes: MoESizes) -> bool:
    """Whether each part still holds some slots of each expert, and padding stays small."""
    own, whole = rows(schedule, shape, sizes).own, rows(schedule.with_chunks(1), shape, sizes).own
    moves = sizes.expert_parallel * sizes.expert_sharding > 1
    return moves and own >= schedule.chunks * _LEAST_SLOTS * shape.num_experts and own <= _MOST_PADDING * whole
