"""The functions of ``torch_ops.py`` on a GPU, with the same signatures, in Triton: float32 and narrower types.

Dimension letters: S tokens, M model size, E experts, k choices per token, N slots, C columns of all blocks' counts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from lightning_efficient.moe.triton_kernels import (
    gather_kernel,
    place_kernel,
    route_gradient_kernel,
    route_kernel,
    scan_kernel,
    sum_kernel,
    unpermute_gradient_kernel,
)

_LOGITS = 4096
"""Entries of a block of logits: what the registers of one program hold."""
_BLOCKS = 512
"""Blocks of tokens that fill the device; more would only lengthen the scan over their counts."""
_ROWS = 2048
"""Entries of a block of rows."""
_SCAN_C, _SCAN_E = 256, 8
_ASSIGNMENTS = 1024


def route(logits_SE: Tensor, k: int, bias_E: Tensor | None) -> tuple[Tensor, ...]:
    """:func:`lightning_efficient.moe.torch_ops.route`: the logits are read once."""
    (S, E), logits_SE = logits_SE.shape, logits_SE.contiguous()
    probs_SE = logits_SE.new_empty(S, E, dtype=torch.float32)
    chosen_Sk = logits_SE.new_empty(S, k, dtype=torch.float32)
    expert_Sk = logits_SE.new_empty(S, k, dtype=torch.int64)
    position_Sk = torch.empty_like(expert_Sk)
    counts_E = logits_SE.new_zeros(E, dtype=torch.int64)
    if S:
        sizes = _gate_blocks(S, E)
        blocks = triton.cdiv(S, sizes["BLOCK_S"])
        starts_CE = logits_SE.new_empty(k * blocks, E, dtype=torch.int32)
        _launch(
            route_kernel, (blocks,), logits_SE, None if bias_E is None else bias_E.contiguous(), probs_SE, chosen_Sk,
            expert_Sk, position_Sk, starts_CE, S, E, BIAS=bias_E is not None, K=k, **sizes,
        )  # fmt: skip
        _launch(
            scan_kernel, (triton.cdiv(E, _SCAN_E),), starts_CE, counts_E, k * blocks, E,
            BLOCK_C=_SCAN_C, BLOCK_E=_SCAN_E,
        )  # fmt: skip
        _launch(
            place_kernel, (triton.cdiv(S * k, _ASSIGNMENTS),), position_Sk, expert_Sk, starts_CE, S * k, E, blocks,
            K=k, BLOCK_S=sizes["BLOCK_S"], BLOCK_A=_ASSIGNMENTS,
        )  # fmt: skip
    return probs_SE, chosen_Sk, expert_Sk, position_Sk, counts_E


def route_gradient(
    probs_SE: Tensor, expert_Sk: Tensor, g_SE: Tensor | None, g_Sk: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """:func:`lightning_efficient.moe.torch_ops.route_gradient` in one launch."""
    S, E = probs_SE.shape
    dlogits_SE = torch.empty_like(probs_SE, dtype=dtype)
    if S:
        sizes = _gate_blocks(S, E)
        g_SE, g_Sk = (None if each is None else each.contiguous() for each in (g_SE, g_Sk))
        _launch(
            route_gradient_kernel, (triton.cdiv(S, sizes["BLOCK_S"]),), probs_SE, expert_Sk, g_SE, g_Sk, dlogits_SE,
            S, E, PROBS=g_SE is not None, CHOSEN=g_Sk is not None, K=expert_Sk.shape[1], **sizes,
        )  # fmt: skip
    return dlogits_SE


def gather_rows(x_SM: Tensor, source_N: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """:func:`lightning_efficient.moe.torch_ops.gather_rows`: rows are cast on their way."""
    N, M = source_N.shape[0], x_SM.shape[1]
    out_NM = x_SM.new_empty(N, M, dtype=dtype)
    if out_NM.numel():
        block_N, block_M = _row_blocks(M)
        _launch(
            gather_kernel, (triton.cdiv(N, block_N), triton.cdiv(M, block_M)), x_SM.contiguous(), source_N, out_NM,
            N, M, K=k, BLOCK_N=block_N, BLOCK_M=block_M,
        )  # fmt: skip
    return out_NM


def sum_rows(h_NM: Tensor, slot_Sk: Tensor, weight_Sk: Tensor | None, dtype: torch.dtype) -> Tensor:
    """:func:`lightning_efficient.moe.torch_ops.sum_rows`: rows are read once, and summed in float32."""
    (S, k), (N, M) = slot_Sk.shape, h_NM.shape
    y_SM = h_NM.new_empty(S, M, dtype=dtype)
    if y_SM.numel():
        block_S, block_M = _row_blocks(M)
        _launch(
            sum_kernel, (triton.cdiv(S, block_S), triton.cdiv(M, block_M)), h_NM.contiguous(), slot_Sk.contiguous(),
            None if weight_Sk is None else weight_Sk.contiguous(), y_SM, S, N, M,
            WEIGHTED=weight_Sk is not None, K=k, BLOCK_S=block_S, BLOCK_M=block_M,
        )  # fmt: skip
    return y_SM


def unpermute_gradients(
    dy_SM: Tensor, h_NM: Tensor, weight_Sk: Tensor, slot_Sk: Tensor, source_N: Tensor, *, dh: bool, dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`lightning_efficient.moe.torch_ops.unpermute_gradients`: both in one pass over the slots."""
    N, M = h_NM.shape
    dh_NM = torch.empty_like(h_NM, memory_format=torch.contiguous_format) if dh else None
    dw_Sk = torch.zeros_like(weight_Sk, memory_format=torch.contiguous_format) if dw else None
    if h_NM.numel() and (dh or dw):
        block_N, block_M = _row_blocks(M)
        _launch(
            unpermute_gradient_kernel, (triton.cdiv(N, block_N),), dy_SM.contiguous(), h_NM.contiguous(),
            weight_Sk.contiguous(), source_N, dh_NM, dw_Sk, N, M,
            DH=dh, DW=dw, K=slot_Sk.shape[1], BLOCK_N=block_N, BLOCK_M=block_M,
        )  # fmt: skip
    return dh_NM, dw_Sk


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *rest: Any, **constants: Any) -> None:
    """Triton launches on the current device, which need not be the one the tensors are on."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *rest, **constants)


def _gate_blocks(S: int, E: int) -> dict[str, int]:
    block_E = triton.next_power_of_2(E)
    return {
        "BLOCK_S": max(16, min(128, _LOGITS // block_E, triton.next_power_of_2(triton.cdiv(S, _BLOCKS)))),
        "BLOCK_E": block_E,
    }


def _row_blocks(M: int) -> tuple[int, int]:
    """Rows and columns of a block."""
    block_M = min(1024, triton.next_power_of_2(M))
    return max(1, _ROWS // block_M), block_M
