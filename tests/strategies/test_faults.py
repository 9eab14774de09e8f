"""Settings and accidents that would train something else than asked: each ends with an error on every rank."""

import os
import signal
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from typing_extensions import override

from lightning_efficient.compression import ACPSGD, Compressor, PowerSGD
from tests.plugins.tiny import TinyData, TinyModule
from tests.strategies.training import SMALL_BUCKETS_MB, At, fit, message_of
from tests.support.ranks import rank_outcomes, run_ranks

pytestmark = pytest.mark.distributed


class Bigger(TinyModule):
    """Has a second head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)


def _perturb(trainer: pl.Trainer, module: Any) -> None:
    if trainer.global_rank == 1:
        with torch.no_grad():
            module.net[2].weight[3, 4] += 0.5


def _refusals(rank: int, world_size: int) -> dict[str, str]:
    frozen = TinyModule().double()
    frozen.net[2].bias.requires_grad_(rank == 0)
    nan = TinyModule().double()
    return {
        "static_graph": message_of(
            world_size, ddp={"static_graph": True}, accumulate_grad_batches=2, data=TinyData(accumulate=2)
        ),
        "another layer": message_of(world_size, module=(Bigger() if rank == 1 else TinyModule()).double()),
        "frozen": message_of(world_size, module=frozen),
        "drift": message_of(world_size, ddp={"replica_check_every_n_steps": 2}, callbacks=[At([2], _perturb)]),
        "no drift": message_of(world_size, module=nan, ddp={"replica_check_every_n_steps": 1}),
    }


@pytest.fixture(scope="module")
def messages() -> list[dict[str, str]]:
    return run_ranks(_refusals, 2)


def test_static_graph_with_accumulation_names_the_issue(messages: list[dict[str, str]]) -> None:
    for rank in messages:
        assert rank["static_graph"].startswith("MisconfigurationException: static_graph=True with accumulate")
        assert "pytorch/pytorch#143580" in rank["static_graph"]


def test_parameters_that_differ_are_named_on_every_rank(messages: list[dict[str, str]]) -> None:
    for rank in messages:
        assert rank["another layer"].startswith("RuntimeError: the trainable parameters differ across ranks")
        assert "rank 0 has [nothing] where rank 1 has [head.weight: float64 (3, 3)]" in rank["another layer"]
        assert "rank 0 has [net.2.bias: float64 (14,)] where rank 1 has [net.4.weight" in rank["frozen"]


def test_replicas_that_drift_are_found_at_the_next_check(messages: list[dict[str, str]]) -> None:
    for rank in messages:
        # The weights came apart before the third step; the gradients that follow keep the other layers equal.
        assert rank["drift"].startswith("RuntimeError: the replicas have drifted apart at step 4: net.2.weight differs")
        assert "by up to 0.5 between ranks (1 of 6 parameters differ)" in rank["drift"]
        assert rank["no drift"] == "no error"


class Dies(TinyModule):
    """Its process is killed in the forward of the third batch, or in the middle of its backward."""

    def __init__(self, moment: str) -> None:
        super().__init__()
        self.moment = moment

    @override
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and self.moment == "forward":
            os.kill(os.getpid(), signal.SIGKILL)
        if batch_idx == 2:
            self.net[2].weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return loss


def _one_dies(rank: int, world_size: int, method: type[Compressor], moment: str) -> None:
    module = Dies(moment) if rank == 1 else TinyModule()
    # Several buckets: the first are on their way when the other rank is gone.
    fit(world_size, method(), module=module.double(), ddp={"bucket_cap_mb": SMALL_BUCKETS_MB})


@pytest.mark.parametrize(("method", "moment"), [(ACPSGD, "forward"), (ACPSGD, "backward"), (PowerSGD, "backward")])
def test_a_killed_rank_is_an_error_on_the_other_not_a_hang(method: type[Compressor], moment: str) -> None:
    survivor, victim = rank_outcomes(_one_dies, 2, method, moment, timeout=90)
    assert (victim.status, victim.exitcode) == ("died", -signal.SIGKILL)
    assert survivor.status == "raised"
    assert "Connection" in survivor.error
    assert survivor.seconds < 60
