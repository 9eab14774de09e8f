r"""The two products of an adapter that touch full-width tensors, without a full-width temporary.

Forward projects down, :math:`h = D(x) A^\top`; backward expands, adding :math:`M \odot (u A) / (1 - p)` to dx. Casts
and dropout are applied to a block of rows at a time. This file also chooses, in one place, between torch and Triton.

Dimension letters: T tokens, K inputs, N outputs, R rank.
"""

import importlib.util
import os
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from lightning_efficient.lora_fa.dropout import Keep

_CACHED = 1 << 16
"""Entries of a block of rows on the CPU: what stays in a core's cache over several elementwise passes."""
_DEVICE = 1 << 24
"""Elsewhere: enough to fill the device."""


def row_blocks(like: Tensor, cached: int = _CACHED) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of blocks of the rows of a matrix; a single one while compiling, where loops are fused.

    Args:
        like: the matrix.
        cached: entries of a block on the CPU.
    """
    rows, width = like.shape
    if torch.compiler.is_compiling():
        yield 0, rows
        return
    elements, multiple = (cached, 16) if like.device.type == "cpu" else (_DEVICE, 128)
    step = max(multiple, elements // max(1, width) // multiple * multiple)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def project(x_TK: Tensor, A_RK: Tensor, seed_2: Tensor | None, p: float, first_row: int = 0) -> Tensor:
    """Return ``D(x) A^T``, (T, R), in A's dtype.

    Args:
        x_TK: the input, any floating dtype.
        A_RK: the down-projection, in the dtype to compute in.
        seed_2: of the dropout; None without.
        p: probability of a drop.
        first_row: the row of the whole input that ``x_TK`` starts at.
    """
    if seed_2 is None and x_TK.dtype == A_RK.dtype:
        return x_TK @ A_RK.t()
    if seed_2 is not None and runs_on_triton(x_TK):
        from lightning_efficient.lora_fa.triton_ops import project as project_in_triton

        return project_in_triton(x_TK, A_RK, seed_2, p, first_row)
    h_TR = torch.empty(x_TK.shape[0], A_RK.shape[0], dtype=A_RK.dtype, device=x_TK.device)
    keep = None if seed_2 is None else Keep(seed_2, _rows(x_TK, first_row), x_TK.shape[1], p, x_TK.device)
    for start, stop in row_blocks(x_TK):
        block = x_TK[start:stop].to(A_RK.dtype)
        if keep is not None:
            block = keep.factors(start, stop, A_RK.dtype).mul_(block)
        torch.mm(block, A_RK.t(), out=h_TR[start:stop])
    return h_TR if keep is None else h_TR.mul_(1 / (1 - p))


def add_expanded(
    dx_TK: Tensor, u_TR: Tensor, A_RK: Tensor, seed_2: Tensor | None, p: float, first_row: int = 0
) -> None:
    """Add ``M * (u A) / (1 - p)`` to ``dx_TK`` in place: the backward twin of :func:`project`."""
    if seed_2 is None and dx_TK.dtype == A_RK.dtype:
        dx_TK.addmm_(u_TR, A_RK)
        return
    if seed_2 is not None and runs_on_triton(dx_TK):
        from lightning_efficient.lora_fa.triton_ops import add_expanded as add_expanded_in_triton

        add_expanded_in_triton(dx_TK, u_TR, A_RK, seed_2, p, first_row)
        return
    keep = None if seed_2 is None else Keep(seed_2, _rows(dx_TK, first_row), dx_TK.shape[1], p, dx_TK.device)
    u_TR = u_TR if keep is None else u_TR * (1 / (1 - p))
    for start, stop in row_blocks(dx_TK):
        block = u_TR[start:stop] @ A_RK
        if keep is not None:
            block *= keep.factors(start, stop, A_RK.dtype)
        dx_TK[start:stop].add_(block)


def add_product(y_TN: Tensor, h_TR: Tensor, B_NR: Tensor, scale: float) -> None:
    """Add ``scale h B^T`` to ``y_TN`` in place, computed in B's dtype."""
    if y_TN.dtype == B_NR.dtype:
        y_TN.addmm_(h_TR, B_NR.t(), alpha=scale)
        return
    for start, stop in row_blocks(y_TN):
        block = y_TN[start:stop]
        block.copy_(torch.addmm(block.to(B_NR.dtype), h_TR[start:stop], B_NR.t(), alpha=scale))


def up_gradients(
    dy_TN: Tensor, h_TR: Tensor, B_NR: Tensor, scale: float, *, u: bool = True, dB: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``scale dy B`` (T, R) and ``dy^T h`` (N, R), in B's dtype; None for what is not wanted.

    The second is left without the scale, which is applied once it is in the parameter's dtype: one rounding less.
    """
    if dy_TN.dtype == B_NR.dtype:
        return (
            (dy_TN @ B_NR).mul_(scale) if u else None,
            dy_TN.t() @ h_TR if dB else None,
        )
    u_TR = torch.empty(dy_TN.shape[0], B_NR.shape[1], dtype=B_NR.dtype, device=dy_TN.device) if u else None
    dB_NR = torch.zeros_like(B_NR) if dB else None
    for start, stop in row_blocks(dy_TN):
        block = dy_TN[start:stop].to(B_NR.dtype)
        if u_TR is not None:
            torch.mm(block, B_NR, out=u_TR[start:stop])
        if dB_NR is not None:
            dB_NR.addmm_(block.t(), h_TR[start:stop])
    return None if u_TR is None else u_TR.mul_(scale), dB_NR


def _rows(matrix: Tensor, first: int) -> tuple[int, int]:
    return first, first + matrix.shape[0]


def runs_on_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels run: on a CUDA device, or interpreted for tests."""
    if torch.compiler.is_compiling():
        return False  # inductor fuses the mask into its own kernels
    wanted = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and _has_triton()


@cache
def _has_triton() -> bool:
    """Whether Triton is installed; torch's operations give the same results without it."""
    return importlib.util.find_spec("triton") is not None
