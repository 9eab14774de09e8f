"""How long a step of LoRA-FA takes beside PEFT's: forward and backward, the optimizer's step, and the injection.

    python -m tests.benchmarks.lora_fa_time             # about ten minutes on one core
    python -m tests.benchmarks.lora_fa_time --quick     # a look; writes nothing

Methods take turns in one process on one thread. A ratio is the median over rounds of CPU time over that of the base in
the same round. Needs the extra `peft`.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.optim import AdamW

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa
from tests.benchmarks._lora_fa_cases import FULL, LEAN, LEAN_ALL, LORA, PEFT_FA, Cell, build
from tests.benchmarks.machine import describe_machine

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "lora_fa_time_2core_cpu_202611"

METHODS = (LORA, FULL, PEFT_FA, LEAN, LEAN_ALL)
WARM_UP = 2
SHAPE = Cell("fp32", layers=2)
CELLS = [
    SHAPE,
    SHAPE.but(name="fp32, dropout .05", p=0.05),
    SHAPE.but(name="bf16, fp32 adapters", base="bfloat16"),
    SHAPE.but(name="bf16, fp32 adapters, dropout .05", base="bfloat16", p=0.05),
    SHAPE.but(name="bf16-mixed", mixed=True),
    SHAPE.but(name="bf16-mixed, dropout .05", mixed=True, p=0.05),
    SHAPE.but(name="small (D = 384, F = 1024, T = 256), fp32", width=384, ffn=1024, tokens=256),
    SHAPE.but(name="small, fp32, dropout .05", width=384, ffn=1024, tokens=256, p=0.05),
]
OPTIMIZER_LINEARS, INJECTED_LINEARS = 96, 1000


READING = """## Reading

The lean functions save the product for A's gradient and the copies that autograd keeps, and pay with masks and
activations that are made twice; on a CPU the two about cancel at small sizes, and the saving wins at larger ones. The
optimizer's step is AdamW's on half the parameters. PEFT's optimizer inverts a matrix for each layer in each step:
beside it, torch's ordinary AdamW is some five times, its fused form over ten times faster. Adapters go in at the same
speed as PEFT's.
"""


@dataclass(frozen=True)
class Time:
    """CPU milliseconds, the median over rounds, and the median of the ratio to the base of the same round."""

    group: str
    method: str
    ms: float
    ratio: float


def take_turns(group: str, steps: dict[str, Callable[[], Any]], rounds: int) -> list[Time]:
    """Time the steps in turns; the first one is the base."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in track(range(rounds + WARM_UP), description=group):
        for name in list(steps) if round_ % 2 else list(reversed(steps)):
            start = time.process_time()
            steps[name]()
            if round_ >= WARM_UP:
                times[name].append(1e3 * (time.process_time() - start))
    base = times[next(iter(steps))]
    return [
        Time(group, name, statistics.median(own), statistics.median(a / b for a, b in zip(own, base, strict=True) if b))
        for name, own in times.items()
    ]


def steps_of(cell: Cell, rounds: int) -> list[Time]:
    """Forward and backward of each method."""
    return take_turns(cell.name, {method: build(cell, method).step for method in METHODS}, rounds)


def optimizer_steps(rounds: int) -> list[Time]:
    """The optimizers on adapters of rank 16 with fixed gradients: AdamW on A and B is the base."""
    import peft
    from peft.optimizers import create_lorafa_optimizer

    def wrapped() -> Any:
        names = [str(i) for i in range(OPTIMIZER_LINEARS)]
        model = peft.get_peft_model(_linears(OPTIMIZER_LINEARS, 512), peft.LoraConfig(r=16, target_modules=names))  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.grad = torch.randn_like(parameter)
        return model

    ours = _linears(OPTIMIZER_LINEARS, 512)
    apply_lora_fa(ours, LoRAFAConfig(r=16))
    for parameter in ours.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    both, peft_fa = wrapped(), wrapped()
    steps = {
        "AdamW on LoRA's A and B": AdamW([p for p in both.parameters() if p.requires_grad], lr=1e-3).step,
        "AdamW on LoRA-FA's B": AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-3).step,
        "AdamW, fused, on LoRA-FA's B": AdamW(
            [p for p in ours.parameters() if p.requires_grad], lr=1e-3, fused=True
        ).step,
        "PEFT's LoRA-FA optimizer": create_lorafa_optimizer(peft_fa, r=16, lora_alpha=16, lr=1e-3).step,
    }
    return take_turns("optimizer", steps, rounds)


def injections(rounds: int) -> list[Time]:
    """Adapters on a thousand linears; the copy of the model that each gets is not timed."""
    import peft

    names = [str(i) for i in range(INJECTED_LINEARS)]
    makers: dict[str, Callable[[nn.Module], Any]] = {
        "PEFT's get_peft_model": lambda net: peft.get_peft_model(net, peft.LoraConfig(r=16, target_modules=names)),  # type: ignore[arg-type]
        "apply_lora_fa": lambda net: apply_lora_fa(net, LoRAFAConfig(r=16)),
        "apply_lora_fa, init='kaiming'": lambda net: apply_lora_fa(net, LoRAFAConfig(r=16, init="kaiming")),
        "apply_lora_fa, backend='peft'": lambda net: apply_lora_fa(net, LoRAFAConfig(r=16, backend="peft")),
    }
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in track(range(rounds), description="injection"):
        for name, make in makers.items():
            net = _linears(INJECTED_LINEARS, 256)
            start = time.process_time()
            make(net)
            times[name].append(1e3 * (time.process_time() - start))
    medians = {name: statistics.median(own) for name, own in times.items()}
    base = next(iter(medians.values()))
    return [Time("injection", name, ms, ms / base) for name, ms in medians.items()]


def _linears(count: int, width: int) -> nn.Module:
    return nn.Sequential(*(nn.utils.skip_init(nn.Linear, width, width, bias=False) for _ in range(count)))


def report(times: list[Time], rounds: int, command: str) -> str:
    """Return the page."""
    cells = list(dict.fromkeys(t.group for t in times if t.group not in ("optimizer", "injection")))
    by = {(t.group, t.method): t for t in times}
    others = [method for method in METHODS if method != LORA]
    lines = [
        "# How long LoRA-FA takes",
        "",
        f"CPU time on one thread. Methods take turns in one process, {rounds} rounds; a ratio is the median over "
        "rounds of the time over that of PEFT LoRA in the same round. Models as in "
        "[what LoRA-FA stores](lora_fa_memory_2core_cpu_202611.md), 2 layers, D = 512, F = 1376, T = 512 where nothing "
        "else is said, r = 16.",
        "",
        f"Command: `{command}`",
        "",
        f"Machine: {describe_machine()}, peft {importlib.metadata.version('peft')}. "
        f"Date: {datetime.date.today().isoformat()}",
        "",
        "## Forward and backward, over PEFT LoRA",
        "",
        f"| setting | PEFT LoRA, ms | {' | '.join(others)} |",
        f"|{'---|' * (len(others) + 2)}",
    ]
    for cell in cells:
        shown = [cell, f"{by[cell, LORA].ms:.0f}", *(f"{by[cell, method].ratio:.2f}" for method in others)]
        lines.append(f"| {' | '.join(shown)} |")
    titles = {
        "optimizer": f"The optimizer's step, {OPTIMIZER_LINEARS} linears of 512 x 512, r = 16",
        "injection": f"Putting adapters on {INJECTED_LINEARS} linears of 256 x 256, r = 16",
    }
    for group, title in titles.items():
        lines += ["", f"## {title}", "", "| method | ms | ratio |", "|---|---|---|"]
        lines += [f"| {t.method} | {t.ms:.1f} | {t.ratio:.2f} |" for t in times if t.group == group]
    lines += ["", "## Targets", "", "| what | at most | measured | |", "|---|---|---|---|"]
    for cell in cells:
        for method in (LEAN, LEAN_ALL):
            most = 1.05 if "dropout" in cell else 1.0
            lines.append(_target(f"{cell}: {method}, over PEFT LoRA", most, by[cell, method].ratio))
    steps = {t.method: t.ms for t in times if t.group == "optimizer"}
    if steps:
        lora, ours, fused, theirs = steps.values()
        lines.append(_target("optimizer: AdamW on B, over AdamW on A and B", 1.0, ours / lora))
        lines.append(_target("optimizer: AdamW on B, over PEFT's LoRA-FA optimizer", 0.1, ours / theirs))
        lines.append(_target("optimizer: AdamW fused on B, over PEFT's LoRA-FA optimizer", 0.1, fused / theirs))
    return "\n".join([*lines, "", READING])


def _target(what: str, most: float, measured: float) -> str:
    return f"| {what} | {most:.2f} | {measured:.3f} | {'met' if measured <= most else 'missed'} |"


def main() -> None:
    """Measure, print, and write the Markdown and JSON files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; prints, writes nothing")
    parser.add_argument("--rounds", type=int, default=25, help="timed steps of each method (default 25)")
    parser.add_argument("--cells", nargs="*", help="settings by name; default: all; writes nothing")
    parser.add_argument("--out", type=Path, default=OUT, help="path of the results without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    rounds = 3 if args.quick else args.rounds
    times = [t for cell in CELLS if not args.cells or cell.name in args.cells for t in steps_of(cell, rounds)]
    times += optimizer_steps(4 * rounds) + injections(3 if args.quick else 5)
    command = "python -m tests.benchmarks.lora_fa_time" + (f" --rounds {rounds}" if rounds != 25 else "")
    page = report(times, rounds, command)
    print(page)
    if not args.quick and not args.cells:
        args.out.with_suffix(".md").write_text(page)
        args.out.with_suffix(".json").write_text(json.dumps([asdict(t) for t in times], indent=1) + "\n")


if __name__ == "__main__":
    main()
