"""The Triton kernels give what torch's operations give, interpreted on the CPU; and they compile for a GPU."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.moe.ops import gate, invert, permute, unpermute
from tests.moe.test_ops import normal, slots

triton = pytest.importorskip("triton")

# tokens, experts, choices, dtype, bias
GATES: dict[str, tuple[int, int, int, str, bool]] = {
    "whole blocks": (64, 8, 2, "float32", False),
    "odd sizes": (75, 5, 2, "float32", False),
    "many blocks": (300, 3, 2, "float32", False),
    "many experts": (40, 200, 2, "float32", False),
    "every expert": (20, 6, 6, "float32", False),
    "one of each": (1, 1, 1, "float32", False),
    "no tokens": (0, 5, 2, "float32", False),
    "bias": (40, 8, 2, "float32", True),
    "bfloat16": (40, 8, 2, "bfloat16", False),
    "float16": (40, 8, 1, "float16", True),
    "ties": (60, 8, 3, "float32", False),
    "not finite": (60, 8, 3, "float32", False),
}
# tokens, slots, choices, width, dtype, dtype of the slots
MOVES: dict[str, tuple[int, int, int, int, str, str]] = {
    "whole blocks": (16, 32, 2, 256, "float32", "float32"),
    "odd sizes": (13, 37, 3, 77, "float32", "float32"),
    "wide": (3, 5, 1, 2100, "float32", "float32"),
    "narrow": (9, 20, 2, 1, "float32", "float32"),
    "no tokens": (0, 5, 2, 8, "float32", "float32"),
    "no slots": (5, 0, 2, 8, "float32", "float32"),
    "bfloat16": (13, 37, 2, 77, "bfloat16", "bfloat16"),
    "float16": (13, 37, 2, 77, "float16", "float16"),
    "cast": (13, 37, 2, 77, "float32", "bfloat16"),
}


def gate_case(name: str) -> list[Tensor]:
    S, E, k, dtype, bias = GATES[name]
    logits = normal(S, E, dtype=torch.float32)
    if name == "ties":
        logits = logits.round() * torch.where(normal(S, E, seed=9) > 0, 1.0, -1.0)  # zeros of both signs
    if name == "not finite":
        logits = torch.where(logits > 0.7, -math.inf, logits)
        logits[:, 3], logits[7:20, 5], logits[30] = 1.0, math.nan, -math.inf
    logits = logits.to(getattr(torch, dtype)).requires_grad_()
    out = gate(logits, k, 0.3 * normal(E, seed=1, dtype=torch.float32) if bias else None)
    g_SE, g_Sk = normal(S, E, seed=3, dtype=torch.float32), normal(S, k, seed=4, dtype=torch.float32)
    losses = (out.probs_SE * g_SE).sum(), (out.chosen_Sk * g_Sk).sum()
    wanted = (losses[0], losses[1], losses[0] + losses[1])
    return [
        *(each.detach() for each in out),
        *(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in wanted),
    ]


def move_case(name: str) -> list[Tensor]:
    S, N, k, M, dtype, moved_dtype = MOVES[name]
    rows, moved = getattr(torch, dtype), getattr(torch, moved_dtype)
    slot = slots(S, N, k)
    source = invert(slot, N)
    x, h = normal(S, M, dtype=rows, grad=True), normal(N, M, seed=1, dtype=moved)
    weight = normal(S, k, seed=2, dtype=torch.float32)
    h[source < 0], weight[(slot < 0) | (slot >= N)] = math.nan, math.nan  # nobody may read these
    h.requires_grad_()
    weight.requires_grad_()
    out, y = permute(x, slot, source, dtype=moved), unpermute(h, weight, slot, source)
    dout, dy = normal(N, M, seed=3, dtype=moved), normal(S, M, seed=4, dtype=moved)
    gradients = (
        torch.autograd.grad(out, x, dout)
        + torch.autograd.grad(y, (h, weight), dy, retain_graph=True)
        + torch.autograd.grad(y, h, dy, retain_graph=True)
        + torch.autograd.grad(y, weight, dy)
    )
    return [out.detach(), y.detach(), *gradients]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path: Path = tmp_path_factory.mktemp("triton") / "results.pt"
    command = [sys.executable, "-m", "tests.moe._interpreted", str(path)]
    subprocess.run(command, check=True, timeout=170, env={**os.environ, "TRITON_INTERPRET": "1"})
    results: dict[str, Any] = torch.load(path, weights_only=True)
    return results


@pytest.mark.parametrize("blocks", ["gates", "large"])
@pytest.mark.parametrize("name", GATES)
def test_the_gate_is_torchs(name: str, blocks: str, interpreted: dict[str, Any]) -> None:
    probs, chosen, expert, position, counts, *gradients = interpreted[blocks][name]
    torch_probs, torch_chosen, *counted, torch_1, torch_2, torch_3 = gate_case(name)
    for mine, torchs in zip((expert, position, counts), counted, strict=True):
        assert mine.dtype == torch.int64
        assert torch.equal(mine, torchs)
    # Exponentials and sums of another library; bfloat16 gradients are rounded, by the interpreter towards zero.
    close = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close((probs, chosen), (torch_probs, torch_chosen), **close)
    if GATES[name][3] != "float32":
        close = {"rtol": torch.finfo(getattr(torch, GATES[name][3])).eps, "atol": 1e-5}
    torch.testing.assert_close(gradients, [torch_1, torch_2, torch_3], **close)


@pytest.mark.parametrize("name", MOVES)
def test_the_moves_are_torchs(name: str, interpreted: dict[str, Any]) -> None:
    for mine, torchs in zip(interpreted["moves"][name], move_case(name), strict=True):
        # Sums in another order; the interpreter rounds to bfloat16 towards zero, which doubles the distance.
        rtol = 1e-5 if torchs.dtype == torch.float32 else torch.finfo(torchs.dtype).eps
        torch.testing.assert_close(mine, torchs, rtol=rtol, atol=1e-5)


INTEGERS = {"expert_ptr": "i64", "position_ptr": "i64", "source_ptr": "i64", "slot_ptr": "i64", "total_ptr": "i64"}
INTEGERS |= {"counts_ptr": "i32", "starts_ptr": "i32"}
ROWS = ("logits_ptr", "dlogits_ptr", "x_ptr", "out_ptr", "h_ptr", "y_ptr", "dy_ptr", "dh_ptr")


def assembly(kernel: Any, rows: str, **constants: Any) -> str:
    """The PTX of a kernel for compute capability 9.0, for aligned tensors whose rows are so too."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return f"*{INTEGERS.get(name, rows if name in ROWS else 'fp32')}" if name.endswith("_ptr") else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if name not in constants and (name.endswith("_ptr") or name == "M")
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])


@pytest.fixture
def kernels() -> Any:
    from lightning_efficient.moe import triton_kernels

    if type(triton_kernels.sum_kernel).__name__ == "InterpretedFunction":
        pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    return triton_kernels


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("block_S", "block_E"), [(128, 8), (16, 256)])
def test_the_kernels_of_the_gate_compile(kernels: Any, block_S: int, block_E: int, bias: bool) -> None:
    block = {"BLOCK_S": block_S, "BLOCK_E": block_E, "K": 2}
    absent = {} if bias else {"bias_ptr": None}
    for kernel, constants in (
        (kernels.route_kernel, {"BIAS": bias, **absent, **block}),
        (kernels.scan_kernel, {"BLOCK_C": 256, "BLOCK_E": 8}),
        (kernels.place_kernel, {"K": 2, "BLOCK_S": block_S, "BLOCK_A": 1024}),
        (kernels.route_gradient_kernel, {"PROBS": True, "CHOSEN": True, **block}),
    ):
        assert ".target sm_90" in assembly(kernel, "bf16", **constants)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["fp32", "bf16"])
@pytest.mark.parametrize(("block_rows", "block_M"), [(2, 1024), (8, 256)])
def test_rows_are_moved_sixteen_bytes_at_a_time(kernels: Any, rows: str, block_rows: int, block_M: int) -> None:
    by_slot, by_token = ({name: block_rows, "BLOCK_M": block_M, "K": 2} for name in ("BLOCK_N", "BLOCK_S"))
    for kernel, constants in (
        (kernels.gather_kernel, by_slot),
        (kernels.sum_kernel, {"WEIGHTED": True, **by_token}),
        (kernels.unpermute_gradient_kernel, {"DH": True, "DW": True, **by_slot}),
    ):
        ptx = assembly(kernel, rows, **constants)
        assert {"ld", "st"} == {found[1] for found in re.finditer(r"(ld|st)\.global\.v4\.b32", ptx)}
