"""One rank of the prediction of communication: fits lines to collectives, then trains and counts what DDP sends."""

import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.dissect import Collective, CommReport, Recorder, predict_step, sweep
from lightning_efficient.dissect.events import is_collective_backend
from lightning_efficient.dissect.intervals import length, union
from tests.netlab.lab import Links

WIDTH, LAYERS, BATCH, BUCKET_MIB = 512, 6, 8, 2
WARMUP, STEPS = 3, 7


@dataclass(frozen=True)
class Prediction:
    """Seconds that a step's collectives take.

    Attributes:
        rate: of the links.
        fit: of the all-reduce.
        collectives: of a step.
        predicted_s: from the lines and the bytes.
        measured_s: during which a collective is in flight, each step.
    """

    rate: str
    fit: CommReport
    collectives: tuple[Collective, ...]
    predicted_s: float
    measured_s: list[float]

    @property
    def one_by_one_s(self) -> float:
        """Sum of the single collectives' times, which counts twice when two are in flight."""
        return sum(each.calls * each.seconds for each in self.collectives)

    @property
    def error(self) -> float:
        """Of the prediction, relative to the median of the measured steps."""
        return self.predicted_s / statistics.median(self.measured_s) - 1


def predict_and_measure(rank: int, world_size: int, links: Links, rates: list[str]) -> list[Prediction]:
    """At each rate: sweep, train a few steps with DDP, and hold the two against each other."""
    torch.manual_seed(0)
    body = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    model = DistributedDataParallel(body, bucket_cap_mb=BUCKET_MIB)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = []
    for rate in rates:
        dist.barrier()
        if rank == 0:
            links.limit(rate)
        dist.barrier()
        report = sweep(ops=["all_reduce"])  # with the sizes that a user gets
        recorder = Recorder(body, [optimizer])
        for _ in range(WARMUP):
            _step(model, optimizer)
        with recorder:
            for _ in range(STEPS):
                # Ranks begin together: waiting for a slower one is not the link's time.
                dist.barrier()
                with recorder.step():
                    _step(model, optimizer)
        collectives = recorder.result().collectives
        predicted_s = predict_step(report.fits, collectives, world_size=world_size)
        found.append(Prediction(rate, report, collectives, predicted_s, _in_flight(recorder)))
    return found


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = model(torch.randn(BATCH, WIDTH)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _in_flight(recorder: Recorder) -> list[float]:
    """For each step, the seconds in which one collective or more is in flight."""
    steps = [each for each in recorder.events if each.name == "le::step"]
    runs = [each for each in recorder.events if is_collective_backend(each.name)]
    return [1e-9 * length(union((r.start, r.end) for r in runs if step.start <= r.start < step.end)) for step in steps]
