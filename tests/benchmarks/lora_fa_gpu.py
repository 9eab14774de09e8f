"""LoRA-FA on one GPU: memory, tokens per second, largest batch, beside PEFT's LoRA and LoRA-FA; the Triton kernels.

    python -m tests.benchmarks.lora_fa_gpu                         # needs a CUDA device; hours: better in parts
    python -m tests.benchmarks.lora_fa_gpu --models 1b --sequence 2048 --settings bf16   # such as this one
    python -m tests.benchmarks.lora_fa_gpu --parts kernels         # kernels alone, a minute
    python -m tests.benchmarks.lora_fa_gpu --device cpu            # tiny shapes on the CPU, to see that it runs
    TRITON_INTERPRET=1 python -m tests.benchmarks.lora_fa_gpu --device cpu --parts kernels   # the kernels likewise

Models have the published shapes of Llama 3 and random bfloat16 weights; a step is forward, backward and AdamW on the
adapters (float32, r = 16, all linears of the layers). The loss is a cross-entropy over chunks of tokens whose logits
are computed again in backward, so that logits do not hide what the layers keep; --loss whole has all logits at once.
Needs the extra `peft`.

Dimension letters: T tokens, K inputs, N outputs, R rank, F width of the feed-forward block.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.lora_fa import projection
from lightning_efficient.lora_fa.dropout import draw_seed
from lightning_efficient.lora_fa.gated_mlp import GATES
from tests.benchmarks._lora_fa_cases import LEAN, LEAN_ALL, LORA, PEFT_FA, PLAIN, Cell, adapt
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.timing import timed

OUT = Path(__file__).parents[2] / "docs" / "benchmarks"

SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 8},
}
VOCABULARY, KV_HEADS = 128_256, 8
SETTINGS = {
    "bf16": Cell("bf16", base="bfloat16"),
    "bf16, dropout .05": Cell("bf16, dropout .05", base="bfloat16", p=0.05),
    "bf16-mixed": Cell("bf16-mixed", mixed=True),
}
CHECKPOINTED = {"PEFT LoRA, checkpointing": LORA, "ours, lean + MLP + norm, checkpointing": LEAN_ALL}
METHODS = (LORA, PEFT_FA, LEAN, LEAN_ALL, *CHECKPOINTED)
CHUNK = 1024
LARGEST_BATCH = 1024
Row = dict[str, Any]


def make_model(size: str, method: str, setting: Cell, device: torch.device) -> nn.Module:
    """Return a Llama with random weights and the method's adapters, in training mode."""
    import transformers

    vocabulary = 256 if size == "tiny" else VOCABULARY
    config: Any = transformers.LlamaConfig(
        vocab_size=vocabulary, num_key_value_heads=KV_HEADS, max_position_embeddings=131_072, **SHAPES[size]
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, setting.base))
    try:
        with torch.device(device):
            model: Any = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if method in CHECKPOINTED:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = adapt(model, setting, CHECKPOINTED.get(method, method))
    return adapted.train()


def loss_of(model: nn.Module, ids: Tensor, *, chunked: bool) -> Tensor:
    """Mean cross-entropy of the next token."""
    causal: Any = next(each for each in model.modules() if type(each).__name__ == "LlamaForCausalLM")
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()

    def total(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(causal.lm_head(part).float(), wanted, reduction="sum")

    if not chunked:
        return total(hidden, labels) / len(labels)
    sums = [
        checkpoint(total, hidden[i : i + CHUNK], labels[i : i + CHUNK], use_reentrant=False)
        for i in range(0, len(labels), CHUNK)
    ]
    return torch.stack(sums).sum() / len(labels)


class Trial:
    """One method on one model and setting; runs steps at any batch."""

    def __init__(self, size: str, method: str, setting: Cell, device: torch.device, chunked: bool) -> None:
        self.device, self.setting, self.chunked = device, setting, chunked
        self.model = make_model(size, method, setting, device)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True
        )
        self.vocabulary = 256 if size == "tiny" else VOCABULARY
        self.weights = sum(p.numel() * p.element_size() for p in self.model.parameters())

    def step(self, ids: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.mixed):
            loss = loss_of(self.model, ids, chunked=self.chunked)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, batch: int, length: int, steps: int) -> Row | None:
        """Return the peak and the speed, None where memory does not suffice."""
        ids = torch.randint(0, self.vocabulary, (batch, length), device=self.device)
        times: list[float] = []
        with contextlib.suppress(torch.OutOfMemoryError):  # what the error holds is free only once it is gone
            self.step(ids)  # makes the optimizer's state, and the kernels
            reset_peak(self.device)
            times = [timed(lambda: self.step(ids), self.device) for _ in range(steps)]
        if not times:
            self.optimizer.zero_grad()
            empty(self.device)
            return None
        peak = peak_memory(self.device)
        return {
            "batch": batch,
            "peak, GiB": peak / 2**30,
            "above weights, GiB": max(0, peak - self.weights) / 2**30,
            "tokens/s": 1e3 * batch * length / statistics.median(times),
        }


def sweep(trial: Trial, length: int, steps: int, limit: int) -> tuple[list[Row], int]:
    """Double the batch until memory ends; return what was measured, and the largest batch that fits, within 12%."""
    rows: list[Row] = []
    fits, batch = 0, 1
    while batch <= limit:
        row = trial.measure(batch, length, steps)
        if row is None:
            break
        rows.append(row)
        fits, batch = batch, 2 * batch
    too_many = batch
    while too_many <= limit and too_many - fits > max(1, fits // 8):
        middle = (fits + too_many) // 2
        if trial.measure(middle, length, 1) is None:
            too_many = middle
        else:
            fits = middle
    return rows, fits


def training(args: argparse.Namespace, device: torch.device) -> tuple[list[Row], list[Row]]:
    """Return the sweep's rows, and a row for each case with its largest batch."""
    rows: list[Row] = []
    largest: list[Row] = []
    cases = [(m, s, t) for m in args.models for s in args.settings for t in args.sequence]
    for size, name, length in cases:
        for method in track(args.methods, description=f"{size}, {name}, {length}"):
            case = {"model": size, "setting": name, "sequence": length, "method": method}
            trial = None
            with contextlib.suppress(torch.OutOfMemoryError):
                trial = Trial(size, method, SETTINGS[name], device, args.loss == "chunked")
            if trial is None:
                largest.append({**case, "largest batch": 0})
                empty(device)
                continue
            found, fits = sweep(trial, length, args.steps, args.largest_batch)
            rows += [{**case, **row} for row in found]
            largest.append({**case, "largest batch": f"{fits} or more" if fits == args.largest_batch else fits})
            del trial
            empty(device)
    return rows, largest


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def whole_models(device: torch.device) -> list[Row]:
    """The lean forward beside our plain one, equal weights: the loss and the gradients of B, relative differences."""
    rows = []
    ids = torch.randint(0, 256, (2, 64), device=device)
    for name, setting in {
        "float32": Cell("fp32"),
        "bf16": SETTINGS["bf16"],
        "bf16-mixed": SETTINGS["bf16-mixed"],
    }.items():
        results = []
        for method in (PLAIN, LEAN, LEAN_ALL):
            model = make_model("tiny", method, setting, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=setting.mixed):
                loss = loss_of(model, ids, chunked=False)
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            results.append((loss.item(), gradient))
        (plain_loss, plain), *others = results
        for method, (loss_value, gradient) in zip((LEAN, LEAN_ALL), others, strict=True):
            off = ((gradient - plain).norm() / plain.norm()).item()
            rows.append(
                {"setting": name, "method": method, "loss": abs(loss_value / plain_loss - 1), "gradients of B": off}
            )
    return rows


def in_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with the Triton path switched off."""

    def run(*args: Any) -> Any:
        with mock.patch.object(projection, "runs_on_triton", return_value=False):
            return function(*args)

    return run


Pair = tuple[Callable[[], Any], Callable[[], Any]]


def kernel_pairs(T: int, K: int, R: int, dtype: torch.dtype, device: torch.device) -> dict[str, Pair]:
    """Return the torch and the Triton form of each operation on the same tensors."""
    from lightning_efficient.lora_fa import triton_ops

    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(like)

    x_TK, A_RK, u_TR = draw(T, K), draw(R, K, like=torch.float32), draw(T, R, like=torch.float32)
    e_TK, g_TK = draw(T, K), draw(T, K)
    seed_2, p = draw_seed(), 0.05

    def expand(function: Callable[..., None]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            dx_TK = x_TK.clone()
            function(dx_TK, u_TR, A_RK, seed_2, p)
            return dx_TK

        return run

    gate = GATES["silu"]
    return {
        "project with dropout": (
            lambda: in_torch(projection.project)(x_TK, A_RK, seed_2, p),
            lambda: triton_ops.project(x_TK, A_RK, seed_2, p),
        ),
        "expand with dropout (and a copy of dx)": (
            expand(in_torch(projection.add_expanded)),
            expand(triton_ops.add_expanded),
        ),
        "swiglu": (lambda: gate.product(e_TK, g_TK), lambda: triton_ops.swiglu(e_TK, g_TK)),
        "swiglu gradients (torch: and a copy)": (
            lambda: torch.stack(gate.gradients(x_TK.clone(), e_TK, g_TK)),
            lambda: torch.stack(triton_ops.swiglu_gradients(x_TK, e_TK, g_TK)),
        ),
    }


def kernels(device: torch.device, rounds: int) -> list[Row]:
    """Time both forms in turns, and compare their results."""
    shapes = (
        [(64, 96, 16)]
        if device.type == "cpu"
        else [(8192, 2048, 16), (8192, 4096, 16), (8192, 14_336, 16), (8192, 4096, 64)]
    )
    rows = []
    for T, K, R in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            pairs = kernel_pairs(T, K, R, dtype, device)
            for name, (plain, fused) in pairs.items():
                expected, found = plain().double(), fused().double()
                times: list[tuple[float, float]] = []
                for _ in range(rounds + 3):
                    times.append((timed(plain, device), timed(fused, device)))
                torch_ms, triton_ms = (statistics.median(each) for each in zip(*times[3:], strict=True))
                rows.append(
                    {
                        "operation": name,
                        "T, K, R": f"{T}, {K}, {R}",
                        "dtype": str(dtype).removeprefix("torch."),
                        "torch, ms": torch_ms,
                        "triton, ms": triton_ms,
                        "torch / triton": torch_ms / triton_ms,
                        "relative difference": ((found - expected).norm() / expected.norm()).item(),
                    }
                )
    return rows


def table(title: str, rows: list[Row]) -> str:
    """Rows as Markdown."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"## {title}", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append(f"| {' | '.join(f'{c:.3g}' if isinstance(c, float) and c < 1e3 else _plain(c) for c in cells)} |")
    return "\n".join([*lines, ""])


def _plain(cell: Any) -> str:
    return f"{cell:.0f}" if isinstance(cell, float) else str(cell)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default cuda")
    parser.add_argument("--parts", nargs="*", choices=["kernels", "correctness", "training"], help="default: all")
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=["1b", "3b", "8b"], help="default 1b 3b 8b")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=["bf16", "bf16, dropout .05"])
    parser.add_argument("--sequence", nargs="*", type=int, default=[1024, 2048, 4096, 8192], help="tokens of a row")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--loss", choices=["chunked", "whole"], default="chunked", help="default chunked")
    parser.add_argument("--steps", type=int, default=3, help="timed steps at each batch (default 3)")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each kernel (default 30)")
    parser.add_argument("--largest-batch", type=int, default=LARGEST_BATCH, help=f"default {LARGEST_BATCH}")
    args = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if args.device == "cpu" and "kernels" in (args.parts or []) and not interpreted:
        parser.error("the kernels run on a CPU only when interpreted: set TRITON_INTERPRET=1.")
    without_kernels = args.device == "cpu" and not interpreted
    args.parts = args.parts or [*([] if without_kernels else ["kernels"]), "correctness", "training"]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: run this on a machine with a GPU, or pass --device cpu to see that it runs.")
    if args.device == "cpu":
        args.models, args.sequence, args.largest_batch = ["tiny"], [32], 2
        args.settings, args.rounds = list(SETTINGS), 1
    return args


def main() -> None:
    """Measure, print, and write the page when a GPU was measured."""
    args = parse()
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    parts: dict[str, list[Row]] = {}
    if "kernels" in args.parts:
        parts["Kernels"] = kernels(device, args.rounds)
    if "correctness" in args.parts:
        parts["Lean beside plain: relative differences"] = whole_models(device)
    if "training" in args.parts:
        parts["Batch sweep"], parts["Largest batch"] = training(args, device)
    chosen = [f"--models {' '.join(args.models)}", f"--sequence {' '.join(map(str, args.sequence))}"]
    chosen += ["--settings " + " ".join(f"'{each}'" for each in args.settings), f"--loss {args.loss}"]
    page = "\n".join(
        [
            "# LoRA-FA on a GPU",
            "",
            f"Command: `python -m tests.benchmarks.lora_fa_gpu {' '.join(chosen)}`",
            "",
            f"Device: {name}. Machine: {describe_machine()}, peft {importlib.metadata.version('peft')}. "
            f"Date: {datetime.date.today().isoformat()}",
            "",
            *(table(title, rows) for title, rows in parts.items()),
        ]
    )
    print(page)
    if device.type == "cuda":
        stem = "lora_fa_gpu_" + name.replace(" ", "_").lower()
        (OUT / f"{stem}.md").write_text(page)
        (OUT / f"{stem}.json").write_text(json.dumps(parts, indent=1) + "\n")


if __name__ == "__main__":
    main()
