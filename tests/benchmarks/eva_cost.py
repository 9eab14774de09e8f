"""What a step of Eva costs beside SGD and AdamW: forward and backward with capture, the optimizer's step, its state.

    python -m tests.benchmarks.eva_cost             # about five minutes on one core
    python -m tests.benchmarks.eva_cost --quick     # a look

All methods of a model take turns, step by step, in one process on one thread; figures are medians of CPU time, and
ratios are to `SGD(momentum=0.9, weight_decay=5e-4, foreach=True)` of the same run.
"""

import argparse
import copy
import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from lightning_efficient.models import LLAMA_PRESETS, AutoEncoder, Llama, LlamaConfig, ResNetClassifier
from lightning_efficient.optimizers import Eva, EvaP
from tests.benchmarks.machine import describe_machine

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "eva_cost_2core_cpu_202611"
BASE = "SGD foreach"

MakeOptimizer = Callable[[nn.Module], Optimizer]


@dataclass(frozen=True)
class Task:
    """A model and the loss of one fixed batch."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Cost:
    """Medians for one method on one model: seconds of CPU time, and state entries over parameter entries."""

    model: str
    method: str
    forward_backward_s: float
    step_s: float
    whole_s: float
    state: float


class Both(Optimizer):
    """Two optimizers that step together."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        return {p: state for part in self.parts for p, state in part.state.items()}


def llama() -> Task:
    ids = torch.randint(0, 256, (8, 65))
    model = Llama(LlamaConfig(vocab_size=256, **LLAMA_PRESETS["tiny"]))
    return Task(
        "Llama tiny, 8 x 64 tokens",
        model,
        lambda net: F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()),
    )


def autoencoder() -> Task:
    x = torch.rand(256, 784)
    model = AutoEncoder(in_features=784, code_size=30, hidden=(1000, 500, 250))
    return Task("autoencoder 784-1000-500-250-30, batch 256", model, lambda net: F.mse_loss(net(x), x))


def resnet() -> Task:
    x, y = torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))
    model = ResNetClassifier(in_channels=3, width=16, blocks=(3, 3, 3))
    return Task("ResNet-20, batch 16 of 32 x 32", model, lambda net: F.cross_entropy(net(x), y))


TASKS = {"llama": llama, "autoencoder": autoencoder, "resnet": resnet}


def methods() -> dict[str, MakeOptimizer]:
    """Optimizers by name, each with the weight decay of the published settings."""

    common: dict[str, Any] = {"lr": 1e-3, "weight_decay": 5e-4}

    def eva(variant: str, backend: str, **kwargs: Any) -> MakeOptimizer:
        return lambda net: Eva(net.parameters(), **common, variant=variant, backend=backend, **kwargs).attach(net)

    def muon(net: nn.Module) -> Optimizer:
        hidden = [m.weight for m in net.modules() if isinstance(m, nn.Linear)]
        rest = [p for p in net.parameters() if all(p is not each for each in hidden)]
        return Both(Muon(hidden, **common), AdamW(rest, **common, fused=True))

    working = {"kv_samples": None, "g_scale": "expectation", "rescale": "clip"}
    return {
        BASE: lambda net: SGD(net.parameters(), **common, momentum=0.9, foreach=True),
        "SGD fused": lambda net: SGD(net.parameters(), **common, momentum=0.9, fused=True),
        "AdamW foreach": lambda net: AdamW(net.parameters(), **common, foreach=True),
        "AdamW fused": lambda net: AdamW(net.parameters(), **common, fused=True),
        "Eva published, eager": eva("eva", "eager"),
        "Eva all samples, eager": eva("eva", "eager", **working),
        "Eva-f, eager": eva("eva_f", "eager", **working),
        "Eva-f every 10, eager": eva("eva_f", "eager", kv_every=10, **working),
        "Eva-s, eager": eva("eva_s", "eager"),
        "Eva all samples, compiled": eva("eva", "compiled", **working),
        "Eva-f, compiled": eva("eva_f", "compiled", **working),
        "EvaP rank 1, eager": lambda net: EvaP(net.parameters(), **common, rank=1).attach(net),
        "EvaP rank 1, compiled": lambda net: EvaP(net.parameters(), **common, rank=1, backend="compiled").attach(net),
        "EvaP rank 4, eager": lambda net: EvaP(net.parameters(), **common, rank=4).attach(net),
        "Muon and AdamW": muon,
    }


def measure(task: Task, makers: dict[str, MakeOptimizer], rounds: int) -> list[Cost]:
    """Train a copy of the model with each method, in turns."""
    nets = {name: copy.deepcopy(task.model) for name in makers}
    optimizers = {name: make(nets[name]) for name, make in makers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    warm_up = 3
    for round_ in track(range(rounds + warm_up), description=task.name):
        order = list(makers) if round_ % 2 else list(reversed(makers))
        for name in order:
            start = time.process_time()
            task.loss(nets[name]).backward()
            middle = time.process_time()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if round_ >= warm_up:
                times[name].append((middle - start, time.process_time() - middle))
    entries = sum(p.numel() for p in task.model.parameters())
    return [
        Cost(
            task.name,
            name,
            statistics.median(forward for forward, _ in each),
            statistics.median(step for _, step in each),
            statistics.median(forward + step for forward, step in each),
            state_entries(optimizers[name]) / entries,
        )
        for name, each in times.items()
    ]


def state_entries(optimizer: Optimizer) -> int:
    """Entries of all tensors in the optimizer's state."""
    return sum(v.numel() for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def report(costs: list[Cost], command: str) -> str:
    """One table for each model."""
    lines = [
        "# What a step of Eva costs",
        "",
        "Medians of CPU time on one thread; all methods of a table take turns, step by step, in one process. Ratios "
        f"are to {BASE} of the same table; all have weight decay 5e-4, SGD and Eva momentum 0.9. *State*: entries kept "
        "between steps, over the parameters.",
        "",
        f"Command: `{command}`",
        "",
        f"Machine: {describe_machine()}. Date: {datetime.date.today().isoformat()}",
        "",
    ]
    for model in dict.fromkeys(cost.model for cost in costs):
        rows = [cost for cost in costs if cost.model == model]
        base = next(cost for cost in rows if cost.method == BASE)
        lines += [
            f"## {model}",
            "",
            "| method | forward and backward | optimizer step | whole step | step, ms | whole, ms | state |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {c.method} | {c.forward_backward_s / base.forward_backward_s:.3f} | {c.step_s / base.step_s:.2f} "
            f"| {c.whole_s / base.whole_s:.3f} | {1e3 * c.step_s:.2f} | {1e3 * c.whole_s:.1f} | {c.state:.4f} |"
            for c in rows
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the Markdown and JSON files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; prints, writes nothing")
    parser.add_argument("--rounds", type=int, default=120, help="measured steps of each method (default 120)")
    parser.add_argument("--models", nargs="*", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--methods", nargs="*", choices=methods(), help="default: all; the base always runs")
    parser.add_argument("--out", type=Path, default=OUT, help="path of the results without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen = {n: make for n, make in methods().items() if args.methods is None or n in (BASE, *args.methods)}
    rounds = 15 if args.quick else args.rounds
    costs = []
    for name in args.models:
        # Muon takes matrices only, which leaves nothing of a convolutional net.
        makers = {n: make for n, make in chosen.items() if not (n.startswith("Muon") and name == "resnet")}
        costs += measure(TASKS[name](), makers, rounds)
    table = report(costs, f"python -m tests.benchmarks.eva_cost --rounds {args.rounds}")
    print(table)
    if not args.quick:
        args.out.with_suffix(".md").write_text(table + "\n")
        args.out.with_suffix(".json").write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")


if __name__ == "__main__":
    main()
