"""CompressionMonitor: its numbers are right, come when they should, and nothing is measured in between."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_efficient.callbacks import CompressionMonitor
from lightning_efficient.compression import ACPSGD, Compressor, Observation, SignSGD
from lightning_efficient.strategies import CompressedDDPStrategy
from tests.compression.harness import recorded_warnings
from tests.compression.reference import initial_basis
from tests.support.ranks import run_ranks
from tests.support.trainers import logged_lines, make_trainer

ROWS, COLS, RANK, STEPS = 24, 20, 3, 7
MATRIX, BIAS = ROWS * COLS, 5


class Known(pl.LightningModule):
    """Its gradients are the batch: the loss is the sum of the weights times it."""

    def __init__(self, *, optimizers: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ROWS, COLS, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(BIAS, dtype=torch.float64))
        self.automatic_optimization = optimizers == 1
        self.count = optimizers

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self.weight * batch[0].mean(0)).sum() + self.bias.sum()

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        return None

    @override
    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return [torch.optim.SGD([p], lr=0.1) for p in (self.weight, self.bias)]


def gradients(rank: int, count: int) -> Tensor:
    """This rank's gradient in each step, of shape (count, ROWS, COLS)."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, ROWS, COLS, generator=generator, dtype=torch.float64)


class CountsObservations(ACPSGD):
    observed: int = 0

    @override
    def observe(self) -> Observation:
        self.observed += 1
        return super().observe()


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a run: the logger's rows, the closing lines, and how often the compressor was observed."""

    rows: list[dict[str, float]]
    lines: list[str]
    observed: int


def watch(
    world_size: int,
    rank: int,
    folder: Path,
    *,
    every: int,
    compressor: Compressor | None = None,
    accumulate: int = 1,
    optimizers: int = 1,
) -> Seen:
    compressor = compressor or CountsObservations(rank=RANK)
    data = DataLoader(TensorDataset(gradients(rank, STEPS * accumulate)), batch_size=1)
    trainer = make_trainer(
        world_size,
        strategy=CompressedDDPStrategy(compressor),
        callbacks=[CompressionMonitor(every_n_steps=every)],
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=10_000,  # the monitor keeps its own time
        accumulate_grad_batches=accumulate,
        max_epochs=1,
    )
    with logged_lines() as lines:
        trainer.fit(Known(optimizers=optimizers), data)
    rows = _read(folder / "metrics.csv") if rank == 0 else []
    closing = [line for line in lines if line.startswith("CompressionMonitor")]
    return Seen(rows, closing, getattr(compressor, "observed", 0))


def _read(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _runs(rank: int, world_size: int, folder: str) -> dict[str, Seen]:
    home = Path(folder)
    return {
        "every 3": watch(world_size, rank, home / "3", every=3),
        "accumulating": watch(world_size, rank, home / "a", every=1, accumulate=2),
        "two optimizers": watch(world_size, rank, home / "o", every=4, optimizers=2),
        "signs": watch(world_size, rank, home / "s", every=3, compressor=SignSGD()),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Seen]]:
    return run_ranks(_runs, 2, str(tmp_path_factory.mktemp("logs")))


def steps(seen: Seen) -> list[int]:
    return [int(row["step"]) for row in seen.rows]


@pytest.mark.distributed
def test_it_logs_at_its_own_pace_and_measures_nothing_in_between(seen: list[dict[str, Seen]]) -> None:
    assert steps(seen[0]["every 3"]) == [3, 6]
    # Step 7 was not due, so it was not observed either.
    assert [rank["every 3"].observed for rank in seen] == [2, 2]


@pytest.mark.distributed
def test_bytes_follow_from_the_shapes(seen: list[dict[str, Seen]]) -> None:
    # P, Q, P: the factor in turns, with the bias and one flag, in float64.
    p, q = (8 * (size * RANK + BIAS + 1) for size in (ROWS, COLS))
    for row, sent in zip(seen[0]["every 3"].rows, (2 * p + q, 2 * q + p), strict=True):
        assert row["compression/bytes_per_step"] == pytest.approx(sent / 3)
        assert row["compression/ratio"] == pytest.approx(3 * 8 * (MATRIX + BIAS) / sent)


@pytest.mark.distributed
def test_energy_and_residual_are_those_of_the_known_gradients(seen: list[dict[str, Seen]]) -> None:
    """Rank 0's own error, recomputed matrix by matrix from both ranks' gradients."""
    own = [gradients(rank, STEPS) for rank in (0, 1)]
    errors = [torch.zeros(ROWS, COLS, dtype=torch.float64)] * 2
    basis, sends_p, expected = initial_basis("weight", COLS, RANK), True, {}
    for step in range(1, STEPS + 1):
        corrected = [g[step - 1] + e for g, e in zip(own, errors, strict=True)]
        sent = [a @ basis @ basis.T if sends_p else basis @ basis.T @ a for a in corrected]
        factors = [a @ basis if sends_p else a.T @ basis for a in corrected]
        errors = [a - s for a, s in zip(corrected, sent, strict=True)]
        basis, sends_p = torch.linalg.qr(factors[0] + factors[1]).Q, not sends_p
        expected[step] = (float(sent[0].square().sum() / corrected[0].square().sum()), float(errors[0].norm()))
    for row in seen[0]["every 3"].rows:
        energy, residual = expected[int(row["step"])]
        assert row["compression/captured_energy"] == pytest.approx(energy, rel=1e-12)
        assert row["compression/residual_norm"] == pytest.approx(residual, rel=1e-12)


@pytest.mark.distributed
def test_exposed_time_is_a_time(seen: list[dict[str, Seen]]) -> None:
    assert all(0 <= row["compression/exposed_ms"] < 60_000 for row in seen[0]["every 3"].rows)


@pytest.mark.distributed
def test_accumulated_batches_are_no_steps(seen: list[dict[str, Seen]]) -> None:
    run = seen[0]["accumulating"]
    assert steps(run) == list(range(1, STEPS + 1))
    assert all(row["compression/bytes_per_step"] > 0 for row in run.rows)
    assert run.observed == STEPS


@pytest.mark.distributed
def test_several_optimizers_skip_no_entry(seen: list[dict[str, Seen]]) -> None:
    # Two steps a batch: the entry due at 4 comes with the batch that begins there, and so on.
    assert steps(seen[0]["two optimizers"]) == [6, 10, 14]


@pytest.mark.distributed
def test_a_method_without_error_has_no_energy(seen: list[dict[str, Seen]]) -> None:
    for row in seen[0]["signs"].rows:
        assert not {"compression/captured_energy", "compression/residual_norm"} & row.keys()
        assert row["compression/ratio"] > 1


@pytest.mark.distributed
def test_the_closing_line_is_said_once(seen: list[dict[str, Seen]]) -> None:
    (line,) = seen[0]["every 3"].lines
    energies = [row["compression/captured_energy"] for row in seen[0]["every 3"].rows]
    assert f"captured energy {math.fsum(energies) / len(energies):.1%}" in line
    assert seen[1]["every 3"].lines == []


def _under_plain_ddp(rank: int, world_size: int) -> tuple[list[str], int, dict[str, float]]:
    monitor = CompressionMonitor(every_n_steps=1)
    trainer = make_trainer(world_size, strategy="ddp", max_epochs=1, callbacks=[monitor])
    with recorded_warnings() as messages:
        trainer.fit(Known(), DataLoader(TensorDataset(gradients(rank, 2)), batch_size=1))
    return [m for m in messages if "CompressionMonitor" in m], trainer.global_step, monitor.stats


@pytest.mark.distributed
def test_without_compression_it_warns_once_and_lets_training_run() -> None:
    said = []
    for messages, steps, stats in run_ranks(_under_plain_ddp, 2):
        said += messages
        assert steps > 0
        assert stats == {}
    (message,) = said  # by rank 0 alone
    assert "found DDPStrategy" in message
    assert "strategy='acp_sgd'" in message


@pytest.mark.parametrize("every", [0, -3])
def test_an_interval_below_one_is_refused(every: int) -> None:
    with pytest.raises(ValueError, match=f"every_n_steps is {every}"):
        CompressionMonitor(every_n_steps=every)
