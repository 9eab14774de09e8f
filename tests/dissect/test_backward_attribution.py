"""Backward belongs to modules: nearly all of it, in models of every kind, where Lightning's own profiler names none."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from typing_extensions import override

from lightning_efficient.dissect import Breakdown
from lightning_efficient.dissect.attribution import BUCKETS, GRAD_ACCUMULATE, UNATTRIBUTED
from tests.dissect.models import CASES, llama
from tests.dissect.steps import record, rows
from tests.support.ranks import run_ranks
from tests.support.trainers import make_trainer

ENOUGH = 0.97
"""The loss, the accumulation of gradients and the start of the engine are the rest, with rows of their own."""

RECORDINGS = 4
"""A machine that gives the processor to others adds to whichever row it interrupts; the best of a few is our own."""


def check(host: Breakdown) -> None:
    cut = rows(host)
    assert host.backward_attributed >= ENOUGH, {name: row.backward_s for name, row in cut.items() if not row.is_module}
    assert UNATTRIBUTED not in cut
    assert sum(row.total_s for row in host.rows) == pytest.approx(host.step_s, rel=1e-9)


def cut_of(name: str) -> Breakdown:
    torch.manual_seed(0)
    if name == "BERT":
        pytest.importorskip("transformers")
    case = CASES[name]()
    for _ in range(RECORDINGS):
        host = record(case.model, case.loss).host
        if host.backward_attributed >= ENOUGH:
            break
    return host


@pytest.mark.parametrize("name", CASES)
def test_nearly_all_of_backward_is_in_rows_of_modules(name: str) -> None:
    host = cut_of(name)
    check(host)
    again = {row.name for row in host.rows if row.recompute_s}
    if "checkpointing" in name:
        assert {f"model.layers.{number}.self_attn.q_proj" for number in range(4)} <= again
        assert all(each.startswith("model.layers.") for each in again)
        assert {"model.layers.0", "model.layers.3"} <= again
    else:
        assert again == set()


def on_a_rank(rank: int, world_size: int) -> Breakdown:
    torch.manual_seed(0)
    case = llama()
    model = DistributedDataParallel(case.model)
    recordings = [record(model, case.loss, warmup=2, watched=case.model).host for _ in range(RECORDINGS)]
    return max(recordings, key=attributed_beside_buckets)


def attributed_beside_buckets(host: Breakdown) -> float:
    """Share of modules in backward without the accumulation of gradients and their copies into buckets and back."""
    whole = sum(row.backward_s for row in host.rows if row.name not in (GRAD_ACCUMULATE, BUCKETS))
    return sum(row.backward_s for row in host.rows if row.is_module) / whole


@pytest.mark.distributed
def test_it_is_so_in_data_parallel_training() -> None:
    for host in run_ranks(on_a_rank, 2):
        cut = rows(host)
        assert UNATTRIBUTED not in cut
        # Gradients are copied into buckets as they are accumulated, and back: that is no module's work.
        assert cut[BUCKETS].backward_s > 0
        assert attributed_beside_buckets(host) >= ENOUGH
        assert sum(row.total_s for row in host.rows) == pytest.approx(host.step_s, rel=1e-9)
        assert all(getattr(row, f"{phase}_s") >= 0 for row in host.rows for phase in ("backward", "communication"))


class Two(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()  # type: ignore[no-any-return]

    @override
    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_lightnings_profiler_gives_none_of_it_to_modules(tmp_path: Path) -> None:
    shares = module_share_of_lightnings_profiler(Two(), [torch.ones(256, 64)] * 8, tmp_path)
    assert shares == (1.0, 0.0)


def module_share_of_lightnings_profiler(module: pl.LightningModule, batches: Any, folder: Path) -> tuple[float, float]:
    """Shares of forward and of backward events of matrix products that lie in a range of a module."""
    profiler = PyTorchProfiler(dirpath=str(folder), filename="torch", record_module_names=True, export_to_chrome=False)
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)
    make_trainer(1, precision=32, profiler=profiler, max_epochs=1).fit(module, loader)
    events = profiler.function_events
    ranges = [each for each in events if each.name.startswith("[pl][module]")]
    products = [each for each in events if each.name in ("aten::mm", "aten::addmm")]
    nodes = [each for each in events if each.name.startswith("autograd::engine::evaluate_function")]

    def inside(event: Any, around: Any) -> bool:
        return any(
            each.thread == event.thread
            and each.time_range.start <= event.time_range.start
            and event.time_range.end <= each.time_range.end
            for each in around
        )

    backward = [each for each in products if inside(each, nodes)]
    forward = [each for each in products if each not in backward]
    assert forward
    assert backward
    share = [sum(inside(each, ranges) for each in part) / len(part) for part in (forward, backward)]
    return share[0], share[1]
