"""The Triton kernels and the torch functions beside them are one method, and draw one mask."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.lora_fa import projection
from lightning_efficient.lora_fa.dropout import draw_seed, keep_mask
from lightning_efficient.lora_fa.gated_mlp import GATES, Gate, adapted_gated_mlp
from tests.lora_fa.nets import normal
from tests.lora_fa.test_blocks import three

# rows, columns, rank, dtype of x, dtype of A, dropout, layout, first row
CASES: dict[str, tuple[int, int, int, str, str, float | None, str, int]] = {
    "whole blocks": (64, 64, 16, "float32", "float32", 0.3, "plain", 0),
    "odd sizes": (67, 129, 17, "float32", "float32", 0.3, "plain", 0),
    "one of each": (1, 1, 1, "float32", "float32", 0.3, "plain", 0),
    "many ranks": (5, 70, 100, "float32", "float32", 0.3, "plain", 0),
    "no rows": (0, 12, 4, "float32", "float32", 0.3, "plain", 0),
    "later rows": (30, 33, 5, "float32", "float32", 0.5, "plain", 1000),
    "rows apart": (30, 33, 5, "float32", "float32", 0.5, "rows apart", 0),
    "transposed": (30, 33, 5, "float32", "float32", 0.5, "transposed", 0),
    "without dropout": (30, 33, 5, "float32", "float32", None, "plain", 0),
    "bfloat16 x": (67, 129, 17, "bfloat16", "float32", 0.3, "plain", 3),
    # Triton's interpreter multiplies the bits of bfloat16 matrices as integers: the narrow type here is another.
    "float16": (67, 129, 17, "float16", "float16", 0.3, "plain", 0),
    "float64": (20, 33, 5, "float64", "float64", 0.3, "plain", 0),
}
MASKS = [(130, 70, 0.5, 0), (65, 65, 0.05, 12345), (64, 3, 0.99, 2**31 - 200)]


def seed(value: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(value)
        return draw_seed()


def case(name: str, project: Callable[..., Tensor], add_expanded: Callable[..., None]) -> tuple[Tensor, Tensor]:
    T, K, R, x_dtype, dtype, p, layout, first_row = CASES[name]
    kinds = {"dtype": getattr(torch, x_dtype)}
    x = normal(T, K, **kinds) if layout == "plain" else normal(2 * T, K, **kinds)[::2]
    x = normal(K, T, **kinds).t() if layout == "transposed" else x
    A, u = normal(R, K, seed=1, dtype=getattr(torch, dtype)), normal(T, R, seed=2, dtype=getattr(torch, dtype))
    dx = normal(T, K, seed=3, **kinds)
    drop = (None, 0.0) if p is None else (seed(5), p)
    h = project(x, A, *drop, first_row)
    add_expanded(dx, u, A, *drop, first_row)
    return h, dx


def gate_case(dtype: str, gate: Gate) -> list[Tensor]:
    e, g, da = (normal(13, 101, seed=i, dtype=getattr(torch, dtype)) for i in range(3))
    return [gate.product(e, g), *gate.gradients(da.clone(), e, g)]


def masks_by(project: Callable[..., Tensor]) -> list[Tensor]:
    """The product of ones with an identity is the mask itself."""
    return [project(torch.ones(T, K), torch.eye(K), seed(7), p, first) != 0 for T, K, p, first in MASKS]


def gated_block() -> list[Tensor]:
    x, operands = normal(70, 4, dtype=torch.float32, grad=True), three(0.3, dtype=torch.float32)
    torch.manual_seed(3)
    y = adapted_gated_mlp(x, *operands, "silu")
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *(each.B_NR for each in operands)))]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton")
    path: Path = tmp_path_factory.mktemp("triton") / "results.pt"
    command = [sys.executable, "-m", "tests.lora_fa._interpreted", str(path)]
    subprocess.run(command, check=True, timeout=170, env={**os.environ, "TRITON_INTERPRET": "1"})
    results: dict[str, Any] = torch.load(path, weights_only=True)
    return results


@pytest.mark.parametrize("name", CASES)
def test_products_are_torchs(name: str, interpreted: dict[str, Any]) -> None:
    expected = case(name, projection.project, projection.add_expanded)
    # Sums in another order; the kernel sums narrow products in float32 and rounds once.
    tolerance = {"float32": 1e-5, "float64": 1e-12, "float16": 0.002, "bfloat16": 0.02}
    kinds = (CASES[name][4], CASES[name][3])
    for ours, torchs, kind in zip(interpreted["products"][name], expected, kinds, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=tolerance[kind], atol=20 * tolerance[kind])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gates_are_torchs(dtype: str, interpreted: dict[str, Any]) -> None:
    tolerance = 1e-6 if dtype == "float32" else 0.02
    for ours, torchs in zip(interpreted["gates"][dtype], gate_case(dtype, GATES["silu"]), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)


def test_masks_are_torchs_bit_for_bit(interpreted: dict[str, Any]) -> None:
    for mask, (T, K, p, first) in zip(interpreted["masks"], MASKS, strict=True):
        assert torch.equal(mask, keep_mask(seed(7), (first, first + T), K, p, torch.device("cpu")))
        assert 0 < int(mask.sum()) < mask.numel()


def test_the_whole_block_is_torchs(interpreted: dict[str, Any]) -> None:
    for ours, torchs in zip(interpreted["block"], gated_block(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)
