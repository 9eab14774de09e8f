"""A run on some (MP, EP, ESP) goes on with any other, on one device and without the strategy, as if never stopped."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.distributed.checkpoint import FileSystemReader

from lightning_efficient._links import AlphaBeta
from lightning_efficient.models import MoELlamaLM
from lightning_efficient.moe import SCHEDULES, FixedSchedule, MoELayer, MoETopology
from lightning_efficient.moe.planning import AutoSchedule, LayerShape, Links, Plan, auto
from lightning_efficient.moe.planning.links import LINKS
from lightning_efficient.strategies._parm_schedules import Schedules
from tests.compression.harness import recorded_warnings
from tests.strategies.parm_toys import (
    BATCHES,
    DIM,
    EXPERTS,
    HIDDEN,
    Data,
    MoEModule,
    Sizes,
    fit,
    parm,
    train_alone,
    weights_of,
)
from tests.support.ranks import run_ranks
from tests.support.trainers import logged_lines, make_trainer

pytestmark = pytest.mark.distributed

STOP = BATCHES // 2
TOLERANCE = 1e-10
KINDS = ("folder", "single")

Losses = dict[str, list[float]]


def module() -> MoEModule:
    """Its loss is a mean over tokens: the same, however they are dealt out."""
    return MoEModule(aux_loss_coef=0.0, balance_rate=0.05)


def _losses_after(world_size: int, strategy: Any, path: str) -> list[float]:
    resumed, _ = fit(world_size, strategy, module(), data=Data(skip=STOP), ckpt_path=path, max_epochs=2)
    assert int(resumed.steps) == BATCHES
    return list(resumed.losses)


def _save_and_go_on(rank: int, world_size: int, folder: str) -> Losses:
    for kind in KINDS:
        strategy = parm((2, 2, 2), save_distributed_checkpoint=kind == "folder")
        _, trainer = fit(world_size, strategy, module(), data=Data(drop=BATCHES - STOP))
        trainer.save_checkpoint(f"{folder}/{kind}.ckpt")
    resumed = {}
    for kind in KINDS:
        for sizes in ((2, 2, 2), (2, 4, 1), (4, 2, 1)):
            resumed[f"{kind} {sizes}"] = _losses_after(
                world_size, parm(sizes, schedule="s2/1"), f"{folder}/{kind}.ckpt"
            )
    return resumed


def _go_on_alone(rank: int, world_size: int, folder: str) -> Losses:
    resumed = {f"{kind} (1, 1, 1)": _losses_after(1, parm((1, 1, 1)), f"{folder}/{kind}.ckpt") for kind in KINDS}
    return {**resumed, "single without the strategy": _losses_after(1, "auto", f"{folder}/single.ckpt")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def by_many(folder: str) -> list[Losses]:
    return run_ranks(_save_and_go_on, 4, folder, timeout=170)


@pytest.fixture(scope="module")
def by_one(folder: str, by_many: list[Losses]) -> list[Losses]:
    return run_ranks(_go_on_alone, 1, folder, timeout=170)


def _joint(losses: list[Losses], key: str) -> list[float]:
    """The loss of the joint batches: each MP group counts its own as often as it has ranks."""
    return [sum(each) / len(losses) for each in zip(*(rank[key] for rank in losses), strict=True)]


def _expected() -> list[float]:
    return train_alone(1, module=module()).losses[STOP:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 4, 1), (4, 2, 1)])
def test_other_sizes_go_on_with_the_same_losses(kind: str, sizes: Sizes, by_many: list[Losses]) -> None:
    assert _joint(by_many, f"{kind} {sizes}") == pytest.approx(_expected(), abs=TOLERANCE)


@pytest.mark.parametrize("key", ["folder (1, 1, 1)", "single (1, 1, 1)", "single without the strategy"])
def test_one_device_goes_on_with_the_same_losses(key: str, by_one: list[Losses]) -> None:
    assert by_one[0][key] == pytest.approx(_expected(), abs=TOLERANCE)


def test_what_is_stored_of_experts_is_whole(folder: str, by_many: list[Losses]) -> None:
    shapes = {"w_in": (EXPERTS, DIM, 1, HIDDEN), "w_out": (EXPERTS, HIDDEN, DIM)}
    single = torch.load(Path(folder) / "single.ckpt", weights_only=True)
    assert single["parm"]["schedules"] == {"fixed": "s1_hier"}
    stored = FileSystemReader(f"{folder}/folder.ckpt").read_metadata().state_dict_metadata  # type: ignore[no-untyped-call]
    for name, shape in shapes.items():
        assert tuple(single["state_dict"][f"net.1.experts.{name}"].shape) == shape
        assert tuple(stored[f"state_dict.net.1.experts.{name}"].size) == shape  # type: ignore[union-attr]
        assert tuple(stored[f"optimizer_0.state.net.1.experts.{name}.momentum_buffer"].size) == shape  # type: ignore[union-attr]


# ---- schedules -----------------------------------------------------------------------------------------------------


def _choose_and_keep(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    full: dict[str, Any] = {"capacity_factor": 1.0, "min_capacity": 1}

    def run(sizes: Sizes, **kwargs: Any) -> tuple[Any, Any]:
        strategy = parm(sizes, schedule="auto", trials=0, save_distributed_checkpoint=False)
        return strategy, fit(world_size, strategy, MoEModule(**full), **kwargs)[1]

    path = f"{folder}/auto.ckpt"
    # Links that noise leaves in doubt would be measured again after a restart.
    known = Links({key: AlphaBeta(1e-4, 1e-8) for key in LINKS})
    with logged_lines() as lines, patch.object(auto, "measure_links", return_value=known):
        first, trainer = run((2, 2, 1), data=Data(drop=BATCHES - STOP))
    trainer.save_checkpoint(path)
    again: dict[str, Any] = {"data": Data(skip=STOP), "ckpt_path": path, "max_epochs": 2}
    with patch.object(auto, "measure_links", side_effect=AssertionError("measured again")):
        same, _ = run((2, 2, 1), **again)
    other, _ = run((2, 1, 2), **again)
    used = {
        name: [schedule for shape, schedule in each._schedules.used.items()]
        for name, each in (("first", first), ("same", same), ("other", other))
    }
    return {"used": used, "lines": "\n".join(lines)}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(_choose_and_keep, 2, str(tmp_path_factory.mktemp("auto")), timeout=170)


def test_a_resumed_run_keeps_its_schedules_or_their_kind(kept: list[dict[str, Any]]) -> None:
    for seen in kept:
        (first,), (same,), (other,) = (seen["used"][name] for name in ("first", "same", "other"))
        assert same == first
        assert other.drops_by_slice == first.drops_by_slice
    assert kept[0]["used"] == kept[1]["used"]


def test_the_choice_is_told_once(kept: list[dict[str, Any]]) -> None:
    label = kept[0]["used"]["first"][0].label
    assert kept[0]["lines"].count(f"{label} for 24 tokens: ") == 1


@pytest.mark.parametrize(("label", "splits"), [("s1_hier/2", ("before",)), ("s2", ("after",)), ("paper", ("after",))])
def test_auto_keeps_to_the_kind_of_a_schedule_that_was_set(label: str, splits: tuple[str, ...]) -> None:
    for may_drop in (True, False):
        schedules = Schedules(AutoSchedule(MoETopology()))
        schedules.load_state_dict({"fixed": label}, may_drop=may_drop)
        assert isinstance(schedules.scheduler, AutoSchedule)
        assert set(schedules.scheduler.splits) == (set(splits) if may_drop else {"before", "after"})


def test_a_set_schedule_of_another_kind_warns_where_tokens_drop() -> None:
    for may_drop in (True, False):
        with recorded_warnings() as warned:
            Schedules(FixedSchedule(SCHEDULES["s2"])).load_state_dict({"fixed": "s1"}, may_drop=may_drop)
        assert [("drop other tokens than 's2' does" in text) for text in warned] == [True] * may_drop


def test_a_schedule_named_without_chunks_of_another_kind_warns_and_forgets_the_kind() -> None:
    kept = [{"kind": LayerShape(1, 8, 16, 4, 2).as_dict(), "split": "after"}]
    schedules = Schedules(AutoSchedule(MoETopology(), name="s1"))
    with pytest.warns(UserWarning, match="drop other tokens than 's1' does"):
        schedules.load_state_dict({"auto": {"plan": Plan().as_dict(), "kept": kept}}, may_drop=True)
    assert schedules.state_dict()["auto"]["kept"] == []


def test_a_plan_of_another_release_is_measured_anew() -> None:
    schedules = Schedules(AutoSchedule(MoETopology()))
    with recorded_warnings() as warned:
        schedules.load_state_dict({"auto": {"kept": [], "plan": {"schema": 0}}}, may_drop=True)
    assert ["cannot be read" in text for text in warned] == [True]


def test_no_tokens_are_no_shape_and_many_shapes_are_not_all_told() -> None:
    schedules, layer = Schedules(FixedSchedule(SCHEDULES["s1"])), MoELayer(8, 16, 4)
    schedules.schedule_for(layer, torch.zeros(0, 8))
    assert schedules.used == {}
    told = 0
    for tokens in range(1, 100):
        schedules.schedule_for(layer, torch.zeros(tokens, 8))
        told += len(schedules.untold())
    assert told == 16
    assert len(schedules.used) == 99


def _averaged(rank: int, world_size: int) -> tuple[bool, list[str]]:
    torch.manual_seed(0)
    model = MoELlamaLM(num_layers=2, hidden_size=16, ffn_size=16, num_heads=2)
    ids = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(rank))
    batches = [{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}] * 4
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    average = EMAWeightAveraging(decay=0.5)
    trainer = make_trainer(
        world_size, strategy=parm((1, 2, 1)), callbacks=[average], precision=32, max_epochs=1, val_check_interval=2
    )
    trainer.fit(model, loader, loader)
    kept = [type(each).__name__ for each in model.parameters() if each.ndim > 2]
    return all(bool(each.isfinite().all()) for each in weights_of(model).values()), kept


def test_lightnings_weight_averaging_copies_the_experts_that_train() -> None:
    for finite, kept in run_ranks(_averaged, 2, timeout=120):
        assert finite
        assert set(kept) <= {"DTensor", "Parameter"}
