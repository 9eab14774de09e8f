"""What ParmStrategy refuses, on every rank and before any collective, and how it ends when a rank is lost."""

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

import lightning_efficient
from lightning_efficient.strategies import ParmStrategy
from tests.compression.harness import recorded_warnings
from tests.strategies.parm_toys import DIM, Batch, Data, MoEModule, fit, message_of, parm
from tests.support.collectives import count_collectives
from tests.support.ranks import rank_outcomes, run_ranks
from tests.support.trainers import make_trainer

TIMEOUT_S = 10.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"schedule": "s1_fused"}, "There is no schedule 's1_fused': choose one of paper, deepspeed, s1"),
        ({"schedule": "deepspeed", "chunks": 2}, "chunks=2 with schedule 'deepspeed'"),
        ({"schedule": "s1/2", "chunks": 4}, "schedule='s1/2' with chunks=4"),
        ({"chunks": 0}, "chunks is 0"),
        ({"model_parallel_size": 0}, "model_parallel_size is 0"),
        ({"expert_parallel_size": -1}, "expert_parallel_size is -1"),
        ({"expert_sharding_size": 0}, "expert_sharding_size is 0"),
        ({"trials": -1}, "trials=-1"),
        ({"bucket_mb": 0}, "bucket_mb=0"),
        ({"timeout": 0}, "timeout=0"),
    ],
)
def test_a_bad_setting_is_refused_at_once(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParmStrategy(**setting)


def test_the_name_gives_the_strategy() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="parm", logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, ParmStrategy)
    assert trainer.strategy.schedule == "auto"
    assert lightning_efficient.ParmStrategy is ParmStrategy


def test_groups_are_not_to_be_had_before_processes_met() -> None:
    with pytest.raises(RuntimeError, match="not formed yet"):
        _ = ParmStrategy().topology


class WithoutHook(pl.LightningModule):
    """Builds its layers too early."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return (self.net(batch[0].float()) - batch[1].float()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Dense(WithoutHook):
    """Has no experts."""

    def configure_model(self) -> None:
        pass


class Altered(MoEModule):
    """Rank 1 sees other tokens, or fewer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @override
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        if self.global_rank == 1 and self.how == "other tokens":
            x = x + 0.3
        if self.global_rank == 1 and self.how == "fewer tokens":
            x, y = x[:, :2], y[:, :2]
        return super().loss((x, y))


class Predicts(MoEModule):
    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0].to(self.net[0].weight.dtype))  # type: ignore[union-attr, no-any-return]


def _predict(world_size: int, *, samples: int) -> str:
    trainer = make_trainer(world_size, strategy=parm((1, 2, 1)), precision=32, use_distributed_sampler=True)
    loader = DataLoader(TensorDataset(torch.zeros(samples, 3, DIM)), batch_size=4)
    try:
        trainer.predict(Predicts(), loader)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _refusals(rank: int, world_size: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with count_collectives() as sent:
        seen["MP"] = message_of(world_size, parm((4, 1, 1)))
        seen["EP x ESP"] = message_of(world_size, parm((1, 2, 2)))
    seen["collectives"] = [each.op for each in sent]
    seen["no hook"] = message_of(world_size, parm((1, 2, 1)), WithoutHook())
    seen["E"] = message_of(world_size, parm((1, 2, 1)), MoEModule(experts=3))
    seen["compiled"] = message_of(world_size, parm((1, 2, 1)), torch.compile(MoEModule()))
    with recorded_warnings() as warned:
        seen["dense"] = message_of(world_size, parm((1, 2, 1)), Dense())
    seen["warned"] = [text for text in warned if "no MoELayer" in text]
    seen["tokens"] = message_of(world_size, parm((2, 1, 1), verify_inputs=True), Altered("other tokens"))
    for key, sizes in (("fewer, EP", (1, 2, 1)), ("fewer, MP", (2, 2, 1))):
        seen[key] = message_of(world_size, parm(sizes), Altered("fewer tokens"))
    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    seen["scaled"] = message_of(world_size, parm((1, 2, 1)), precision=None, plugins=[scaled])
    seen["predict"] = _predict(world_size, samples=9)
    seen["predict evenly"] = _predict(world_size, samples=8)
    module, _ = fit(world_size, parm((1, 2, 1)))
    seen["other sizes"] = message_of(world_size, parm((1, 1, 2)), module)
    seen["same sizes"] = message_of(world_size, parm((1, 2, 1)), module)
    return seen


@pytest.fixture(scope="module")
def refusals() -> list[dict[str, Any]]:
    return run_ranks(_refusals, 2, timeout=170)


@pytest.mark.distributed
def test_bad_sizes_are_one_clear_error_on_every_rank(refusals: list[dict[str, Any]]) -> None:
    for seen in refusals:
        assert seen["MP"].startswith("ValueError: model_parallel_size=4 does not divide the 2 ranks")
        assert seen["EP x ESP"].startswith("ValueError: expert_parallel_size=2 x expert_sharding_size=2 = 4 does not")
        assert seen["collectives"] == []
        assert seen["E"].startswith(
            "ValueError: MoE layer 'net.1' has 3 experts, not divisible by expert_parallel_size=2"
        )
        assert seen["other sizes"].startswith("ValueError: MoE layer 'net.1' was spread over ranks by MoESizes(")
        assert seen["same sizes"] == "no error"


@pytest.mark.distributed
def test_lightnings_own_refusals_are_kept(refusals: list[dict[str, Any]]) -> None:
    for seen in refusals:
        assert seen["no hook"].startswith("TypeError: When using the ParmStrategy, you are required to override the")
        assert seen["compiled"].startswith("RuntimeError: Using a compiled model is incompatible with the current")


@pytest.mark.distributed
def test_scaled_losses_are_refused(refusals: list[dict[str, Any]]) -> None:
    for seen in refusals:
        assert seen["scaled"].startswith("ValueError: precision='16-mixed' scales losses")


@pytest.mark.distributed
def test_unequal_shares_to_predict_are_one_error_and_no_hang(refusals: list[dict[str, Any]]) -> None:
    for seen in refusals:
        assert seen["predict"].startswith("ValueError: predict gives 4 samples to one rank and 5 to another")
        assert seen["predict evenly"] == "no error"


@pytest.mark.distributed
def test_a_model_without_experts_trains_with_a_warning(refusals: list[dict[str, Any]]) -> None:
    assert [seen["dense"] for seen in refusals] == ["no error", "no error"]
    assert len(refusals[0]["warned"]) == 1


@pytest.mark.distributed
def test_unequal_inputs_are_named_on_every_rank(refusals: list[dict[str, Any]]) -> None:
    for seen in refusals:
        assert seen["tokens"].startswith("ValueError: The tokens of MoE layer 'net.1' differ across an MP group")
        assert seen["fewer, EP"].startswith("ValueError: MoE layer 'net.1' got 8 tokens on one rank and 12 on another")
        assert seen["fewer, MP"].startswith("ValueError: MoE layer 'net.1' got 16 tokens on one rank and 24 on another")


class Dies(MoEModule):
    """Its process is killed in the third forward, or in the middle of the backward after it."""

    def __init__(self, moment: str) -> None:
        super().__init__()
        self.moment = moment

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == 2 and self.moment == "forward":
            os.kill(os.getpid(), signal.SIGKILL)
        if batch_idx == 2:
            self.net[3].weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return super().training_step(batch, batch_idx)


def _lose_one(rank: int, world_size: int, moment: str) -> None:
    fit(world_size, parm((1, 2, 1)), Dies(moment) if rank == 1 else MoEModule())


def _bring_fewer(rank: int, world_size: int, store: str) -> None:
    timeout = timedelta(seconds=TIMEOUT_S)  # which the strategy gives to the default group where it makes one
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    fit(world_size, parm((1, 2, 1), timeout=TIMEOUT_S), data=Data(drop=rank))


@pytest.mark.distributed
@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_a_killed_rank_is_an_error_on_the_other_not_a_hang(moment: str) -> None:
    survivor, victim = rank_outcomes(_lose_one, 2, moment, timeout=150)
    assert (victim.status, victim.exitcode) == ("died", -signal.SIGKILL)
    assert survivor.status == "raised"
    assert "Connection" in survivor.error
    assert "Rank 0 waited in vain for another" in survivor.output


@pytest.mark.distributed
def test_a_rank_with_fewer_batches_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    waiting, _ = rank_outcomes(_bring_fewer, 2, str(tmp_path / "store"), timeout=150, group=False)
    assert waiting.status == "raised"
    assert "Timed out waiting" in waiting.error
    assert "Rank 0 waited in vain for another" in waiting.output
