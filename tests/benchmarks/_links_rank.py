"""What each rank of `compression_links` does: time the methods in turn, and count CPU time, bytes and memory."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tests.benchmarks._links_methods import Method, Trainee, Transformer, same_weights
from tests.netlab import Links, tx_bytes_here
from tests.support.collectives import Collective, count_collectives

WARM_UP_STEPS = 4
"""Buckets settle at the second step, torch's hook starts at the third, and all lazy state is there at the fourth."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        methods: Names; see `_links_methods`.
        rates: Links to set, one after the other, such as `100mbit`; None for no limit.
        repeats: Rounds through all methods for each link.
        round_seconds: What one method may take in a round; it does 1 to 20 steps, ACP-SGD an even number.
        batch: Sequences for each rank.
        tokens: Per sequence.
        layers: Of the transformer (4 makes 5.26 M parameters).
        progress: A file that grows by one line for each step of the plan.
    """

    methods: tuple[str, ...]
    rates: tuple[str | None, ...]
    repeats: int
    round_seconds: float
    batch: int
    tokens: int
    layers: int
    progress: str

    @property
    def ticks(self) -> int:
        """Lines the progress file will have."""
        return len(self.methods) * (1 + len(self.rates) * (1 + self.repeats))


@dataclass(slots=True)
class Sample:
    """Per step of one method on one link, one entry for each round: seconds, CPU seconds, bytes sent by the host."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tx_bytes: list[float] = field(default_factory=list)


@dataclass(slots=True)
class RankReport:
    """What one rank saw: samples by (link, method), and per method the collectives of two steps."""

    samples: dict[tuple[str | None, str], Sample]
    collectives: dict[str, list[Collective]]
    parameters: int


def measure_links(rank: int, world_size: int, plan: Plan, links: Links | None) -> RankReport:
    """Run the plan on this rank. Without links (no lab) the only rate may be None."""
    trainees = _trainees(rank, plan)
    tick = _Ticker(plan.progress if rank == 0 else None)
    collectives = {}
    for trainee in trainees:
        _steps(trainee, WARM_UP_STEPS)
        with count_collectives() as seen:
            _steps(trainee, 2)
        collectives[trainee.method.name] = list(seen)
        tick()
    samples = {(rate, trainee.method.name): Sample() for rate in plan.rates for trainee in trainees}
    for rate in plan.rates:
        if rank == 0 and links is not None:
            links.limit(rate)
        dist.barrier()
        counts = {}
        for trainee in trainees:
            _steps(trainee, 1)  # connections adapt to the new rate
            counts[trainee.method.name] = _agreed_count(trainee, plan)
            tick()
        for _ in range(plan.repeats):
            for trainee in trainees:  # A B C A B C ...: what disturbs the machine disturbs all
                name = trainee.method.name
                _measure(trainee, counts[name], samples[rate, name], in_lab=links is not None)
                tick()
    parameters = sum(p.numel() for p in trainees[0].ddp.parameters())
    return RankReport(samples, collectives, parameters)


def peak_memory(rank: int, world_size: int, method: str, width: int, layers: int) -> tuple[float, float]:
    """Return the peak resident MiB while training `layers` square matrices, and the MiB of their gradients."""
    with same_weights():
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)), nn.Unflatten(1, (1, -1)))
    generator = torch.Generator().manual_seed(rank)
    batch = torch.randn(4, width, generator=generator), torch.randint(width, (4,), generator=generator)
    trainee = Trainee(Method.parse(method), model, batch)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of start-up
    _steps(trainee, WARM_UP_STEPS + 2)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024, sum(p.numel() for p in model.parameters()) * 4 / 2**20


def _trainees(rank: int, plan: Plan) -> list[Trainee]:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(1024, (plan.batch, plan.tokens + 1), generator=generator)
    made = []
    for name in plan.methods:
        with same_weights():
            model = Transformer(layers=plan.layers)
        made.append(Trainee(Method.parse(name), model, (tokens[:, :-1], tokens[:, 1:])))
    return made


def _steps(trainee: Trainee, count: int) -> None:
    for _ in range(count):
        trainee.step()


def _agreed_count(trainee: Trainee, plan: Plan) -> int:
    """Steps per round, the same on all ranks."""
    began = time.perf_counter()
    trainee.step()
    seconds = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    count = min(20, max(1, round(plan.round_seconds / float(seconds))))
    # ACP-SGD sends P and Q in turn, which differ in size; an odd number would favour one.
    return count + count % 2 if trainee.method.kind == "acp_sgd" else count


def _measure(trainee: Trainee, count: int, sample: Sample, *, in_lab: bool) -> None:
    dist.barrier()
    tx = tx_bytes_here() if in_lab else 0
    cpu, began = time.process_time(), time.perf_counter()
    _steps(trainee, count)
    sample.seconds.append((time.perf_counter() - began) / count)
    sample.cpu.append((time.process_time() - cpu) / count)
    dist.barrier()  # what this rank sends late still counts
    sample.tx_bytes.append(((tx_bytes_here() if in_lab else 0) - tx) / count)


class _Ticker:
    """Tells the parent how far the ranks are."""

    def __init__(self, path: str | None) -> None:
        self._path = path

    def __call__(self) -> None:
        if self._path is not None:
            with open(self._path, "a") as file:
                file.write("\n")
