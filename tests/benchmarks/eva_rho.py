"""Does the preconditioner do anything? rho, the share of the captured direction that is taken out, over a training.

    python -m tests.benchmarks.eva_rho             # about two minutes on one core; the plot needs the extra 'plots'
    python -m tests.benchmarks.eva_rho --quick     # a look

The digits autoencoder and a char Llama are trained with the published Eva, its parts mended in turn, Eva-f and Eva-s.
`rho` is the median over layers. `change` is what the curvature term did to a step: the distance between the update's
direction and that of the plain gradient, as the sine of the angle between them, over all preconditioned layers.
"""

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from lightning_efficient.data import DigitsData, TextData
from lightning_efficient.models import AutoEncoder, Llama, LlamaConfig
from lightning_efficient.optimizers import Eva
from tests.benchmarks.machine import describe_machine

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "eva_rho_2core_cpu_202611"
MENDED: dict[str, Any] = {"kv_samples": None, "g_scale": "expectation"}
METHODS: dict[str, dict[str, Any]] = {
    "Eva, published": {},
    "Eva, g_scale=expectation": MENDED,
    "Eva, expectation, relative damping": {**MENDED, "damping_mode": "relative", "rescale": "normalize", "lr": 3e-2},
    "Eva-f": {**MENDED, "variant": "eva_f", "rescale": "clip", "fallback": "adamw", "fallback_lr": 3e-3},
    "Eva-s, published": {"variant": "eva_s"},
}


@dataclass(frozen=True)
class Curve:
    """Every `every` steps of one training: the step, the median of rho, and the change of direction."""

    task: str
    method: str
    steps: list[int]
    rho: list[float]
    change: list[float]


def autoencoder() -> tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Callable[[], Iterator[Any]], list[str]]:
    data = DigitsData(batch_size=128, flat=True)
    data.setup("fit")
    model = AutoEncoder(64, 16, hidden=(128, 64, 32))
    return (
        model,
        lambda net, batch: F.mse_loss(net(batch[0].double()), batch[0].double()),
        lambda: iter(data.train_dataloader()),
        [],
    )


def llama() -> tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Callable[[], Iterator[Any]], list[str]]:
    data = TextData(tokens="char", block_size=32, batch_size=16)
    data.setup("fit")
    model = Llama(LlamaConfig(data.vocab_size, hidden_size=48, ffn_size=128, num_layers=2, num_heads=4, max_seq_len=64))

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    return model, loss, lambda: iter(data.train_dataloader()), ["lm_head"]


TASKS = {"digits autoencoder": autoencoder, "char Llama": llama}


def endless(batches: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    while True:
        yield from batches()


def train(task: str, method: str, steps: int, every: int) -> Curve:
    """Train with the method and look at it every so many steps."""
    torch.manual_seed(0)
    model, loss_of, batches, skip = TASKS[task]()
    model.double()
    settings = {"lr": 0.1, "momentum": 0.0, **METHODS[method]}
    optimizer = Eva(model.parameters(), **settings).attach(model, skip)
    curve = Curve(task, method, [], [], [])
    for step, batch in zip(range(steps), endless(batches), strict=False):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()} if step % every == 0 else {}
        optimizer.step()
        if before:
            report = {name: each for name, each in optimizer.kv_report().items() if each.rho is not None}
            curve.steps.append(step)
            curve.rho.append(statistics.median(each.rho or 0.0 for each in report.values()))
            curve.change.append(change(model, before, report))
    return curve


def change(model: nn.Module, before: dict[str, Tensor], report: dict[str, Any]) -> float:
    """Median over layers of the sine of the angle between the update and the gradient of a weight."""
    sines = []
    for name, p in model.named_parameters():
        layer = name.rpartition(".")[0]
        if p.grad is not None and p.ndim > 1 and (layer in report or name in report):
            g, d = (F.normalize(each.flatten(), dim=0) for each in (p.grad, before[name] - p.detach()))
            sines.append(float((d - (d @ g) * g).norm()))
    return statistics.median(sines) if sines else math.nan


def report(curves: list[Curve], command: str) -> str:
    lines = [
        "# What the preconditioner does to a step",
        "",
        "`rho`: share of the captured direction that is taken out of the gradient, median over layers. `change`: sine "
        "of the angle between the update and the gradient of a weight, median over layers. Both as medians over the "
        "training. Momentum is 0, so that an update is one step's, and the models are in float64, so that it can be "
        "seen; learning rates are not tuned, so losses are not compared here.",
        "",
        f"Command: `{command}`",
        "",
        f"Machine: {describe_machine()}. Date: {datetime.date.today().isoformat()}",
        "",
        "| task | method | rho | change |",
        "|---|---|---|---|",
    ]
    for c in curves:
        rho, turned = statistics.median(c.rho), statistics.median(c.change)
        lines.append(f"| {c.task} | {c.method} | {rho:.1e} | {turned:.1e} |")
    return "\n".join([*lines, ""])


def plot(curves: list[Curve], path: Path) -> None:
    """Draw rho over the steps, one panel for each task."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "lightning-efficient", "svg.fonttype": "none", "path.simplify": True})
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(TASKS), figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, task in zip(panels, TASKS, strict=True):
        for curve in (each for each in curves if each.task == task):
            style = "--" if "relative" in curve.method else "-"  # it lies on top of another
            panel.semilogy(curve.steps, [max(rho, 1e-12) for rho in curve.rho], style, label=curve.method)
        panel.axhline(1e-3, color="grey", linestyle=":", linewidth=1)
        panel.set(title=task, xlabel="step", ylim=(1e-12, 2))
    panels[0].set_ylabel("rho, median over layers")
    panels[0].annotate("inert below", (0, 1e-3), xytext=(0, 2), textcoords="offset points", fontsize=8, color="grey")
    panels[-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Train, print, and write the page and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps; prints, writes nothing")
    parser.add_argument("--steps", type=int, default=250, help="of each training (default 250)")
    parser.add_argument("--out", type=Path, default=OUT, help="path of the results without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = 20 if args.quick else args.steps
    plans = [(task, method) for task in TASKS for method in METHODS]
    curves = [train(task, method, steps, 5) for task, method in track(plans, description="training")]
    table = report(curves, f"python -m tests.benchmarks.eva_rho --steps {steps}")
    print(table)
    if not args.quick:
        args.out.with_suffix(".md").write_text(table)
        args.out.with_suffix(".json").write_text(json.dumps([asdict(curve) for curve in curves]) + "\n")
        plot(curves, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
