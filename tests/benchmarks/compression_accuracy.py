"""What compression does to accuracy: digits and a text Llama, at equal steps and at equal bytes, over seeds.

    python -m tests.benchmarks.compression_accuracy            # about 20 minutes on one core
    python -m tests.benchmarks.compression_accuracy --quick    # one seed, few steps, for a look

Every run is real DDP with the real hook, on one rank: with a fixed basis compression is linear, so W ranks and one rank
on the joined batch train the same weights (tests/compression/test_acp_sgd.py shows it to 1e-11), and one rank is W
times cheaper. All methods of a task share data, order, learning rate and steps; nothing is tuned per method, because
the claim is that a user changes one line.
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.compression import ACPSGD, Compressor, PowerSGD, register_compressor
from lightning_efficient.data import TextData
from lightning_efficient.models import LLAMA_PRESETS, Llama, LlamaConfig
from tests.benchmarks import digits as digits_task
from tests.benchmarks.machine import describe_machine

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "compression_accuracy_2core_cpu_202611"

MakeCompressor = Callable[[], Compressor] | None


@dataclass(frozen=True, slots=True)
class Run:
    """One training: `score` is test accuracy in percent (digits) or validation loss in nats per byte (text)."""

    task: str
    method: str
    seed: int
    steps: int
    score: float
    bytes_per_step: float


def methods(ranks: list[int]) -> dict[str, MakeCompressor]:
    """Plain DDP, Power-SGD at each rank, ACP-SGD at each rank and its double, and what the docs warn of."""
    table: dict[str, MakeCompressor] = {"plain DDP": None}
    for rank in ranks:
        table[f"Power-SGD rank {rank}"] = lambda rank=rank: PowerSGD(rank)  # type: ignore[misc]
    for rank in sorted({*ranks, *(2 * rank for rank in ranks)}):
        table[f"ACP-SGD rank {rank}"] = lambda rank=rank: ACPSGD(rank)  # type: ignore[misc]
    middle = ranks[len(ranks) // 2]
    table[f"ACP-SGD rank {middle}, no error feedback"] = lambda: ACPSGD(middle, error_feedback=False)
    return table


def train(
    model: nn.Module,
    make_compressor: MakeCompressor,
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
    batches: Iterator[Tensor | tuple[Tensor, ...]],
    loss: Callable[[nn.Module, Tensor | tuple[Tensor, ...]], Tensor],
) -> float:
    """Train through DDP and return the payload bytes per step."""
    ddp = DistributedDataParallel(model)
    compressor = register_compressor(ddp, make_compressor()) if make_compressor else None
    stepper, steps = optimizer(ddp.parameters()), 0
    for batch in batches:
        stepper.zero_grad()
        loss(ddp, batch).backward()
        stepper.step()
        steps += 1
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    return compressor.stats.bytes_sent / steps if compressor else float(dense)


def digits(seed: int, steps: int, make_compressor: MakeCompressor) -> tuple[float, float]:
    """64-256-256-10 perceptron on scikit-learn's digits, SGD lr 0.05 momentum 0.9, batch 128; test accuracy in %."""
    x_train, y_train, x_test, y_test = digits_task.load(seed)
    model = digits_task.perceptron(seed)
    order = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        while done < steps:
            for rows in torch.randperm(len(x_train), generator=order).split(128)[: steps - done]:
                if len(rows) == 128:
                    yield x_train[rows], y_train[rows]
                    done += 1

    sent = train(
        model,
        make_compressor,
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        batches(),
        lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
    )
    return digits_task.accuracy(model, x_test, y_test), sent


def text(seed: int, steps: int, make_compressor: MakeCompressor) -> tuple[float, float]:
    """The tiny Llama on the bytes of Python's help text, AdamW lr 2e-3, batch 16 x 64; validation loss in nats/byte."""
    data = TextData(block_size=64, batch_size=16, seed=seed)
    data.setup("fit")
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(vocab_size=data.vocab_size, **LLAMA_PRESETS["tiny"]))

    def batches() -> Iterator[Tensor]:
        done = 0
        while done < steps:
            for batch in data.train_dataloader():
                if done < steps:
                    yield batch
                done += 1

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    sent = train(
        model,
        make_compressor,
        lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
        batches(),
        loss,
    )
    with torch.no_grad():
        losses = [loss(model, batch).item() for _, batch in zip(range(40), data.val_dataloader(), strict=False)]
    return statistics.fmean(losses), sent


TASKS = {"digits": digits, "text": text}


def report(runs: list[Run], command: str) -> str:
    """A table per task and number of steps: mean, spread over seeds, and the difference to plain DDP."""
    lines = [
        "# Accuracy under compression",
        "",
        "Same data, order, learning rate and number of steps for every method of a table; mean and standard deviation "
        "over seeds. Nothing is tuned per method. `bytes` is the mean payload one rank hands to collectives per step.",
        "",
        f"Command: `{command}`",
        "",
        f"Machine: {describe_machine()}. Date: {datetime.date.today().isoformat()}",
        "",
    ]
    for task, steps in dict.fromkeys((run.task, run.steps) for run in runs):
        unit = "test accuracy, %" if task == "digits" else "validation loss, nats per byte"
        lines += [f"## {task}, {steps} steps", "", f"| method | {unit} | against plain DDP | bytes per step |"]
        lines += ["|---|---|---|---|"]
        of_task = [run for run in runs if (run.task, run.steps) == (task, steps)]
        plain = statistics.fmean(run.score for run in of_task if run.method == "plain DDP")
        for method in dict.fromkeys(run.method for run in of_task):
            scores = [run.score for run in of_task if run.method == method]
            sent = statistics.fmean(run.bytes_per_step for run in of_task if run.method == method)
            mean, spread = statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
            change = f"{mean - plain:+.2f} points" if task == "digits" else f"{100 * (mean / plain - 1):+.2f} %"
            lines.append(f"| {method} | {mean:.3f} ± {spread:.3f} | {change} | {sent:,.0f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run all trainings and write the Markdown and JSON files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps; prints, writes nothing")
    parser.add_argument("--seeds", type=int, default=4, help="seeds per method (default 4)")
    parser.add_argument("--digits-steps", type=int, nargs="*", default=[88, 330], help="default 88 330")
    parser.add_argument("--text-steps", type=int, nargs="*", default=[300], help="default 300")
    parser.add_argument("--out", type=Path, default=OUT, help="path of the results without suffix")
    args = parser.parse_args()
    seeds = 1 if args.quick else args.seeds
    plans = {"digits": ([1, 2, 4], args.digits_steps), "text": ([2, 4], args.text_steps)}
    if args.quick:
        plans = {"digits": ([2], [40]), "text": ([4], [10])}
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.filterwarnings("ignore", message="gradient compression has no effect")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        todo = [
            (task, steps, seed, method, make)
            for task, (ranks, step_counts) in plans.items()
            for steps in step_counts
            for seed in range(seeds)
            for method, make in methods(ranks).items()
        ]
        runs = []
        for task, steps, seed, method, make in track(todo, description="training"):
            score, sent = TASKS[task](seed, steps, make)
            runs.append(Run(task, method, seed, steps, score, sent))
        dist.destroy_process_group()
    table = report(runs, "python -m tests.benchmarks.compression_accuracy" + (" --quick" if args.quick else ""))
    print(table)
    if not args.quick:
        args.out.with_suffix(".md").write_text(table + "\n")
        args.out.with_suffix(".json").write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


if __name__ == "__main__":
    main()
