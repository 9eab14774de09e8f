"""`AutoSchedule`: measures what a layer costs by each schedule where it runs, and gives it the fastest."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_efficient.moe.agreement import from_first
from lightning_efficient.moe.layer import MoELayer
from lightning_efficient.moe.planning.device import measure_device
from lightning_efficient.moe.planning.links import measure_links
from lightning_efficient.moe.planning.plan import Choice, Plan, setting_of
from lightning_efficient.moe.planning.predict import (
    SPLITS,
    Prediction,
    candidates,
    choose,
    fallback,
    predict,
)
from lightning_efficient.moe.planning.sampler import Clock, GroupSampler
from lightning_efficient.moe.planning.search import Search
from lightning_efficient.moe.planning.shape import LayerShape
from lightning_efficient.moe.planning.trials import run_trials
from lightning_efficient.moe.schedule import SCHEDULES, Schedule, Split, schedule_named
from lightning_efficient.moe.topology import MoETopology

#: Collectives of one group that gloo works on at once, and its lag over TCP; NCCL does one after the other.
_GLOO_LANES, _GLOO_LAG = 2, 0.3
#: Of the seconds for measuring: for the links, once; trials get the rest, for each shape.
_FOR_LINKS = 0.4
#: Numbers of tokens of a layer for which schedules are tried; where batches have many lengths, the model decides alone.
_MOST_TRIED = 4
#: Share of the time by doubtful lines that makes a prediction doubtful, and how much further off it is taken to be.
_DOUBTFUL = 0.25
_SPREAD_IN_DOUBT = 3.0


class AutoSchedule:
    """Chooses the schedule of each shape of layer, when it first appears.

    It measures the links of the groups and the layer's own work, predicts each candidate by them, runs the layer by
    those that may be the fastest, and takes the one that is. All ranks do so together, rank 0 decides for all, and
    nothing is measured twice. Where tokens may be dropped, S1 drops others than S2: a layer keeps to the one kind for
    the whole run.

    Args:
        topology: the groups.
        splits: where tokens may be split: ``before`` the gate (S1), ``after`` it (S2, DeepSpeed's order), or both.
        name: of the only schedule that may be chosen, where chunks are to be; None: any.
        chunks: into how many parts slots are cut; None: this is chosen, too.
        trials: runs of the layer by schedules that may be the fastest, at most; 0: the model alone decides, as it does
            when a layer has been tried with four numbers of tokens.
        cache: a JSON file to keep the plan in, between runs in the same setting.
        budget_s: seconds for the links, once, and the trials of a shape, together; roughly.
        timeout_s: seconds after which a collective counts as stuck.

    Attributes:
        plan: what was measured and chosen.

    Raises:
        ValueError: an argument is wrong.
    """

    def __init__(
        self,
        topology: MoETopology,
        *,
        splits: Collection[Split] = SPLITS,
        name: str | None = None,
        chunks: int | None = None,
        trials: int = 40,
        cache: str | Path | None = None,
        budget_s: float = 4.0,
        timeout_s: float = 60.0,
    ) -> None:
        if not splits or not set(splits) <= set(SPLITS):
            raise ValueError(f"splits are {sorted(splits)}: choose 'before', 'after' or both.")
        if name is not None:
            schedule_named(name)
        if trials < 0 or (chunks is not None and chunks < 1) or budget_s <= 0 or timeout_s <= 0:
            raise ValueError(
                f"bad choice of schedules (trials={trials}, chunks={chunks}, budget_s={budget_s:g}, "
                f"timeout_s={timeout_s:g}): trials are 0 or more, chunks 1 or more, times above 0. Leave them out for "
                "the defaults."
            )
        self.topology = topology
        self.splits = tuple(split for split in SPLITS if split in splits)
        self.name, self.chunks = name, chunks
        self.trials, self.budget_s, self.timeout_s = trials, budget_s, timeout_s
        self.cache = None if cache is None else Path(cache)
        self.plan = Plan()
        self._prepared = False
        self._kept: dict[LayerShape, Split] = {}
        self._known: dict[tuple[LayerShape, tuple[Split, ...]], list[Schedule]] = {}
        self._resumed: Mapping[str, Any] | None = None

    def schedule_for(self, layer: MoELayer, x_SM: Tensor) -> Schedule:
        """Return the schedule of a layer for these tokens; the first time for a shape, all ranks choose it together.

        Args:
            layer: the layer.
            x_SM: its tokens: only their shape, dtype and device count.
        """
        if not x_SM.shape[0]:
            return self._fallback(self.splits)
        shape = LayerShape.of(layer, x_SM)
        if not self._prepared:
            self._prepare(x_SM.device)
        choice = self.plan.choices.get(shape)
        if choice is None or not self._allows(choice):
            # Whatever mode the layer runs in now, what is timed is a step of training; and where the layer is
            # checkpointed, what the steps save is none of the checkpoint's.
            with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
                choice = self._choose(shape, layer, x_SM)
            self.plan.choices[shape] = choice
            if self.topology.rank == 0 and not choice.doubtful:
                self._save()
        if layer.training and shape.may_drop and choice.schedule.split != "gather":
            self._kept.setdefault(shape.kind, choice.schedule.split)
        return choice.schedule

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint: the plan, and to which splits layers keep."""
        kept = [{"kind": kind.as_dict(), "split": split} for kind, split in self._kept.items()]
        return {"plan": self.plan.as_dict(), "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as a checkpoint says: the same choices in the same setting, the same splits in any.

        Args:
            state: from :meth:`state_dict`.
        """
        self._kept = {LayerShape(**each["kind"]): each["split"] for each in state["kept"]}
        self._resumed, self._prepared = state["plan"], False

    def _prepare(self, device: torch.device) -> None:
        """Read what is known already."""
        setting = setting_of(self.topology, device)
        known: dict[str, Any] = {}
        if self.topology.rank == 0:
            plan = Plan(setting) if self.cache is None else Plan.load(self.cache, setting)
            if self._resumed is not None and self._resumed["setting"] == setting:
                resumed = Plan.from_dict(self._resumed)
                resumed.choices = {**plan.choices, **resumed.choices}
                plan = resumed
            if plan.links is not None and plan.links.refused:  # perhaps there is less noise now
                plan.links = None
                plan.choices = {shape: each for shape, each in plan.choices.items() if not each.doubtful}
            known = plan.as_dict()
        self.plan = Plan.from_dict(from_first(known, self.topology.world))
        self._prepared = True

    def _allows(self, choice: Choice) -> bool:
        """Whether a choice that was made earlier fits what is asked for now."""
        own = self._candidates(choice.shape)
        return choice.schedule in own or (
            choice.doubtful and choice.schedule == self._fallback(self._splits(choice.shape))
        )

    def _candidates(self, shape: LayerShape) -> list[Schedule]:
        splits = self._splits(shape)
        if (shape, splits) not in self._known:  # asked for in each forward
            self._known[shape, splits] = candidates(
                shape, self.topology.sizes, splits=splits, chunks=self.chunks, name=self.name
            )
        return self._known[shape, splits]

    def _fallback(self, splits: tuple[Split, ...]) -> Schedule:
        schedule = fallback(self.topology.sizes, splits) if self.name is None else SCHEDULES[self.name]
        return schedule.with_chunks(self.chunks or 1) if schedule.can_be_chunked else schedule

    def _splits(self, shape: LayerShape) -> tuple[Split, ...]:
        kept = self._kept.get(shape.kind) if shape.may_drop else None
        return self.splits if kept is None else (kept,)

    def _choose(self, shape: LayerShape, layer: MoELayer, x_SM: Tensor) -> Choice:
        own = self._candidates(shape)
        if len(own) == 1 or self.topology.world.size == 1:
            return Choice(shape, own[0], "nothing else does anything different with these sizes")
        clock = Clock(self.topology, device=x_SM.device, timeout_s=self.timeout_s)
        predictions = self._predict(own, shape, clock)
        doubt = self._doubt(predictions)
        measured: dict[str, float] = {}
        tried = sum(bool(each.measured) for each in self.plan.choices.values() if each.shape.kind == shape.kind)
        if self.trials and tried < _MOST_TRIED:
            search = Search(predictions, spread=1.0 if doubt is None else _SPREAD_IN_DOUBT)
            run_trials(
                layer, search, tokens=x_SM, clock=clock, turns=self.trials, budget_s=(1 - _FOR_LINKS) * self.budget_s
            )
            measured = {schedule.label: seconds for schedule, seconds in search.measured.items()}
        if measured or doubt is None:
            chosen = choose(predictions, measured=measured)
            reason = "the fastest of those tried" if measured else "predicted to be the fastest"
        else:
            chosen, reason = self._fallback(self._splits(shape)), "what does well on most links"
        if doubt is not None:
            self._warn(doubt, chosen, reason)
            reason += f", for links could not be measured ({doubt})"
        choice = Choice(shape, chosen, reason, tuple(predictions), measured, doubtful=doubt is not None)
        return Choice.from_dict(from_first(choice.as_dict(), self.topology.world))

    def _warn(self, doubt: str, chosen: Schedule, reason: str) -> None:
        if self.topology.rank == 0:
            warnings.warn(
                f"Links cannot be told apart from noise ({doubt}), so the layers run by {chosen.label}: {reason}. "
                "Measure on a quieter machine, or set the schedule.",
                stacklevel=2,
            )

    def _predict(self, own: list[Schedule], shape: LayerShape, clock: Clock) -> list[Prediction]:
        """Measure what is not known, and predict each."""
        if self.plan.links is None:
            lanes, lag = (_GLOO_LANES, _GLOO_LAG) if "gloo" in str(self.plan.setting["backend"]) else (1, 0.0)
            self.plan.links = measure_links(
                self.topology.sizes, GroupSampler(clock), lanes=lanes, lag=lag, budget_s=_FOR_LINKS * self.budget_s
            )
        kind = shape.kind
        if kind not in self.plan.devices:
            self.plan.devices[kind] = measure_device(shape, self.topology.sizes, clock)
        links, device = self.plan.links, self.plan.devices[kind]
        return [predict(each, shape, sizes=self.topology.sizes, links=links, device=device) for each in own]

    def _doubt(self, predictions: list[Prediction]) -> str | None:
        """Why the predictions are no ground to choose by: lines that were refused make up much of the best one."""
        links = self.plan.links
        assert links is not None
        best = min(predictions, key=lambda each: each.seconds)
        names = {f"{op} {axis}": f"{op} over {axis}: {why}" for (op, axis), why in links.refused.items()}
        doubtful = {name: best.parts[name] for name in names if name in best.parts}
        doubted = sum(doubtful.values()) > _DOUBTFUL * sum(best.parts.values())
        reason: str | None = names[max(doubtful, key=lambda name: doubtful[name])] if doubted else None
        return from_first(reason, self.topology.world)

    def _save(self) -> None:
        if self.cache is None:
            return
        try:
            self.plan.save(self.cache)
        except OSError as error:  # the other ranks go on
            warnings.warn(
                f"{self.cache} cannot be written ({error}): the next run measures again. Choose another profile_cache.",
                stacklevel=2,
            )


def _itself(tensor: Tensor) -> Tensor:
    return tensor
