"""A large Llama on one GPU under each technique: tokens/s, peak memory, MFU, the module table; memory against its
prediction.

    python -m tests.benchmarks.dissect_gpu                            # 7B in bfloat16 on an 80 GB GPU or larger
    python -m tests.benchmarks.dissect_gpu --model 1.3b --seq 512     # a smaller one
    python -m tests.benchmarks.dissect_gpu --model tiny --device cpu  # to see that it runs

Each case is one of `lightning-efficient bench`, in a process of its own; started again, it runs only what is missing.
Held against the targets: memory predicted without running the model within 5 % of the allocator's peak, rows of modules
with 95 % of the GPU's busy time, and an MFU for every case. Extra `peft`, for L.
"""

import argparse
import datetime
import functools
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_efficient.cli.recipes import find_recipe
from lightning_efficient.dissect import CaseResult, DissectReport, MemoryPrediction, from_json, predict_memory
from lightning_efficient.dissect.attribution import IDLE, UNATTRIBUTED
from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa
from lightning_efficient.models import LlamaLM
from tests.benchmarks.machine import describe_machine

OUT = Path(__file__).parents[2] / "docs" / "benchmarks"
TECHNIQUES = ["none", "F", "R", "F+R", "L", "LFA"]
MEMORY_TARGET, BUSY_TARGET = 0.05, 0.95
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep, predict each case's memory, and write the page and the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b", help="an overlay of bench/models (default: 7b)")
    parser.add_argument("--techniques", nargs="+", default=TECHNIQUES, help=f"default: {' '.join(TECHNIQUES)}")
    parser.add_argument("--seq", nargs="+", type=int, default=[512, 2048], help="tokens of a row (default: 512 2048)")
    parser.add_argument("--micro-batch", type=int, default=1, help="rows (default: 1)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a case (default: 600)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page (default: docs/benchmarks)")
    parser.add_argument("--work", type=Path, default=Path("dissect_gpu"), help="folder of the sweep, kept to go on")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --model tiny shows that it runs")
    results = _sweep(options)
    rows = [(each, _predicted(each, options)) for each in results]
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    stem = f"dissect_{options.model}_{name.split()[-1].lower()}_{datetime.date.today():%Y%m}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{stem}.md").write_text(_page(rows, options, name), encoding="utf-8")
    print((options.out / f"{stem}.md").read_text())
    return 0


def _sweep(options: argparse.Namespace) -> list[CaseResult]:
    options.work.mkdir(parents=True, exist_ok=True)
    sweep = {
        "recipe": "bench/llama",
        "matrix": {
            "model": [options.model],
            "technique": options.techniques,
            "seq": options.seq,
            "micro_batch": [options.micro_batch],
            "world": [1],
        },
        "window": {"warmup": 3, "clean": 20, "dissect": 2, "memory": 1},
        "limits": {"timeout_s": options.timeout},
        "overrides": [f"--trainer.accelerator={options.device}"],
        "report": {"out": str(options.work)},
    }
    file = options.work / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    command = [sys.executable, "-m", "lightning_efficient", "bench", "-c", str(file), "--out", str(options.work)]
    subprocess.run(command, check=True)
    lines = (options.work / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [from_json(CaseResult, each) for each in map(json.loads, lines) if "case_id" in each]


def _predicted(result: CaseResult, options: argparse.Namespace) -> MemoryPrediction | None:
    """The memory of a case, from shapes alone."""
    if result.status != "ok":
        return None
    technique, length = str(result.axes["technique"]), int(result.axes["seq"])
    overlay = yaml.safe_load(find_recipe(f"bench/models/{options.model}").read_text(encoding="utf-8"))
    shape = {"vocab_size": 256, **overlay["model"]["init_args"], "init_on_device": False}
    dtype = torch.bfloat16 if overlay.get("trainer", {}).get("precision") == "bf16-true" else torch.float32
    letters = technique.split("+")

    def build() -> nn.Module:
        attention = "sdpa" if "F" in letters else "eager"
        module = LlamaLM(attention=attention, activation_checkpointing="R" in letters, **shape).to(dtype).model.train()
        if "L" in letters:
            import peft

            peft.inject_adapter_in_model(peft.LoraConfig(r=64, lora_alpha=128, target_modules=LINEARS), module)
        if "LFA" in letters:
            apply_lora_fa(module, LoRAFAConfig(r=64, alpha=128))
        return module

    return predict_memory(
        build,
        lambda: torch.zeros(options.micro_batch, length, dtype=torch.int64),
        run=_loss,
        optimizer=functools.partial(_adamw, foreach=options.device == "cuda"),
        device=options.device,
    )


def _loss(model: nn.Module, ids_BT: Tensor) -> Tensor:
    total = F.cross_entropy(model(ids_BT).flatten(0, 1).float(), ids_BT.flatten(), reduction="sum")
    return total / ids_BT.numel()


def _adamw(parameters: Iterable[nn.Parameter], *, foreach: bool) -> Optimizer:
    return AdamW(parameters, lr=1e-3, foreach=foreach)


def _page(rows: list[tuple[CaseResult, MemoryPrediction | None]], options: argparse.Namespace, name: str) -> str:
    lines = [
        f"# Llama {options.model} on {name}, by technique",
        "",
        f"Micro-batch {options.micro_batch}, one process; overlays of `recipes/bench`. *Predicted*: peak of memory "
        "from shapes alone (`predict_memory`). *In modules*: share of the GPU's busy time in rows of modules, "
        "of the loss and of the optimizer.",
        "",
        "| technique | sequence | tokens/s | step | peak | predicted | off by | MFU | HFU | in modules | status |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(result, prediction) for result, prediction in rows]
    lines += ["", f"Targets: memory within {MEMORY_TARGET:.0%}, modules {BUSY_TARGET:.0%}, an MFU everywhere.", ""]
    for result, _ in rows:
        if result.report is not None:
            lines += _modules(result)
    command = " ".join(["python -m tests.benchmarks.dissect_gpu", *sys.argv[1:]])
    lines += [f"Command: `{command}`. {describe_machine()}, {name}, {datetime.date.today():%Y-%m-%d}.", ""]
    return "\n".join(lines)


def _row(result: CaseResult, prediction: MemoryPrediction | None) -> str:
    report, axes = result.report, result.axes
    if report is None or prediction is None:
        return f"| {axes['technique']} | {axes['seq']} " + "| " * 8 + f"| {result.status}: {result.reason} |"
    peak = report.memory.peak_bytes
    cells = [
        f"{report.throughput.tokens_per_s or 0:,.0f}",
        f"{1e3 * report.throughput.step_s.p50:.1f} ms",
        f"{peak / 2**30:.2f} GiB" if peak else "",
        f"{prediction.peak_bytes / 2**30:.2f} GiB",
        f"{prediction.peak_bytes / peak - 1:+.1%}" if peak else "",
        f"{report.flops.mfu:.1%}" if report.flops.mfu else "none",
        f"{report.flops.hfu:.1%}" if report.flops.hfu else "none",
        f"{_in_modules(report):.1%}" if report.device else "no GPU",
    ]
    return f"| {axes['technique']} | {axes['seq']} | {' | '.join(cells)} | ok |"


def _in_modules(report: DissectReport) -> float:
    assert report.device is not None
    busy = sum(row.total_s for row in report.device.rows if row.name != IDLE)
    lost = sum(row.total_s for row in report.device.rows if row.name == UNATTRIBUTED)
    return 1 - lost / busy


def _modules(result: CaseResult, shown: int = 10) -> list[str]:
    assert result.report is not None
    breakdown = result.report.device or result.report.host
    if breakdown is None:
        return []
    by_role: dict[str, list[float]] = {}
    for row in breakdown.rows:
        sums = by_role.setdefault(row.role if row.is_module else row.name, [0.0] * 4)
        for at, value in enumerate((row.forward_s, row.recompute_s, row.backward_s, row.total_s)):
            sums[at] += value
    largest = sorted(by_role.items(), key=lambda item: -item[1][3])[:shown]
    lines = [
        f"## {result.axes['technique']}, sequence {result.axes['seq']}",
        "",
        f"One step by the {breakdown.clock}'s clock, in ms.",
        "",
        "| part | forward | recompute | backward | all | share |",
        "|---|---|---|---|---|---|",
    ]
    for name, sums in largest:
        values = " | ".join(f"{1e3 * value:.2f}" for value in sums)
        lines.append(f"| {name} | {values} | {sums[3] / breakdown.step_s:.1%} |")
    return [*lines, ""]


if __name__ == "__main__":
    raise SystemExit(main())
