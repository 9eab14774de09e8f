"""A mixture-of-experts layer on one GPU: its kernels beside chains of PyTorch's operations, and three ways to multiply.

    python -m tests.benchmarks.moe_gpu                          # needs a CUDA device; a few minutes
    python -m tests.benchmarks.moe_gpu --parts kernels          # the kernels alone, about a minute
    python -m tests.benchmarks.moe_gpu --device cpu             # tiny shapes on the CPU, to see that it runs
    TRITON_INTERPRET=1 python -m tests.benchmarks.moe_gpu --device cpu --parts kernels   # with the Triton kernels

*Kernels*: the gate (softmax, choice, places in the experts' queues), rows into slots, and rows back with weights, each
forward and backward; peak memory is what the call adds. The chain is what one writes without this package: softmax,
topk, one_hot and cumsum; repeat_interleave and indexed copies; an indexed read, a product and a sum.

*Experts*: a layer of the published shapes, forward and backward, with even routes and with tokens that prefer some
experts: slots padded to a capacity of 1.25, whose overflow is dropped; slots padded to the longest queue; and no
padding, which is a grouped product in bfloat16.

Dimension letters: S tokens, M model size, H hidden size of an expert, E experts, k choices per token, T slots per
expert, N slots.
"""

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from lightning_efficient.moe import ops, torch_ops
from lightning_efficient.moe.experts import Experts
from tests.benchmarks.lora_fa_gpu import Row, empty, peak_memory, reset_peak, table
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.timing import timed

OUT = Path(__file__).parents[2] / "docs" / "benchmarks"
GATE_AND_PERMUTE, UNPERMUTE = 3, 2
"""Targets: how many times faster than the chain."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer of a published model."""

    model: str
    S: int
    M: int
    H: int
    E: int
    k: int

    def __str__(self) -> str:
        return f"{self.S}, {self.M}, {self.E}, {self.k}"


SHAPES = (
    Shape("Mixtral 8x7B", 8192, 4096, 14_336, 8, 2),
    Shape("OLMoE 1B-7B", 16_384, 2048, 1024, 64, 8),
    Shape("Qwen3 30B-A3B", 16_384, 2048, 768, 128, 8),
)
TINY = (Shape("tiny", 64, 32, 48, 4, 2),)


def chain_gate(logits_SE: Tensor, k: int) -> ops.GateOutput:
    """The gate in PyTorch's operations."""
    probs_SE = logits_SE.float().softmax(-1)
    chosen_Sk, expert_Sk = probs_SE.topk(k, -1)
    ids_A = expert_Sk.t().flatten()
    hits_AE = F.one_hot(ids_A, logits_SE.shape[1])
    position_A = hits_AE.cumsum(0).gather(1, ids_A[:, None]).squeeze(1) - 1
    return ops.GateOutput(probs_SE, chosen_Sk, expert_Sk, position_A.view(k, -1).t(), hits_AE.sum(0))


def chain_permute(x_SM: Tensor, slot_Sk: Tensor, source_N: Tensor) -> Tensor:
    """Rows into slots in PyTorch's operations."""
    padded_NM = x_SM.new_zeros(source_N.shape[0] + 1, x_SM.shape[1])  # what was dropped goes to the last row
    return padded_NM.index_copy(0, slot_Sk.flatten(), x_SM.repeat_interleave(slot_Sk.shape[1], 0))[:-1]


def chain_unpermute(h_NM: Tensor, weight_Sk: Tensor, slot_Sk: Tensor, source_N: Tensor) -> Tensor:
    """Rows back with weights in PyTorch's operations."""
    padded_NM = torch.cat([h_NM, h_NM.new_zeros(1, h_NM.shape[1])])
    return (padded_NM[slot_Sk] * weight_Sk[..., None].to(h_NM.dtype)).sum(1)


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers; equal in every run."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def routed(shape: Shape, device: torch.device, skew: float) -> Tensor:
    """Logits under which the first experts are preferred."""
    preference_E = torch.linspace(skew, 0, shape.E, device=device)
    return draw(shape.S, shape.E, device=device) + preference_E


def slots_of(out: ops.GateOutput, T: int) -> tuple[Tensor, Tensor]:
    """Slots of T places per expert, and the assignments in them."""
    N = len(out.counts_E) * T
    slot_Sk = torch.where(out.position_Sk < T, out.expert_Sk * T + out.position_Sk, N)
    return slot_Sk, ops.invert(slot_Sk, N)


Call = Callable[[], tuple[Tensor, ...]]


def with_backward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], g: Tensor) -> Call:
    """A call that returns the result and the gradients of those inputs that have one."""
    wanted = [each for each in inputs if each.requires_grad]

    def run() -> tuple[Tensor, ...]:
        y = function(*inputs)
        return y.detach(), *torch.autograd.grad(y, wanted, g)

    return run


def kernel_calls(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Call, Call]]:
    """Names, and the same operation as a chain and as ours."""
    S, M, E, k = shape.S, shape.M, shape.E, shape.k
    logits = routed(shape, device, skew=0.0).requires_grad_()
    with torch.no_grad():
        out = ops.gate(logits, k)
    slot, source = slots_of(out, math.ceil(1.25 * k * S / E))
    x, dy = draw(S, M, device=device, dtype=dtype).requires_grad_(), draw(S, M, device=device, dtype=dtype)
    h, dh = (draw(len(source) + i, M, device=device, dtype=dtype)[i:] for i in range(2))
    weight = out.chosen_Sk.clone().requires_grad_()
    h.requires_grad_()
    g = draw(S, k, device=device)

    def forward(function: Callable[..., Any], *inputs: Any) -> Call:
        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                result = function(*inputs)
            return tuple(result) if isinstance(result, tuple) else (result,)

        return run

    gates = [lambda logits, gate=gate: gate(logits, k).chosen_Sk for gate in (chain_gate, ops.gate)]
    yield "gate", forward(chain_gate, logits, k), forward(ops.gate, logits, k)
    yield "gate, and backward", *(with_backward(gate, (logits,), g) for gate in gates)
    moves = (
        ("permute", chain_permute, ops.permute, (x,), dh),
        ("unpermute", chain_unpermute, ops.unpermute, (h, weight), dy),
    )
    for name, chain, ours, inputs, gradient in moves:
        yield name, forward(chain, *inputs, slot, source), forward(ours, *inputs, slot, source)
        both = [lambda *tensors, f=f: f(*tensors, slot, source) for f in (chain, ours)]
        yield f"{name}, and backward", *(with_backward(each, inputs, gradient) for each in both)


def kernels(shapes: tuple[Shape, ...], device: torch.device, rounds: int) -> list[Row]:
    """Time the forms in turns, and compare their results."""
    rows: list[Row] = []
    has_triton = ops._functions_for(torch.zeros(1, device=device)) is not torch_ops
    for shape in track(shapes, description="kernels"):
        for dtype in (torch.bfloat16, torch.float32):
            for name, chain, ours in kernel_calls(shape, dtype, device):
                if name.startswith("gate") and dtype != torch.float32:
                    continue  # the router computes in float32
                forms: dict[str, Call] = {"chain": chain, "ours in torch": _in_torch(ours)}
                if has_triton:
                    forms["triton"] = ours
                expected = [each.double() for each in chain()]
                off = max(_distance(mine, torchs) for mine, torchs in zip(ours(), expected, strict=True))
                del expected
                peaks = {form: _peak(call, device) for form, call in forms.items()}
                times: dict[str, list[float]] = {form: [] for form in forms}
                for _ in range(rounds + 3):
                    for form, call in forms.items():
                        times[form].append(timed(call, device))
                medians = {form: statistics.median(each[3:]) for form, each in times.items()}
                best = "triton" if has_triton else "ours in torch"
                rows.append(
                    {
                        "operation": name,
                        "S, M, E, k": str(shape),
                        "dtype": str(dtype).removeprefix("torch."),
                        **{f"{form}, ms": value for form, value in medians.items()},
                        f"chain / {best}": medians["chain"] / medians[best],
                        **{f"peak, {form}, MiB": value / 2**20 for form, value in peaks.items() if value},
                        "relative difference": off,
                    }
                )
            empty(device)
    return rows


def _in_torch(call: Call) -> Call:
    """The call with the Triton path switched off."""
    chosen = ops._functions_for

    def run() -> tuple[Tensor, ...]:
        ops._functions_for = lambda *_, **__: torch_ops
        try:
            return call()
        finally:
            ops._functions_for = chosen

    return run


def _distance(mine: Tensor, expected: Tensor) -> float:
    return float((mine.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def _peak(call: Call, device: torch.device) -> int:
    call()
    reset_peak(device)
    before = peak_memory(device)
    call()
    return peak_memory(device) - before


class Layer:
    """The whole layer, with weights and routes that stay: what is timed is a step of it."""

    def __init__(self, shape: Shape, device: torch.device, skew: float) -> None:
        self.shape = shape
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with torch.device(device):
            self.experts = Experts(shape.E, shape.M, shape.H).to(self.dtype)
        self.x_SM = draw(shape.S, shape.M, device=device, dtype=self.dtype).requires_grad_()
        self.dy_SM = draw(shape.S, shape.M, device=device, dtype=self.dtype)
        self.logits_SE = routed(shape, device, skew).requires_grad_()
        self.wanted = [self.x_SM, self.logits_SE, *self.experts.parameters()]

    def padded(self, capacity: float | None) -> tuple[Tensor, int, int]:
        """Return the result, the rows that the experts computed, and the assignments that were dropped."""
        out = ops.gate(self.logits_SE, self.shape.k)
        T = (
            int(out.counts_E.max())
            if capacity is None
            else math.ceil(capacity * self.shape.k * self.shape.S / self.shape.E)
        )
        slot, source = slots_of(out, T)
        rows_ETM = ops.permute(self.x_SM, slot, source).view(self.shape.E, T, -1)
        y_NM = self.experts.padded(rows_ETM, self.experts.weights(self.dtype)).flatten(0, 1)
        return ops.unpermute(y_NM, out.chosen_Sk, slot, source), len(source), int((slot == len(source)).sum())

    def ragged(self) -> tuple[Tensor, int, int]:
        """The same without padding."""
        out = ops.gate(self.logits_SE, self.shape.k)
        starts_E = out.counts_E.cumsum(0) - out.counts_E
        slot = starts_E[out.expert_Sk] + out.position_Sk
        source = ops.invert(slot, slot.numel())
        rows_NM = ops.permute(self.x_SM, slot, source)
        y_NM = self.experts.ragged(rows_NM, out.counts_E.tolist(), self.experts.weights(self.dtype))
        return ops.unpermute(y_NM, out.chosen_Sk, slot, source), len(source), 0

    def step(self, forward: Callable[[], tuple[Tensor, int, int]]) -> tuple[Tensor, ...]:
        """Forward and backward; the result and all gradients."""
        y_SM = forward()[0]
        return y_SM.detach(), *torch.autograd.grad(y_SM, self.wanted, self.dy_SM)


def experts(shapes: tuple[Shape, ...], device: torch.device, rounds: int) -> list[Row]:
    """Time the three ways in turns; the two that drop nothing have to agree."""
    rows: list[Row] = []
    for shape in track(shapes, description="experts"):
        for skew in (0.0, 2.0):
            layer = Layer(shape, device, skew)
            ways: dict[str, Callable[[], tuple[Tensor, int, int]]] = {
                "padded to 1.25, drops": lambda layer=layer: layer.padded(1.25),
                "padded to the longest": lambda layer=layer: layer.padded(None),
                "not padded": layer.ragged,
            }
            longest, ragged = (layer.step(ways[name]) for name in ("padded to the longest", "not padded"))
            off = max(_distance(mine, theirs.double()) for mine, theirs in zip(ragged, longest, strict=True))
            del longest, ragged
            empty(device)
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds + 3):
                for name, way in ways.items():
                    times[name].append(timed(lambda way=way, layer=layer: layer.step(way), device))
            for name, way in ways.items():
                _, computed, dropped = way()
                assignments = shape.S * shape.k
                rows.append(
                    {
                        "model": shape.model,
                        "S, M, E, k": str(shape),
                        "H": shape.H,
                        "routes": "skewed" if skew else "even",
                        "way": name,
                        "ms": statistics.median(times[name][3:]),
                        "rows / assignments": computed / assignments,
                        "dropped": f"{dropped / assignments:.1%}",
                        "added at the peak, GiB": _peak(lambda way=way, layer=layer: layer.step(way), device) / 2**30,
                        "off the longest": off if name == "not padded" else "",
                    }
                )
            del layer, ways
            empty(device)
    return rows


def verdicts(rows: list[Row]) -> list[Row]:
    """The targets: the gate in float32, as routers compute, and rows in bfloat16."""
    found = []
    for target, names in ((GATE_AND_PERMUTE, ("gate", "permute")), (UNPERMUTE, ("unpermute",))):
        for shape in dict.fromkeys(row["S, M, E, k"] for row in rows):
            chosen = [
                row
                for row in rows
                if row["S, M, E, k"] == shape
                and row["operation"] in names
                and row["dtype"] == ("float32" if row["operation"] == "gate" else "bfloat16")
            ]
            chain, ours = (sum(row.get(f"{form}, ms", math.nan) for row in chosen) for form in ("chain", "triton"))
            ratio = chain / ours
            met = "not measured" if math.isnan(ratio) else "met" if ratio >= target else "missed"
            found.append({"what": " + ".join(names), "S, M, E, k": shape, "target": target, "found": ratio, "": met})
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default cuda")
    parser.add_argument("--parts", nargs="*", choices=["kernels", "experts"], default=["kernels", "experts"])
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each form (default 30)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: run this on a machine with a GPU, or pass --device cpu to see that it runs.")
    if args.device == "cpu":
        args.rounds = 1
    return args


def main() -> None:
    """Measure, print, and write the page when a GPU was measured."""
    args = parse()
    device = torch.device(args.device)
    shapes = SHAPES if device.type == "cuda" else TINY
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    parts: dict[str, list[Row]] = {}
    if "kernels" in args.parts:
        parts["Kernels"] = kernels(shapes, device, args.rounds)
        parts["Targets"] = verdicts(parts["Kernels"]) if device.type == "cuda" else []
    if "experts" in args.parts:
        parts["Experts"] = experts(shapes, device, args.rounds)
    page = "\n".join(
        [
            "# A mixture-of-experts layer on a GPU",
            "",
            f"Command: `python -m tests.benchmarks.moe_gpu --parts {' '.join(args.parts)}`",
            "",
            f"Device: {name}. Machine: {describe_machine()}. Date: {datetime.date.today().isoformat()}",
            "",
            *(table(title, rows) for title, rows in parts.items()),
        ]
    )
    print(page)
    if device.type == "cuda":
        stem = "moe_gpu_" + name.removeprefix("NVIDIA ").replace(" ", "_").lower()
        (OUT / f"{stem}.md").write_text(page)
        (OUT / f"{stem}.json").write_text(json.dumps(parts, indent=1) + "\n")


if __name__ == "__main__":
    main()
