"""Tokens per second of a whole mixture of experts, trained by the recipe `moe/parm` over slow links.

Four real ranks on two nodes, with a link of 200 Mbit/s between the nodes and none inside. The same recipe runs with the
order of DeepSpeed, the paper's baseline, and `auto`, in turn, in one set of processes, several times; the first steps
of each run, in which `auto` measures and chooses, do not count. Needs root and iproute2.

    python -m tests.benchmarks.parm_end_to_end
    python -m tests.benchmarks.parm_end_to_end --quick     # few steps, prints, writes nothing
"""

import argparse
import datetime
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_efficient.cli.efficient_cli import EfficientCLI
from lightning_efficient.moe import moe_layers
from lightning_efficient.strategies import ParmStrategy
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.pages import write_page
from tests.netlab import Lab
from tests.netlab.lab import INTERFACE
from tests.support.ranks import run_ranks

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "parm_end_to_end_2core_cpu_202611"
BASELINE = "deepspeed"
SCHEDULES = [BASELINE, "paper", "auto"]
WORLD_SIZE = 4
# The recipe's model, wider: a layer's rows, not its overhead, are what the link carries.
MODEL = {"hidden_size": 256, "expert_size": 512, "capacity_factor": 1.25}
BATCH = {"batch_size": 8, "block_size": 128}


@dataclass(frozen=True, slots=True)
class Run:
    """One fit.

    Attributes:
        schedule: as the recipe was told.
        seconds: of each step that counts; the slowest rank's.
        losses: of every step, on rank 0.
        chosen: the schedule that ran.
    """

    schedule: str
    seconds: list[float]
    losses: list[float]
    chosen: str


class Watch(Callback):
    """The clock and the losses."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        self.ends.append(time.perf_counter())
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def fit(schedule: str, steps: int, warmup: int) -> Run:
    """Train as the recipe says, on this rank."""
    watch = Watch()
    model = [f"--model.{name}={value}" for name, value in MODEL.items()]
    data = [f"--data.{name}={value}" for name, value in BATCH.items()]
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    cli = EfficientCLI(
        args=[
            "fit",
            "-c=moe/parm",
            f"--trainer.strategy.schedule={schedule}",
            f"--trainer.max_steps={steps}",
            "--trainer.limit_val_batches=0",
            *(f"--trainer.{name}=false" for name in quiet),
            *model,
            *data,
        ],
        trainer_defaults={"callbacks": [watch]},
    )
    strategy = cli.trainer.strategy
    assert isinstance(strategy, ParmStrategy)
    seconds = [after - before for before, after in zip(watch.ends, watch.ends[1:], strict=False)][warmup - 1 :]
    everyone: list[list[float]] = [[] for _ in range(WORLD_SIZE)]
    dist.all_gather_object(everyone, seconds)
    return Run(schedule, [max(each) for each in zip(*everyone, strict=True)], watch.losses, _chosen(cli.model))


def _chosen(module: pl.LightningModule) -> str:
    return ", ".join(sorted({layer.stats.schedule.label for _, layer in moe_layers(module) if layer.stats}))


def on_rank(rank: int, world_size: int, rounds: int, steps: int, warmup: int) -> list[Run]:
    """All fits of a rank, in turn; what the command line writes goes with the folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        return [fit(schedule, steps, warmup) for _ in range(rounds) for schedule in SCHEDULES]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps; prints, writes nothing")
    parser.add_argument("--rounds", type=int, default=3, help="fits of each schedule (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of each fit (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps that do not count (%(default)s)")
    parser.add_argument("--rate", default="200mbit", help="of the link of each node (%(default)s)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.steps, options.warmup = 1, 5, 2
    with Lab(2, rate=options.rate) as lab:
        places = [lab.namespaces[rank // 2] for rank in range(WORLD_SIZE)]
        runs: list[Run] = run_ranks(
            on_rank,
            WORLD_SIZE,
            options.rounds,
            options.steps,
            options.warmup,
            timeout=1500,
            netns=places,
            env={"GLOO_SOCKET_IFNAME": INTERFACE},
        )[0]
    text = page(runs, options)
    print(text)
    if not options.quick:
        write_page(OUT, text, runs)


def page(runs: list[Run], options: argparse.Namespace) -> str:
    """The table: medians within a fit, and ratios of fits of one round."""
    tokens = BATCH["batch_size"] * BATCH["block_size"] * 2  # MP = 2: two groups of ranks with different tokens
    by_round = [runs[begin : begin + len(SCHEDULES)] for begin in range(0, len(runs), len(SCHEDULES))]
    rows = []
    for number, schedule in enumerate(SCHEDULES):
        seconds = [statistics.median(each[number].seconds) for each in by_round]
        ratios = [statistics.median(each[0].seconds) / statistics.median(each[number].seconds) for each in by_round]
        chosen = "; ".join(sorted({each[number].chosen for each in by_round}))
        apart = max(
            abs(mine - theirs)
            for each in by_round
            for mine, theirs in zip(each[number].losses, each[0].losses, strict=True)
        )
        rows.append(
            f"| `{schedule}` | {chosen} | {statistics.median(seconds) * 1e3:.0f} "
            f"| {tokens / statistics.median(seconds):.0f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} | {apart:.1e} |"
        )
    return "\n".join(
        [
            "# A mixture of experts, end to end over slow links",
            "",
            f"Measured {datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()} on {describe_machine()}.",
            "",
            "```",
            f"python -m tests.benchmarks.parm_end_to_end --rounds {options.rounds} --steps {options.steps} "
            f"--warmup {options.warmup} --rate {options.rate}",
            "```",
            "",
            f"The recipe `moe/parm` on 4 ranks of two nodes, {options.rate} for each node's link and no limit inside; "
            f"MP = EP = ESP = 2, {MODEL}, {BATCH} for each rank. Medians over steps {options.warmup + 1} to "
            f"{options.steps} of each fit, and over {options.rounds} rounds; the speed-up is over `{BASELINE}` in the "
            "same round. The last column is the largest difference of any step's loss from that of `deepspeed`: "
            "`auto` may split tokens before the gate, and then other tokens find no slot.",
            "",
            "| schedule | ran as | ms per step | tokens per second | speed-up | over rounds | losses differ by |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
