"""Each strategy, in a setting where it must be exact, gives the weights of one process on the joined batch."""

import os
import signal

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from typing_extensions import override

from lightning_efficient.compression import ACPSGD, TopK
from lightning_efficient.strategies import CompressedDDPStrategy
from tests.conformance.oracle import Regression, Setting, StrategyMaker, train_rank, train_reference, worst_difference
from tests.support.ranks import rank_outcomes, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.conformance]

# Sums of 8 float64 terms in another order, over 6 steps: a few 1e-16; a missing exchange shows as 1e-2.
TOLERANCE = 1e-12


class NeverCommunicates(DDPStrategy):
    """Passes Lightning's own suite."""

    @override
    def configure_ddp(self) -> None:
        pass


def plain_ddp() -> str:
    return "ddp"


def plain_ddp_with_unused() -> str:
    return "ddp_find_unused_parameters_true"


def never() -> Strategy:
    return NeverCommunicates()


def always_warming_up() -> Strategy:
    return CompressedDDPStrategy(ACPSGD(warmup_steps=1000), find_unused_parameters=True)


def nothing_compressed() -> Strategy:
    return CompressedDDPStrategy(ACPSGD(exclude=["*"]), find_unused_parameters=True)


def every_element_kept() -> Strategy:
    return CompressedDDPStrategy(TopK(density=1.0), find_unused_parameters=True)


EXACT: list[StrategyMaker] = [plain_ddp_with_unused, always_warming_up, nothing_compressed, every_element_kept]
SETTINGS = {
    "plain": Setting(),
    "ranks start apart": Setting(seed_by_rank=True),
    "accumulation": Setting(accumulate=2),
    "unused parameter": Setting(unused=True, seed_by_rank=True),
}


def _name(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_oracle_passes_lightnings_own_ddp(world_size: int) -> None:
    results = run_ranks(train_rank, world_size, plain_ddp, Setting())
    assert all(worst_difference(result, train_reference(Setting())) < TOLERANCE for result in results)


def test_the_oracle_fails_a_strategy_that_never_communicates() -> None:
    results = run_ranks(train_rank, 2, never, Setting())
    assert min(worst_difference(result, train_reference(Setting())) for result in results) > 1e-3


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("strategy", EXACT, ids=_name)
def test_two_ranks_equal_one_process_on_the_joined_batch(strategy: StrategyMaker, setting: Setting) -> None:
    reference = train_reference(setting)
    for result in run_ranks(train_rank, 2, strategy, setting):
        assert worst_difference(result, reference) < TOLERANCE


@pytest.mark.parametrize("strategy", EXACT, ids=_name)
def test_bf16_mixed_keeps_the_ranks_bit_identical(strategy: StrategyMaker) -> None:
    setting = Setting(precision="bf16-mixed")
    first, second = run_ranks(train_rank, 2, strategy, setting)
    assert worst_difference(first, second) == 0.0
    # bfloat16 has 8 bits: the trajectory is near the exact one, not on it.
    assert 0.0 < worst_difference(first, train_reference(setting)) < 0.05


class DiesInBackward(Regression):
    """Its process is killed in the middle of the fourth backward."""

    @override
    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 3:
            loss.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return loss


def _one_dies_in_backward(rank: int, world_size: int, strategy: StrategyMaker) -> None:
    train_rank(rank, world_size, strategy, Setting(), model_class=DiesInBackward if rank == 1 else Regression)


@pytest.mark.parametrize("strategy", [plain_ddp, always_warming_up], ids=_name)
def test_a_rank_killed_in_backward_is_an_error_on_the_others_not_a_hang(strategy: StrategyMaker) -> None:
    survivor, victim = rank_outcomes(_one_dies_in_backward, 2, strategy, timeout=60)
    assert (victim.status, victim.exitcode) == ("died", -signal.SIGKILL)
    assert survivor.status == "raised"
    assert "Connection" in survivor.error
    assert survivor.seconds < 60
