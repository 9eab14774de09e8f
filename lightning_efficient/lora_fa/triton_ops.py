"""The torch functions of ``projection.py`` and ``gated_mlp.py`` on a GPU, with the same signatures, in Triton.

Dimension letters: T tokens, K inputs, R rank.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_efficient.lora_fa.dropout import threshold
from lightning_efficient.lora_fa.triton_kernels import (
    expand_kernel,
    project_kernel,
    swiglu_gradient_kernel,
    swiglu_kernel,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_ELEMENTS = 1024


def _on_device_of(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Triton launches on the current device, which need not be the one that the first argument is on."""

    @wraps(function)
    def launch(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return launch


@_on_device_of
def project(x_TK: Tensor, A_RK: Tensor, seed_2: Tensor | None, p: float, first_row: int = 0) -> Tensor:
    """:func:`lightning_efficient.lora_fa.projection.project`: x is read once, in its own dtype."""
    x_TK = x_TK if x_TK.stride(-1) == 1 else x_TK.contiguous()
    (T, K), R = x_TK.shape, A_RK.shape[0]
    h_TR = torch.empty(T, R, dtype=A_RK.dtype, device=x_TK.device)
    if T:
        block_T, block_K, block_R = _blocks(R, A_RK.dtype)
        project_kernel[triton.cdiv(T, block_T), triton.cdiv(R, block_R)](
            x_TK, A_RK.contiguous(), h_TR, T, K, R, first_row, *_seeded(seed_2, p), x_TK.stride(0),
            dtype=_DTYPES[A_RK.dtype], precision=_precision(), DROP=seed_2 is not None,
            BLOCK_T=block_T, BLOCK_K=block_K, BLOCK_R=block_R,
        )  # fmt: skip
    return h_TR


@_on_device_of
def add_expanded(
    dx_TK: Tensor, u_TR: Tensor, A_RK: Tensor, seed_2: Tensor | None, p: float, first_row: int = 0
) -> None:
    """:func:`lightning_efficient.lora_fa.projection.add_expanded`: dx is read and written once."""
    (T, K), R = dx_TK.shape, A_RK.shape[0]
    if T:
        block_T, block_K, block_R = _blocks(R, A_RK.dtype)
        expand_kernel[triton.cdiv(T, block_T), triton.cdiv(K, block_K)](
            dx_TK, u_TR.contiguous(), A_RK.contiguous(), T, K, R, first_row, *_seeded(seed_2, p),
            dtype=_DTYPES[A_RK.dtype], dx_dtype=_DTYPES[dx_TK.dtype], precision=_precision(), DROP=seed_2 is not None,
            BLOCK_T=block_T, BLOCK_K=block_K, BLOCK_R=block_R,
        )  # fmt: skip


@_on_device_of
def swiglu(e: Tensor, g: Tensor) -> Tensor:
    """Return ``silu(e) * g``."""
    a = torch.empty_like(e)
    if e.numel():
        swiglu_kernel[(triton.cdiv(e.numel(), _ELEMENTS),)](e, g, a, e.numel(), dtype=_DTYPES[e.dtype], BLOCK=_ELEMENTS)
    return a


@_on_device_of
def swiglu_gradients(da: Tensor, e: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``silu(e) * g`` with respect to e and g."""
    de, dg = torch.empty_like(da), torch.empty_like(da)
    if e.numel():
        swiglu_gradient_kernel[(triton.cdiv(e.numel(), _ELEMENTS),)](
            da, e, g, de, dg, e.numel(), dtype=_DTYPES[e.dtype], BLOCK=_ELEMENTS
        )
    return de, dg


def _blocks(R: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Sizes of a block of T, K and R; of float64 smaller ones, for the 99 KiB of shared memory that many GPUs have."""
    size = 32 if dtype == torch.float64 else 64
    return size, size, min(size, max(16, triton.next_power_of_2(R)))


def _seeded(seed_2: Tensor | None, p: float) -> tuple[int, int, int, float]:
    """Both words of the seed and the threshold as int32, and the scale of what is kept."""
    if seed_2 is None:
        return 0, 0, 0, 1.0
    word_row, word_column = seed_2.tolist()  # the seed is on the CPU: no device is waited for
    return word_row, word_column, threshold(p), 1 / (1 - p)


def _precision() -> str:
    """TF32 where the user lets torch's own products use it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
