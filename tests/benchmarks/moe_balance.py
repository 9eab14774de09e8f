"""Even loads by a loss and by a bias: what each does to a mixture of experts, and to how well it learns.

Trains the model of the recipe `moe/parm` on its text, on one process, with neither, with auxiliary losses of several
weights, and with selection biases of several rates, over several seeds. Loads are counted over the validation text.

    python -m tests.benchmarks.moe_balance
    python -m tests.benchmarks.moe_balance --quick     # few steps, prints, writes nothing
"""

import argparse
import datetime
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_efficient.data import TextData
from lightning_efficient.models import MoELlamaLM
from lightning_efficient.moe import MoELayer, moe_layers
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.pages import write_page

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "moe_balance_2core_cpu_202611"
METHODS: dict[str, dict[str, float]] = {
    "neither": {"aux_loss_coef": 0.0},
    "loss, 0.01": {"aux_loss_coef": 0.01},
    "loss, 0.1": {"aux_loss_coef": 0.1},
    "bias, 0.001": {"aux_loss_coef": 0.0, "balance_rate": 0.001},
    "bias, 0.003": {"aux_loss_coef": 0.0, "balance_rate": 0.003},
    "bias, 0.01": {"aux_loss_coef": 0.0, "balance_rate": 0.01},
    "both, 0.01 and 0.003": {"aux_loss_coef": 0.01, "balance_rate": 0.003},
}
SHAPE: dict[str, Any] = {"num_experts": 8, "top_k": 2}
CAPACITY = 1.25


@dataclass(frozen=True, slots=True)
class Run:
    """One training.

    Attributes:
        method: of :data:`METHODS`.
        dropless: nothing was dropped; else capacity factor 1.25, in training only.
        seed: of weights and batches.
        val_loss: in nats, of the last step, with nothing dropped.
        busiest: load of the busiest expert over the mean, over the validation text; the mean over layers.
        dropped: share of the assignments of training that found no slot.
    """

    method: str
    dropless: bool
    seed: int
    val_loss: float
    busiest: float
    dropped: float


class Loads:
    """Counts what layers do."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.counts: dict[str, Tensor] = {}
        self.assigned = self.dropped = 0
        for name, layer in moe_layers(model):
            layer.register_forward_hook(lambda each, *_, name=name: self._count(name, each))

    def _count(self, name: str, layer: MoELayer) -> None:
        assert layer.stats is not None
        if layer.training:
            self.assigned += layer.stats.assignments
            self.dropped += int(layer.stats.dropped)
        else:
            counts_E = layer.router.counts(layer.stats.load).double()
            self.counts[name] = self.counts.get(name, torch.zeros_like(counts_E)) + counts_E

    @property
    def busiest(self) -> float:
        """Of the evaluations so far."""
        return statistics.mean(float(each.max() / each.mean()) for each in self.counts.values())


def train(method: str, seed: int, steps: int, *, dropless: bool) -> Run:
    """Train once."""
    pl.seed_everything(seed, verbose=False)
    model = MoELlamaLM(
        size="tiny",
        capacity_factor=None if dropless else CAPACITY,
        eval_capacity_factor=SHAPE["num_experts"] / SHAPE["top_k"],
        optimizer=lambda params: torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
        **SHAPE,
        **METHODS[method],
    )
    loads = Loads(model)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TextData(block_size=128, batch_size=8, seed=seed)
    trainer.fit(model, data)
    trainer.limit_val_batches = 1.0
    (metrics,) = trainer.validate(model, data, verbose=False)
    return Run(method, dropless, seed, metrics["val_loss"], loads.busiest, loads.dropped / max(1, loads.assigned))


def main(arguments: list[str] | None = None) -> None:
    """Train, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps; prints, writes nothing")
    parser.add_argument("--steps", type=int, default=300, help="of each training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each method (%(default)s)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.seeds = 5, 1
    torch.set_num_threads(1)
    runs = []
    for dropless in (True, False):
        for seed in range(options.seeds):
            for method in METHODS:
                runs.append(train(method, seed, options.steps, dropless=dropless))
                print(runs[-1], flush=True)
    text = page(runs, options)
    print(text)
    if not options.quick:
        write_page(OUT, text, runs)


def page(runs: list[Run], options: argparse.Namespace) -> str:
    """Two tables: without and with a capacity."""
    lines = [
        "# Even loads of experts, by a loss and by a bias",
        "",
        f"Measured {datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()} on {describe_machine()}, one "
        "thread.",
        "",
        "```",
        f"python -m tests.benchmarks.moe_balance --steps {options.steps} --seeds {options.seeds}",
        "```",
        "",
        f"The tiny model of the recipe `moe/parm`, {SHAPE['num_experts']} experts, {SHAPE['top_k']} for each token, "
        f"{options.steps} steps of 8 x 128 bytes of text; means over {options.seeds} seeds, and the standard deviation "
        "of the difference from `neither` with the same seed. The busiest expert's load is over the mean load, counted "
        "over the validation text, with nothing dropped there.",
        "",
    ]
    for dropless in (True, False):
        lines += [
            "## Nothing dropped in training" if dropless else f"## Capacity factor {CAPACITY:g} in training",
            "",
            "| balanced by | validation loss | over neither | busiest expert | dropped in training |",
            "|---|---|---|---|---|",
        ]
        own = {method: [run for run in runs if run.method == method and run.dropless == dropless] for method in METHODS}
        plain = own["neither"]
        for method, found in own.items():
            gaps = [run.val_loss - base.val_loss for run, base in zip(found, plain, strict=True)]
            spread = f" ± {statistics.stdev(gaps):.3f}" if len(gaps) > 1 and method != "neither" else ""
            lines.append(
                f"| {method} | {statistics.mean(run.val_loss for run in found):.3f} "
                f"| {statistics.mean(gaps):+.3f}{spread} | {statistics.mean(run.busiest for run in found):.2f} "
                f"| {statistics.mean(run.dropped for run in found):.1%} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
