"""What LoRA-FA stores for backward, and the peak of a step, beside PEFT's LoRA and LoRA-FA on the same weights.

    python -m tests.benchmarks.lora_fa_memory                # about eight minutes on one core
    python -m tests.benchmarks.lora_fa_memory --no-compile   # without the rows of torch.compile, two minutes less
    python -m tests.benchmarks.lora_fa_memory --detail "fp32" "ours, lean"   # which module keeps what; writes nothing

Both figures are exact, so a second run gives them again. Needs the extra `peft`.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.profiler import ProfilerActivity, profile

from lightning_efficient.lora_fa import saved_bytes
from tests.benchmarks._lora_fa_cases import (
    COMPILED,
    COMPILED_FA,
    COMPILED_LORA,
    LEAN,
    LEAN_ALL,
    LORA,
    METHODS,
    PEFT_FA,
    Cell,
    build,
)
from tests.benchmarks.machine import describe_machine

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "lora_fa_memory_2core_cpu_202611"

SMALL = Cell("fp32")
LARGE: dict[str, Any] = {"width": 1024, "ffn": 2752, "tokens": 1024}
BF16: dict[str, Any] = {"base": "bfloat16", "adapters": "bfloat16"}
BF16_FP32: dict[str, Any] = {"base": "bfloat16"}
DROPOUT: dict[str, Any] = {"p": 0.05}

LLAMA = [
    SMALL,
    SMALL.but(name="fp32, dropout .05", **DROPOUT),
    SMALL.but(name="bf16, bf16 adapters", **BF16),
    SMALL.but(name="bf16, fp32 adapters", **BF16_FP32),
    SMALL.but(name="bf16, fp32 adapters, dropout .05", **BF16_FP32, **DROPOUT),
    SMALL.but(name="bf16-mixed", mixed=True),
    SMALL.but(name="bf16-mixed, dropout .05", mixed=True, **DROPOUT),
    SMALL.but(name="fp32, checkpointing", checkpointing=True),
    SMALL.but(name="bf16, fp32 adapters, dropout .05, checkpointing", checkpointing=True, **BF16_FP32, **DROPOUT),
    SMALL.but(name="fp32, 2 of 8 key-value heads, F = 3.5 D", kv_heads=2, ffn=1792),
    SMALL.but(name="fp32, vocabulary 32 000 with logits and loss", vocab=32_000),
    SMALL.but(name="large, fp32", **LARGE),
    SMALL.but(name="large, fp32, dropout .05", **LARGE, **DROPOUT),
    SMALL.but(name="large, bf16, fp32 adapters", **LARGE, **BF16_FP32),
    SMALL.but(name="large, bf16-mixed", mixed=True, **LARGE),
    SMALL.but(name="large, bf16-mixed, dropout .05", mixed=True, **LARGE, **DROPOUT),
]
ROBERTA = Cell("RoBERTa", family="roberta", ffn=2048)
T5 = Cell("T5, ReLU", family="t5-relu", ffn=2048, layers=3)
OTHERS = [
    ROBERTA.but(name="RoBERTa"),
    ROBERTA.but(name="RoBERTa, own dropout .1", model_dropout=0.1),
    ROBERTA.but(name="RoBERTa, own dropout .1, adapter dropout .05", model_dropout=0.1, **DROPOUT),
    T5,
    T5.but(name="T5, ReLU, own dropout .1", model_dropout=0.1),
    T5.but(name="T5, gated GELU", family="t5-gated-gelu"),
    T5.but(
        name="T5, gated GELU, own dropout .1, adapter dropout .05", family="t5-gated-gelu", model_dropout=0.1, p=0.05
    ),
]
COMPILED_CELLS = ("fp32", "bf16, fp32 adapters", "bf16-mixed", "bf16-mixed, dropout .05")


@dataclass(frozen=True)
class Figure:
    """Bytes that wait for backward, and the largest number of bytes allocated at once during forward and backward."""

    saved: int
    peak: int


@dataclass(frozen=True)
class Target:
    """A least ratio PEFT LoRA / method of saved bytes."""

    cell: str
    method: str
    least: float


TARGETS = [
    Target("fp32", LEAN, 1.30),
    Target("bf16, fp32 adapters", LEAN, 2.0),
    Target("bf16-mixed", LEAN, 2.1),
    Target("bf16-mixed, dropout .05", LEAN, 2.9),
    Target("bf16-mixed", LEAN_ALL, 2.6),
    Target("bf16-mixed, dropout .05", LEAN_ALL, 3.7),
]

Results = dict[str, dict[str, Figure]]

READING = """## Reading

Freezing A frees a quarter of what LoRA stores in float32, and half where float32 adapters sit on a bfloat16 model; the
lean function changes nothing about the bytes there, only the peak. Under autocast and with dropout PEFT's LoRA-FA still
keeps casts of frozen weights, casts of inputs and masks; the lean function keeps h alone. What remains belongs to
attention, norms and activations: the gated block and the norms as functions take another sixth to third of it, and are
what it takes to be below compiled PEFT LoRA-FA in every setting. With checkpointing only the block that is being
computed again counts, so little but the peak differs. All logits at once hide the layers; a loss in chunks is the
remedy. In T5 attention's own maps are most of what is kept. A model's own dropout masks are kept by all methods, at
four bytes an entry on a CPU where a GPU keeps one: divide that part by four for a GPU.
"""


def measure(cell: Cell, method: str) -> Figure:
    """Return both figures of one method in one setting."""
    torch.manual_seed(0)
    if method in COMPILED:
        torch.compiler.reset()  # else code compiled for other models counts, and at a limit the model runs eagerly
    case = build(cell, method)
    case.step()  # what is made once, such as compiled code, is no part of a step
    torch.manual_seed(0)
    with saved_bytes(module=case.model) as record:
        output = case.forward()
    case.backward(output)  # a graph that autograd's hooks have seen is only freed by its backward
    figure = Figure(record.total, peak_bytes(case.step))
    del case, record, output
    gc.collect()
    return figure


def peak_bytes(step: Callable[[], Any]) -> int:
    """Return how many bytes of CPU memory ``step`` held at once, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    now = top = 0
    # The public list of events leaves out allocations inside operators; the raw one has all, in order of time.
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top


def measure_all(cells: Iterable[Cell], compiled: Iterable[str] = ()) -> Results:
    """Return the figures of all methods, and of the compiled ones in the cells named ``compiled``."""
    wanted = [(cell, method) for cell in cells for method in METHODS]
    wanted += [(cell, method) for cell in cells if cell.name in compiled for method in COMPILED]
    results: Results = {}
    for cell, method in track(wanted, description="memory"):
        results.setdefault(cell.name, {})[method] = measure(cell, method)
    return results


def ratios(results: Results, cell: str, method: str) -> tuple[float, float]:
    """Return PEFT LoRA / method of saved and of peak."""
    base, other = results[cell][LORA], results[cell][method]
    return base.saved / other.saved, base.peak / other.peak


def worse_than_peft_fa(results: Results) -> list[str]:
    """Return the cells in which a lean method stores more than PEFT LoRA-FA, or has a higher peak."""
    found = []
    for cell, figures in results.items():
        for method in (LEAN, LEAN_ALL):
            for what in ("saved", "peak"):
                ours, theirs = getattr(figures[method], what), getattr(figures[PEFT_FA], what)
                if ours > theirs:
                    found.append(f"{cell}: {method}: {what} {ours / theirs - 1:+.2%}")
    return found


def report(cells: list[Cell], results: Results, command: str) -> str:
    """Return the page."""
    lines = [
        "# What LoRA-FA stores",
        "",
        "Ratios are PEFT LoRA over the method, of *saved* bytes and of the *peak*, written saved / peak: higher is "
        "less memory. Saved: bytes that autograd keeps for backward, each storage once, without parameters and buffers "
        "(`lightning_efficient.lora_fa.saved_bytes`). Peak: the running maximum of the CPU allocator's events over one "
        "forward and backward, so it has gradients and temporaries and no parameters. Both are exact.",
        "",
        "All models have random weights and one sequence; all linears of the layers are adapted with r = 16, B is not "
        "0. Llama has 4 layers, D = 512, F = 1376, T = 512 and 8 heads, *large* D = 1024, F = 2752, T = 1024. RoBERTa "
        "has 4 layers, T5 3 in each half, both D = 512, F = 2048, T = 512. The head is left out but in the row with "
        "logits. PEFT LoRA-FA is PEFT LoRA after `create_lorafa_optimizer`, which freezes A. *Plain*: our layers "
        "without the lean function; *lean*: `lean_mlp` and `lean_norm` off; the last column is the default.",
        "",
        f"Command: `{command}`",
        "",
        f"Machine: {describe_machine()}, transformers {importlib.metadata.version('transformers')}, peft "
        f"{importlib.metadata.version('peft')}. Date: {datetime.date.today().isoformat()}",
        "",
    ]
    for title, family in (("Llama", ("llama",)), ("RoBERTa and T5", ("roberta", "t5-relu", "t5-gated-gelu"))):
        chosen = [cell.name for cell in cells if cell.family in family]
        if chosen:
            lines += [f"## {title}", "", *_table(results, chosen), ""]
    lines += _compiled_section(results)
    lines += [*_target_section(results), READING]
    return "\n".join(lines)


def _table(results: Results, cells: list[str]) -> list[str]:
    others = [method for method in METHODS if method != LORA]
    lines = [f"| setting | PEFT LoRA, MiB | {' | '.join(others)} |", f"|{'---|' * (len(others) + 2)}"]
    for cell in cells:
        base = results[cell][LORA]
        shown = [f"{cell}", f"{base.saved / 2**20:.1f} / {base.peak / 2**20:.1f}"]
        shown += ["{:.2f} / {:.2f}".format(*ratios(results, cell, method)) for method in others]
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def _compiled_section(results: Results) -> list[str]:
    cells = [cell for cell, figures in results.items() if COMPILED_LORA in figures]
    if not cells:
        return []
    methods = (COMPILED_LORA, COMPILED_FA, LEAN, LEAN_ALL)
    lines = [
        "## Beside torch.compile",
        "",
        "The same ratios, still over eager PEFT LoRA; *compiled*: `torch.compile` of the whole model, default backend, "
        "whose partitioner decides what is kept.",
        "",
        f"| setting | {' | '.join(methods)} |",
        f"|{'---|' * (len(methods) + 1)}",
    ]
    for cell in cells:
        shown = ["{:.2f} / {:.2f}".format(*ratios(results, cell, method)) for method in methods]
        lines.append(f"| {cell} | {' | '.join(shown)} |")
    return [*lines, ""]


def _target_section(results: Results) -> list[str]:
    lines = ["## Targets", "", "| setting | method | saved, at least | saved | |", "|---|---|---|---|---|"]
    for target in TARGETS:
        if target.cell in results:
            saved, _ = ratios(results, target.cell, target.method)
            met = "met" if saved >= target.least else "missed"
            lines.append(f"| {target.cell} | {target.method} | {target.least:.2f} | {saved:.2f} | {met} |")
    worse = worse_than_peft_fa(results)
    said = "; ".join(worse) if worse else "none"
    return [*lines, "", f"Settings in which a lean method is above PEFT LoRA-FA, saved or peak: {said}.", ""]


def main() -> None:
    """Measure, print, and write the Markdown and JSON files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile; writes nothing")
    parser.add_argument("--cells", nargs="*", help="settings by name; default: all; writes nothing")
    parser.add_argument("--detail", nargs=2, metavar=("CELL", "METHOD"), help="print what is kept by which module")
    parser.add_argument("--out", type=Path, default=OUT, help="path of the results without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    cells = [cell for cell in LLAMA + OTHERS if not args.cells or cell.name in args.cells]
    if args.detail:
        name, method = args.detail
        case = build(next(cell for cell in cells if cell.name == name), method)
        print(saved_bytes(case.forward, module=case.model))
        return
    results = measure_all(cells, () if args.no_compile else COMPILED_CELLS)
    page = report(cells, results, "python -m tests.benchmarks.lora_fa_memory")
    print(page)
    if not args.no_compile and not args.cells:
        rows = [
            {**cell.to_dict(), "method": method, **asdict(figure)}
            for cell in cells
            for method, figure in results[cell.name].items()
        ]
        args.out.with_suffix(".md").write_text(page)
        args.out.with_suffix(".json").write_text(json.dumps(rows, separators=(",", ":")).replace("},{", "},\n{") + "\n")


if __name__ == "__main__":
    main()
