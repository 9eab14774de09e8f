"""How good LoRA-FA's models are beside LoRA's and full fine-tuning, each at its own best learning rate.

    python -m tests.benchmarks.lora_fa_quality            # about half an hour on one core
    python -m tests.benchmarks.lora_fa_quality --quick    # a look; writes nothing
    python -m tests.benchmarks.lora_fa_quality --plot     # the plot and the page of the last JSON file; trains nothing

A Llama of 0.9 million weights learns Python's help text byte by byte, then is fine-tuned on the source code of its
standard library. Every method is tried with a ladder of learning rates on seed 0, up and down until the best has a
neighbour on both sides, and is judged with the best one on other seeds. Needs the extras `peft` and `plots`.
"""

import argparse
import copy
import datetime
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_efficient.data import TextData
from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, calibrate
from lightning_efficient.models import LLAMA_PRESETS, Llama, LlamaConfig
from tests.benchmarks.machine import describe_machine

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "lora_fa_quality_2core_cpu_202611"

LADDER = [m * 10.0**e for e in range(-5, 1) for m in (1, 2, 5)]
BLOCK, BATCH, PRETRAIN_BATCH = 128, 8, 16
VALIDATION_BLOCKS = 96
CALIBRATION_BATCHES = 8
WARM_UP = 0.05
TUNING_SEED = 0

READING = """## Reading

At equal trainable parameters and each at its own learning rate, LoRA-FA comes close to LoRA and does not pass it here:
r = 16 is behind LoRA's r = 8 by less than the seeds differ, r = 32 behind LoRA's r = 16 by about as much as they
differ, 0.02 nats or one per cent. Which A is frozen makes no difference that six seeds show, nor does PEFT's correction
of the gradient. It makes one for the learning rate: `orthogonal` and `kaiming` want LoRA's, `eva`, `gradient` and
`pissa` a fifth of it, and at LoRA's they are worse by a tenth of a nat. So: LoRA's learning rate, or half of it at a
high rank, with `orthogonal`, and twice LoRA's rank. This is one small model, fine-tuned briefly; full fine-tuning is
ahead of every adapter by 0.07 nats or more.
"""

Batch = dict[str, Tensor]
Prepare = Callable[[nn.Module, int, list[Batch]], nn.Module]


@dataclass(frozen=True)
class Method:
    """How a pretrained model is made ready, and the learning rates tried first.

    Attributes:
        name: for the table.
        prepare: takes a copy of the model, the seed, and batches to calibrate with.
        lrs: a part of :data:`LADDER`; more are tried while the best is at an end.
        optimizer: takes the prepared model and the learning rate.
    """

    name: str
    prepare: Prepare
    lrs: tuple[float, ...]
    optimizer: Callable[[nn.Module, float], Optimizer] = lambda net, lr: AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )


@dataclass(frozen=True)
class Run:
    """One fine-tuning; ``loss`` is the validation loss after it, in nats per byte."""

    method: str
    lr: float
    seed: int
    loss: float
    trainable: int


def full(net: nn.Module, seed: int, batches: list[Batch]) -> nn.Module:
    return net.requires_grad_(True)


def lora(rank: int) -> Prepare:
    """Both A and B train, A from PEFT's initialisation."""

    def prepare(net: nn.Module, seed: int, batches: list[Batch]) -> nn.Module:
        config = LoRAFAConfig(r=rank, alpha=2 * rank, init="kaiming", lean=False, seed=seed)
        apply_lora_fa(net, config)
        for name, parameter in net.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(True)
        return net

    return prepare


def lora_fa(rank: int, init: Any) -> Prepare:
    def prepare(net: nn.Module, seed: int, batches: list[Batch]) -> nn.Module:
        apply_lora_fa(net, LoRAFAConfig(r=rank, alpha=2 * rank, init=init, seed=seed))
        if init in ("eva", "gradient"):

            def run() -> None:
                for batch in batches:
                    loss_of(net, batch).backward()

            calibrate(net, run, method=init, seed=seed)
            net.zero_grad()
        return net

    return prepare


def peft_lora_fa(rank: int) -> Prepare:
    def prepare(net: nn.Module, seed: int, batches: list[Batch]) -> nn.Module:
        import peft

        torch.manual_seed(seed)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return peft.get_peft_model(net, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))  # type: ignore[arg-type]

    return prepare


def peft_optimizer(rank: int) -> Callable[[nn.Module, float], Optimizer]:
    def make(net: nn.Module, lr: float) -> Optimizer:
        from peft.optimizers import create_lorafa_optimizer

        optimizer: Optimizer = create_lorafa_optimizer(net, r=rank, lora_alpha=2 * rank, lr=lr)  # type: ignore[arg-type]
        return optimizer

    return make


LORA, FA = "LoRA r=8", "LoRA-FA r=16, orthogonal"
METHODS = [
    Method("full fine-tuning", full, (5e-4, 1e-3, 2e-3)),
    Method(LORA, lora(8), (5e-3, 1e-2, 2e-2)),
    Method("LoRA r=9", lora(9), (5e-3, 1e-2, 2e-2)),
    Method("LoRA r=16", lora(16), (5e-3, 1e-2, 2e-2)),
    Method(FA, lora_fa(16, "orthogonal"), (1e-2, 2e-2, 5e-2)),
    Method("LoRA-FA r=16, eva", lora_fa(16, "eva"), (1e-2, 2e-2, 5e-2)),
    Method("LoRA-FA r=16, gradient", lora_fa(16, "gradient"), (1e-2, 2e-2, 5e-2)),
    Method("LoRA-FA r=16, pissa", lora_fa(16, "pissa"), (1e-2, 2e-2, 5e-2)),
    Method("LoRA-FA r=16, kaiming", lora_fa(16, "kaiming"), (1e-2, 2e-2, 5e-2)),
    Method("LoRA-FA r=8, orthogonal", lora_fa(8, "orthogonal"), (1e-2, 2e-2, 5e-2)),
    Method("LoRA-FA r=32, orthogonal", lora_fa(32, "orthogonal"), (5e-3, 1e-2, 2e-2)),
    Method("PEFT LoRA-FA and its optimizer, r=16", peft_lora_fa(16), (1e-2, 2e-2, 5e-2), peft_optimizer(16)),
]
"""LoRA r=8 has a little fewer, LoRA r=9 a little more parameters to train than LoRA-FA r=16."""


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy, in nats per byte."""
    return F.cross_entropy(net(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def batches_of(data: TextData, steps: int) -> list[Batch]:
    """Return the first batches of the data's order, over as many epochs as it takes."""
    loader, found = data.train_dataloader(), []
    while len(found) < steps:
        found += list(loader)
    return found[:steps]


def train(net: nn.Module, optimizer: Optimizer, batches: list[Batch]) -> None:
    """One step for each batch; the learning rate rises for a few steps and then falls linearly to 0."""
    warm_up = max(1, round(WARM_UP * len(batches)))
    peaks = [group["lr"] for group in optimizer.param_groups]
    net.train()
    for step, batch in enumerate(batches):
        part = min((step + 1) / warm_up, (len(batches) - step) / (len(batches) - warm_up))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * part
        loss_of(net, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def validate(net: nn.Module, data: TextData) -> float:
    """Mean loss over blocks that are spread evenly over the validation text."""
    net.eval()
    examples = data.splits.val
    items = examples.items()
    items = items[:: max(1, len(items) // VALIDATION_BLOCKS)][:VALIDATION_BLOCKS]
    losses = [loss_of(net, examples.batch(items[i : i + 16])).item() for i in range(0, len(items), 16)]
    return statistics.fmean(losses)


def pretrained(steps: int) -> tuple[nn.Module, float]:
    """Return the model after learning the help text, and its validation loss there."""
    torch.manual_seed(0)
    net = Llama(LlamaConfig(vocab_size=256, **LLAMA_PRESETS["tiny"]))
    data = TextData(block_size=BLOCK, batch_size=PRETRAIN_BATCH)
    data.setup("fit")
    train(net, AdamW(net.parameters(), lr=3e-3, weight_decay=0.01), batches_of(data, steps))
    return net, validate(net, data)


class Bench:
    """Fine-tunes copies of one pretrained model; equal batches for all methods of a seed."""

    def __init__(self, base: nn.Module, steps: int) -> None:
        self.base, self.steps = base, steps
        self.data: dict[int, tuple[TextData, list[Batch]]] = {}

    def batches(self, seed: int) -> tuple[TextData, list[Batch]]:
        if seed not in self.data:
            data = TextData(corpus="code", block_size=BLOCK, batch_size=BATCH, seed=seed)
            data.setup("fit")
            self.data[seed] = data, batches_of(data, self.steps)
        return self.data[seed]

    def run(self, method: Method, lr: float, seed: int) -> Run:
        data, batches = self.batches(seed)
        net = method.prepare(copy.deepcopy(self.base), seed, batches[:CALIBRATION_BATCHES])
        optimizer = method.optimizer(net, lr)
        trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
        train(net, optimizer, batches)
        return Run(method.name, lr, seed, validate(net, data), trainable)


def search(run: Callable[[float], Run], lrs: tuple[float, ...]) -> Iterator[Run]:
    """Yield runs with the given learning rates, and with more until the best has a worse one on both sides."""
    done: dict[float, float] = {}
    places = [min(range(len(LADDER)), key=lambda i: abs(LADDER[i] - lr)) for lr in lrs]
    while places:
        place = places.pop(0)
        result = run(LADDER[place])
        done[place] = result.loss if result.loss == result.loss else float("inf")
        yield result
        if not places:
            best = min(done, key=lambda each: done[each])
            places = [p for p in (best - 1, best + 1) if p not in done and 0 <= p < len(LADDER)]


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    """Return a row for each method: the ladder of seed 0, the best learning rate, and the losses of the others."""
    rows = []
    for name in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == name]
        tuning = sorted((run.lr, run.loss) for run in own if run.seed == TUNING_SEED)
        judged = {run.seed: run.loss for run in own if run.seed != TUNING_SEED}
        best = min((loss, lr) for lr, loss in tuning if loss == loss)[1]
        rows.append(
            {
                "method": name,
                "trainable": own[0].trainable,
                "lr": best,
                "tuning": tuning,
                "losses": list(judged.items()),
            }
        )
    return rows


def report(result: dict[str, Any], command: str) -> str:
    """Return the page."""
    rows = summarise([Run(**each) for each in result["runs"]])
    base = dict(next(row["losses"] for row in rows if row["method"] == LORA))
    lines = [
        "# How well LoRA-FA fine-tunes",
        "",
        f"A Llama of {result['parameters']:,} weights (4 layers, D = 128) learns Python's help text byte by byte for "
        f"{result['pretrain_steps']} steps of {PRETRAIN_BATCH} x {BLOCK} bytes (validation loss "
        f"{result['pretrain_loss']:.3f} there), then is fine-tuned for {result['steps']} steps of {BATCH} x {BLOCK} "
        "bytes on the source of Python's standard library. Losses are of that code's validation part, in nats per "
        f"byte; before fine-tuning it is {result['before']:.3f}. AdamW without weight decay unless the method says "
        "otherwise, learning rate linearly to 0 after a short warm-up, float32, scale alpha / r = 2, all linears of "
        "the layers. LoRA trains A and B.",
        "",
        "Learning rates are steps of about 2 (1, 2, 5, 10, ...), tried on seed 0 until the best has a worse one on "
        "both sides. *Loss*: mean and standard deviation over the other seeds at that learning rate. *Over LoRA*: mean "
        f"difference from {LORA} at equal seeds (equal batches), and its standard deviation; below 0 is better.",
        "",
        f"Command: `{command}`",
        "",
        f"Machine: {describe_machine()}, one thread. Date: {datetime.date.today().isoformat()}",
        "",
        "| method | trained parameters | best learning rate | loss | over LoRA |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda each: statistics.fmean(loss for _, loss in each["losses"])):
        losses = dict(row["losses"])
        gaps = [losses[seed] - base[seed] for seed in losses]
        lines.append(
            f"| {row['method']} | {row['trainable']:,} | {row['lr']:g} | {statistics.fmean(losses.values()):.4f} ± "
            f"{_std(list(losses.values())):.4f} | {statistics.fmean(gaps):+.4f} ± {_std(gaps):.4f} |"
        )
    lines += ["", "## Loss by learning rate, seed 0", ""]
    lrs = sorted({lr for row in rows for lr, _ in row["tuning"]})
    lines += [f"| method | {' | '.join(f'{lr:g}' for lr in lrs)} |", f"|{'---|' * (len(lrs) + 1)}"]
    for row in rows:
        tuning = dict(row["tuning"])
        shown = [f"{tuning[lr]:.4f}" if lr in tuning else "" for lr in lrs]
        lines.append(f"| {row['method']} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", f"![Validation loss by learning rate]({OUT.name}.svg)", "", READING])


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the loss by learning rate as SVG, without anything that differs from one drawing to the next."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lora_fa", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        for i, row in enumerate(summarise([Run(**each) for each in result["runs"]])):
            ours = row["method"].startswith("LoRA-FA")
            lrs, losses = zip(*row["tuning"], strict=True)
            color = plt.get_cmap("tab10")(i % 10)
            axes.plot(lrs, losses, "o-" if ours else "s--", ms=3, lw=1.4, color=color, label=row["method"])
        lowest = min(run["loss"] for run in result["runs"])
        axes.set(xlabel="learning rate", ylabel="validation loss, nats per byte", xscale="log")
        axes.set_ylim(lowest - 0.02, lowest + 0.5)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Pretrain, tune every method on one seed, judge it on the others."""
    base, pretrain_loss = pretrained(args.pretrain_steps)
    bench = Bench(base, args.steps)
    before = validate(base, bench.batches(TUNING_SEED)[0])
    runs: list[Run] = []
    with Progress() as progress:
        chosen = [method for method in METHODS if method.name in args.methods]
        bar = progress.add_task("fine-tuning", total=len(chosen))
        for method in chosen:
            tuned = list(search(lambda lr, method=method: bench.run(method, lr, TUNING_SEED), method.lrs))  # type: ignore[misc]
            best = min((run for run in tuned if run.loss == run.loss), key=lambda run: run.loss)
            judged = [bench.run(method, best.lr, seed) for seed in args.seeds]
            runs += tuned + judged
            said = ", ".join(f"{run.lr:g}: {run.loss:.4f}" for run in tuned)
            progress.console.print(f"{method.name}: {said} -> {[round(run.loss, 4) for run in judged]}")
            progress.advance(bar)
    return {
        "parameters": sum(p.numel() for p in base.parameters()),
        "pretrain_steps": args.pretrain_steps,
        "pretrain_loss": pretrain_loss,
        "steps": args.steps,
        "before": before,
        "runs": [asdict(run) for run in runs],
    }


def main() -> None:
    """Train, print, and write the Markdown, JSON and SVG files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, one seed; prints, writes nothing")
    parser.add_argument("--plot", action="store_true", help="page and plot of the JSON file at --out; trains nothing")
    names = [method.name for method in METHODS]
    parser.add_argument("--methods", nargs="*", choices=names, help="these anew, others as in the JSON file at --out")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5, 6], help="seeds reported (default 1 to 6)"
    )
    parser.add_argument("--pretrain-steps", type=int, default=400, help="default 400")
    parser.add_argument("--steps", type=int, default=120, help="of each fine-tuning (default 120)")
    parser.add_argument("--out", type=Path, default=OUT, help="path of the results without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    old: list[dict[str, Any]] = []
    if args.methods and not args.quick:
        old = json.loads(args.out.with_suffix(".json").read_text())["runs"]
        old = [run for run in old if run["method"] not in args.methods]
    args.methods = args.methods or names
    if args.quick:
        args.seeds, args.pretrain_steps, args.steps = [1], 20, 8
    result = json.loads(args.out.with_suffix(".json").read_text()) if args.plot else measure(args)
    if not args.plot:
        result["runs"] = sorted(old + result["runs"], key=lambda run: names.index(run["method"]))
    page = report(result, "python -m tests.benchmarks.lora_fa_quality")
    print(page)
    if args.quick:
        return
    args.out.with_suffix(".md").write_text(page)
    args.out.with_suffix(".json").write_text(json.dumps(result, separators=(",", ":")).replace("},{", "},\n{") + "\n")
    plot(result, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
