"""What `Dissect` costs: its clean steps against none, Lightning's profilers beside it, and the reading of a record.

    python -m tests.benchmarks.dissect_overhead             # about three minutes on one core
    python -m tests.benchmarks.dissect_overhead --quick     # a look

Two trainings of the same model, one with `Dissect` in its clean window and one without, take turns step by step in one
process. The time of a step is all that its thread does from one batch to the next, callbacks included.
"""

import argparse
import datetime
import json
import logging
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_efficient.callbacks import Dissect
from lightning_efficient.dissect import Recorder, attribute
from lightning_efficient.models import Llama, LlamaConfig
from tests.benchmarks.machine import describe_machine
from tests.support.trainers import make_trainer

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "dissect_overhead_2core_cpu_202611"
WARMUP = 10
VOCAB, LENGTH = 256, 64
PROFILERS = (None, "simple", "advanced", "pytorch")


class Model(pl.LightningModule):
    """A Llama of 4 layers; a small one, which makes what a callback does per step weigh more.

    Args:
        width: its hidden size.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Llama(
            LlamaConfig(
                vocab_size=VOCAB, hidden_size=width, ffn_size=2 * width, num_layers=4, num_heads=4, max_seq_len=LENGTH
            )
        )

    @override
    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    @override
    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=1e-4)


@dataclass
class TakingTurns:
    """Batches for several trainings, of which one runs at a time.

    Attributes:
        batches: that each training gets.
        wall: seconds of every step, by training.
        cpu: seconds that its thread computed.
    """

    batches: int
    trainings: int = 2
    wall: list[list[float]] = field(default_factory=lambda: [[], []])
    cpu: list[list[float]] = field(default_factory=lambda: [[], []])
    turn: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def hand_over(self, me: int) -> None:
        with self.changed:
            self.turn = (me + 1) % self.trainings
            self.changed.notify_all()

    def wait_for(self, me: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.turn == me, timeout=120):
                raise TimeoutError("the other training does not hand over")


class Turns:
    """The batches of one training."""

    def __init__(self, shared: TakingTurns, me: int, rows: int) -> None:
        self.shared, self.me = shared, me
        self.ids = torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return self.shared.batches

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.shared.batches):
            self.shared.wait_for(self.me)
            wall, cpu = time.perf_counter(), time.thread_time()
            yield self.ids
            if number >= WARMUP:
                self.shared.wall[self.me].append(time.perf_counter() - wall)
                self.shared.cpu[self.me].append(time.thread_time() - cpu)
            self.shared.hand_over(self.me)


def fit(module: pl.LightningModule, data: Any, callbacks: list[Callback], **kwargs: Any) -> float:
    """Train one epoch; returns seconds."""
    begun = time.perf_counter()
    make_trainer(1, precision=32, max_epochs=1, callbacks=callbacks, **kwargs).fit(module, data)
    return time.perf_counter() - begun


@dataclass(frozen=True)
class CleanCost:
    """Medians over the steps, with and without; the ratio is of the CPU times of neighbouring steps, its median."""

    width: int
    steps: int
    without_ms: float
    with_ms: float
    without_cpu_ms: float
    with_cpu_ms: float
    paired_ratio: float


def clean_cost(width: int, steps: int, folder: str) -> CleanCost:
    shared = TakingTurns(steps + WARMUP + 1)
    measuring = Dissect(WARMUP - 1, steps, dissect=0, memory=0, out=folder, print_report=False)
    callbacks: list[list[Callback]] = [[], [measuring]]

    def train(me: int) -> None:
        try:
            fit(Model(width), Turns(shared, me, 4), callbacks[me])
        finally:
            shared.hand_over(me)  # nobody asks for a batch after the last

    threads = [threading.Thread(target=train, args=(me,)) for me in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert measuring.report is not None
    median = statistics.median
    return CleanCost(
        width,
        steps,
        1e3 * median(shared.wall[0]),
        1e3 * median(shared.wall[1]),
        1e3 * median(shared.cpu[0]),
        1e3 * median(shared.cpu[1]),
        median(b / a for a, b in zip(shared.cpu[0], shared.cpu[1], strict=True)),
    )


def profiler_costs(width: int, steps: int, rounds: int, folder: str) -> dict[str, float]:
    """Whole fits with Lightning's profilers and with a whole `Dissect`, over one without: medians of the rounds."""
    seconds: dict[str, list[float]] = {}
    data: Any = DataLoader(torch.randint(0, VOCAB, (4 * steps, LENGTH)), batch_size=4)  # type: ignore[arg-type]
    for round_ in range(rounds + 1):
        for profiler in PROFILERS:
            took = fit(Model(width), data, [], profiler=profiler, default_root_dir=folder)
            seconds.setdefault(profiler or "none", []).append(took)
        dissect = Dissect(5, steps - 8, out=folder, print_report=False)
        seconds.setdefault("Dissect, all of it", []).append(fit(Model(width), data, [dissect]))
        if round_ == 0:
            seconds.clear()
    return {
        name: statistics.median(a / b for a, b in zip(took, seconds["none"], strict=True))
        for name, took in seconds.items()
    }


@dataclass(frozen=True)
class Reading:
    """How long it takes to read a record."""

    events: int
    seconds: float

    @property
    def per_100k(self) -> float:
        """Seconds for a hundred thousand events."""
        return 1e5 * self.seconds / self.events


def reading() -> Reading:
    """Stop a profiler that saw many small operators, and cut the record into rows."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4)) for _ in range(100)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    recorder, x = Recorder(model, [optimizer]), torch.ones(2, 4)
    recorder.start()
    for _ in range(16):
        with recorder.step():
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    begun = time.perf_counter()
    recorder.stop()
    attribute(recorder.events, recorder.ranges.describe())
    return Reading(len(recorder.events), time.perf_counter() - begun)


def report(clean: list[CleanCost], profilers: dict[str, float], read: Reading, command: str, steps: int) -> str:
    """The page."""
    lines = [
        "# What Dissect costs",
        "",
        f"Command: `{command}`",
        "",
        f"Machine: {describe_machine()}, one thread. Date: {datetime.date.today().isoformat()}",
        "",
        "## Clean steps, with the callback and without",
        "",
        "Two trainings of a Llama of 4 layers (4 x 64 tokens, AdamW) take turns step by step. Medians; CPU time is the "
        "training's thread's. The last column is the median ratio of the CPU times of neighbouring steps.",
        "",
        "| hidden size | steps | without, ms | with, ms | without, ms CPU | with, ms CPU | with / without |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {c.width} | {c.steps} | {c.without_ms:.2f} | {c.with_ms:.2f} | {c.without_cpu_ms:.2f} "
            f"| {c.with_cpu_ms:.2f} | {c.paired_ratio:.4f} |"
            for c in clean
        ),
        "",
        f"## A whole fit of {steps} steps, over one without any profiler",
        "",
        "Hidden size 256. Dissect profiles 2 of the steps and counts in one; the others are warm-up and clean.",
        "",
        "| profiler | whole fit |",
        "|---|---|",
        *(f"| {name} | {ratio:.2f} |" for name, ratio in profilers.items()),
        "",
        "## Reading a record",
        "",
        f"{read.events:,} events of 16 steps of a net of 400 small modules: {read.seconds:.2f} s to stop the profiler "
        f"and cut the record into rows, {read.per_100k:.2f} s for 100,000 events.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the Markdown and JSON files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps; prints, writes nothing")
    parser.add_argument("--out", type=Path, default=OUT, help="path of the results without suffix")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    steps, rounds = (30, 1) if args.quick else (200, 5)
    with tempfile.TemporaryDirectory() as folder:
        clean = [clean_cost(width, steps, folder) for width in (64, 256)]
        fit_steps = 28
        # The tables that Lightning's profilers print are part of what they cost, and nothing to look at here.
        profilers = profiler_costs(256, fit_steps, rounds, folder)
    read = reading()
    text = report(clean, profilers, read, "python -m tests.benchmarks.dissect_overhead", fit_steps)
    print(text)
    if not args.quick:
        args.out.with_suffix(".md").write_text(text)
        values = {
            "clean": [asdict(each) for each in clean],
            "whole_fit_ratio": profilers,
            "reading": {**asdict(read), "seconds_per_100k": read.per_100k},
        }
        args.out.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
