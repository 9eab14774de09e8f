"""Dissect on a model whose parameters are sharded over ranks (FSDP2), and the type that a peak is looked up for."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_efficient.callbacks import Dissect
from lightning_efficient.callbacks.dissect_report import _compute_dtype
from lightning_efficient.data import SyntheticTokens
from lightning_efficient.dissect import DissectReport
from lightning_efficient.models import LlamaLM
from lightning_efficient.strategies import FullyShardedStrategy
from tests.support.ranks import run_ranks


def dissected(rank: int, world_size: int, strategy: str, folder: str) -> DissectReport:
    dissect = Dissect(0, 2, dissect=2, print_report=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=FullyShardedStrategy() if strategy == "sharded" else strategy,
        max_steps=dissect.steps_needed,
        callbacks=[dissect],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    pl.seed_everything(0, verbose=False)
    data = SyntheticTokens(vocab_size=64, block_size=16, batch_size=2, num_train_tokens=4096, num_val_tokens=64)
    trainer.fit(LlamaLM(hidden_size=32, ffn_size=64, num_layers=2, num_heads=2, vocab_size=64), data)
    assert dissect.report is not None
    return dissect.report


@pytest.mark.distributed
@pytest.mark.slow
def test_a_sharded_model_is_cut_into_the_same_modules(tmp_path: Path) -> None:
    sharded = run_ranks(dissected, 2, "sharded", str(tmp_path), timeout=100)
    whole = run_ranks(dissected, 2, "ddp", str(tmp_path), timeout=100)

    def modules(report: DissectReport) -> set[str]:
        assert report.host is not None
        return {row.name for row in report.host.rows if row.is_module and row.calls}

    assert modules(sharded[0]) == modules(whole[0])
    for report in sharded:
        assert report.host is not None
        assert sum(row.total_s for row in report.host.rows) == pytest.approx(report.host.step_s)
        assert {each.op for each in report.collectives} >= {"all_gather", "reduce_scatter"}
    # Half of the parameters on each rank, up to the padding of what two ranks do not divide.
    assert sharded[0].memory.parameter_bytes == pytest.approx(whole[0].memory.parameter_bytes / 2, rel=0.05)
    assert sharded[0].memory.optimizer_bytes < 0.6 * whole[0].memory.optimizer_bytes
    assert sharded[0].flops.model_per_step == whole[0].flops.model_per_step


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16), ("64", torch.float64)],
)
def test_the_peak_is_that_of_the_type_that_computes(precision: Any, dtype: torch.dtype) -> None:
    assert _compute_dtype(pl.Trainer(accelerator="cpu", precision=precision, logger=False)) is dtype


def test_a_plugin_that_says_its_type_is_believed_before_its_name() -> None:
    class Quantized(pl.plugins.Precision):  # type: ignore[name-defined]  # as BitsandbytesPrecision, which needs CUDA
        precision = "32-true"
        dtype = torch.bfloat16

    class Unknown(pl.plugins.Precision):  # type: ignore[name-defined]
        precision = "transformer-engine"

    assert _compute_dtype(pl.Trainer(accelerator="cpu", plugins=[Quantized()], logger=False)) is torch.bfloat16
    assert _compute_dtype(pl.Trainer(accelerator="cpu", plugins=[Unknown()], logger=False)) is None
