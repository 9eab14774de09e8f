"""`Dissect` on several ranks: collectives as DDP issued them, who prints, and which rank lags in what."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_efficient.callbacks import Dissect
from lightning_efficient.dissect import Collective, DissectReport, Recorder, read_json
from tests.dissect.steps import rows
from tests.support.ranks import run_ranks
from tests.support.trainers import logged_lines, make_trainer

pytestmark = pytest.mark.distributed

SIZE, STEPS = 64, 12
REST_S = 0.03


class Net(pl.LightningModule):
    """Three layers; a rank may rest in the second one.

    Args:
        rest_s: seconds that rank 1 rests.
    """

    def __init__(self, *, rest_s: float = 0.0) -> None:
        super().__init__()
        self.rest_s = rest_s
        self.net = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
        self.buckets: list[int] = []

    @override
    def on_train_start(self) -> None:
        self.net[1].register_forward_pre_hook(self.rest)

    def rest(self, *call: Any) -> None:
        if self.global_rank == 1:
            time.sleep(self.rest_s)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()  # type: ignore[no-any-return]

    @override
    def on_train_end(self) -> None:
        data = self.trainer.strategy.model._get_ddp_logging_data()  # type: ignore[union-attr,operator]
        sizes = data.get("rebuilt_bucket_sizes") or data["bucket_sizes"]
        self.buckets = [int(each) for each in sizes.split(",")]

    @override
    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Fit:
    report: DissectReport
    buckets: list[int]
    lines: list[str]
    hooks: int


def dissected(rank: int, world_size: int, folder: str, rest_s: float = 0.0, **kwargs: Any) -> Fit:
    callback = Dissect(1, 2, dissect=2, memory=1, out=folder)
    module = Net(rest_s=rest_s)
    trainer = make_trainer(world_size, precision=32, max_epochs=1, callbacks=[callback], **kwargs)
    torch.manual_seed(rank)
    count = STEPS * int(kwargs.get("accumulate_grad_batches", 1))
    with logged_lines() as lines:
        trainer.fit(module, DataLoader(torch.randn(4 * count, SIZE), batch_size=4))  # type: ignore[arg-type]
    assert callback.report is not None
    hooks = sum(len(each._forward_hooks) for each in module.modules())
    return Fit(callback.report, module.buckets, lines, hooks)


def small_buckets(rank: int, world_size: int, folder: str, batches: int) -> Fit:
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(bucket_cap_mb=0.02, process_group_backend="gloo")  # type: ignore[arg-type]
    return dissected(rank, world_size, folder, strategy=strategy, accumulate_grad_batches=batches)


def compressed(rank: int, world_size: int, folder: str) -> Fit:
    return dissected(rank, world_size, folder, strategy="acp_sgd")


def of_kind(report: DissectReport, op: str) -> list[Collective]:
    return [each for each in report.collectives if each.op == op]


@pytest.mark.parametrize("batches", [1, 3], ids=["each batch a step", "three batches a step"])
def test_all_reduces_are_ddps_buckets(batches: int, tmp_path: Path) -> None:
    for fit in run_ranks(small_buckets, 2, str(tmp_path), batches):
        assert len(fit.buckets) >= 2
        # Once for each bucket in a step, however many batches it has.
        reduced = of_kind(fit.report, "all_reduce")
        assert sum(each.calls for each in reduced) == len(fit.buckets)
        sizes = sorted(size for each in reduced for size in [each.n_bytes] * round(each.calls))
        assert sizes == sorted(fit.buckets)
        assert fit.report.host is not None
        assert rows(fit.report.host)["net.0"].calls == batches
        assert fit.report.throughput.micro_batches_per_step == batches
        assert fit.hooks == 0


def test_a_compressing_hook_sends_what_it_sends(tmp_path: Path) -> None:
    plain = 4 * 3 * (SIZE * SIZE + SIZE)
    for fit in run_ranks(compressed, 2, str(tmp_path)):
        sent = sum(each.calls * each.n_bytes for each in of_kind(fit.report, "all_reduce"))
        # Rank 4: of each matrix one of its two factors, and the vectors as they are.
        assert sent == pytest.approx(4 * 3 * (4 * SIZE + SIZE), rel=0.1)
        assert sent < plain / 8


def test_the_slow_rank_is_named_with_its_row_and_only_rank_0_prints(tmp_path: Path) -> None:
    fits = run_ranks(slow, 2, str(tmp_path))
    for fit in fits:
        late = fit.report.straggler
        assert late is not None
        assert late.rank == 1
        assert late.row == "net.1"
        assert late.row_behind_s == pytest.approx(REST_S, abs=0.02)
        first, second = fit.report.ranks
        assert second.forward_s - first.forward_s > REST_S / 2
        # The other waits for it, and waiting is no work.
        assert first.communication_s > REST_S / 2
        assert first.busy_s < second.busy_s
        assert fit.report.machine.world_size == 2
    assert fits[0].report.throughput.samples_per_s == fits[1].report.throughput.samples_per_s
    assert fits[0].report.host != fits[1].report.host
    printed = [sum("is slow" in line for line in fit.lines) for fit in fits]
    assert printed == [1, 0]
    assert read_json(DissectReport, tmp_path / "dissect.json") == fits[0].report


def slow(rank: int, world_size: int, folder: str) -> Fit:
    return dissected(rank, world_size, folder, REST_S, strategy="ddp")


def every_collective(rank: int, world_size: int) -> dict[tuple[str, int], float]:
    x, many = torch.ones(500), torch.ones(500 * world_size)
    recorder = Recorder(nn.Linear(1, 1))
    with recorder, recorder.step():
        dist.all_reduce(x)
        dist.broadcast(x, 0)
        dist.reduce_scatter_tensor(x, many)
        dist.all_gather_into_tensor(many, x)
        dist.all_to_all_single(torch.empty_like(many), many)
        dist.reduce(x, 0)
        dist.barrier()
    with recorder:
        dist.all_reduce(x)  # outside of a step
    return {(each.op, each.n_bytes): each.calls for each in recorder.result().collectives}


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_are_what_was_called(world_size: int) -> None:
    for found in run_ranks(every_collective, world_size):
        assert found.pop(("barrier", 1)) == 1  # gloo hands a byte round
        assert found == {
            ("all_reduce", 2000): 1,
            ("broadcast", 2000): 1,
            ("reduce_scatter", 2000 * world_size): 1,
            ("all_gather", 2000): 1,
            ("all_to_all", 2000 * world_size): 1,
            ("reduce", 2000): 1,
        }
