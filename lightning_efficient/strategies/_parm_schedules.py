"""Which schedules a run of `ParmStrategy` uses: from its settings, or a checkpoint, and how they are told."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_efficient.moe import FixedSchedule, MoELayer, MoETopology, Schedule, schedule_named
from lightning_efficient.moe.planning import AutoSchedule, LayerShape, Plan, choice_table, explain

_MOST_TOLD = 16


def fixed_schedule(schedule: str, chunks: int | Literal["auto"]) -> Schedule | None:
    """Return the only schedule that the settings allow; None where there is a choice.

    Raises:
        ValueError: there is no such schedule, or it cannot be cut like that.
    """
    if chunks != "auto" and chunks < 1:
        raise ValueError(f"chunks is {chunks}: a layer runs in 1 part or more. Set it to 1 or more, or to 'auto'.")
    if schedule == "auto":
        return None
    named = schedule_named(schedule)
    if "/" not in schedule and chunks != "auto":
        return named.with_chunks(chunks)
    if chunks not in ("auto", named.chunks):
        raise ValueError(
            f"schedule={schedule!r} with chunks={chunks}: they say different numbers of chunks. Leave chunks out."
        )
    return named if "/" in schedule or not named.can_be_chunked else None


class Schedules:
    """Gives layers their schedules, and remembers which.

    Args:
        scheduler: who decides.

    Attributes:
        used: the schedule of each shape of layer so far.
    """

    def __init__(self, scheduler: FixedSchedule | AutoSchedule) -> None:
        self.scheduler = scheduler
        self.used: dict[LayerShape, Schedule] = {}
        self._told = 0

    def schedule_for(self, layer: MoELayer, x_SM: Tensor) -> Schedule:
        """Return the schedule for these tokens."""
        schedule = self.scheduler.schedule_for(layer, x_SM)
        if x_SM.shape[0]:
            self.used[LayerShape.of(layer, x_SM)] = schedule
        return schedule

    def untold(self) -> dict[LayerShape, Schedule]:
        """Return what was used since this was asked last; where batches have many lengths, the first of them."""
        new = dict(list(self.used.items())[self._told : _MOST_TOLD])
        self._told = len(self.used)
        return new

    def describe(self, shape: LayerShape) -> str:
        """Return the candidates of a shape as a table, and why the schedule was chosen."""
        plan = self.scheduler.plan if isinstance(self.scheduler, AutoSchedule) else Plan()
        choice = plan.choices.get(shape)
        if choice is None:
            return f"{self.used[shape].label} for {shape.tokens} tokens of {shape.dim}, as set."
        return "\n".join((*([_drawn(choice_table(choice))] if choice.predictions else []), explain(choice)))

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        if isinstance(self.scheduler, FixedSchedule):
            return {"fixed": self.scheduler.schedule.label}
        return {"auto": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, may_drop: bool) -> None:
        """Go on as a checkpoint says, as far as the settings allow.

        Args:
            state: from :meth:`state_dict`.
            may_drop: whether a layer has a capacity: then S1 and S2 differ, and a choice keeps to the one that was.
        """
        if isinstance(self.scheduler, AutoSchedule) and "auto" in state:
            free = self.scheduler.name is None
            kept = state["auto"]["kept"] if free else []  # a name says where tokens are split
            self.scheduler.load_state_dict({"plan": _readable(state["auto"]["plan"]), "kept": kept})
            if free:
                return
        if not may_drop:
            return
        by_slice = _drop_by_slice(state)
        if isinstance(self.scheduler, AutoSchedule) and self.scheduler.name is None:
            if len(by_slice) == 1:
                self.scheduler.splits = ("before",) if True in by_slice else ("after",)
            return
        name = self.scheduler.name if isinstance(self.scheduler, AutoSchedule) else self.scheduler.schedule.label
        assert name is not None
        if by_slice - {schedule_named(name).drops_by_slice}:
            rank_zero_warn(
                f"The checkpoint was trained by schedules that drop other tokens than {name!r} does, where experts "
                "overflow. Set schedule='auto' to keep to their kind, or capacity_factor to null to drop none."
            )


def make_scheduler(
    topology: MoETopology,
    *,
    schedule: str,
    chunks: int | Literal["auto"],
    trials: int,
    cache: str | None,
    timeout_s: float,
) -> Schedules:
    """Return what decides by the settings of the strategy."""
    fixed = fixed_schedule(schedule, chunks)
    if fixed is not None:
        return Schedules(FixedSchedule(fixed))
    return Schedules(
        AutoSchedule(
            topology,
            name=None if schedule == "auto" else schedule,
            chunks=None if chunks == "auto" else chunks,
            trials=trials,
            cache=cache,
            timeout_s=timeout_s,
        )
    )


def _drop_by_slice(state: Mapping[str, Any]) -> set[bool]:
    if "fixed" in state:
        return {schedule_named(state["fixed"]).drops_by_slice}
    return {each["split"] == "before" for each in state["auto"]["kept"]}


def _readable(plan: Any) -> Any:
    """Return a plan that this release reads, on all ranks alike; None for another."""
    try:
        Plan.from_dict(plan)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rank_zero_warn(f"The schedules in the checkpoint cannot be read ({error}): they are chosen anew.")
        return None
    return plan


def _drawn(table: Any) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=110)
    console.print(table)
    drawn: str = console.file.getvalue()  # type: ignore[attr-defined]
    return drawn.rstrip()
