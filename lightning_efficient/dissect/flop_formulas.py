"""Operations of an operator by its shapes: torch's own formulas, and ours for those it lacks.

A multiplication with its addition counts as two. Only what grows with a product of three sizes is counted: matrix
products, convolutions, recurrent layers, attention. Causal attention counts as if nothing were hidden, as in torch.

Dimension letters: B batch, H heads, T queries, S keys, E size of a head, V size of a value, D size of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

Formula: TypeAlias = Callable[..., int]
"""Called with an operator's positional arguments."""

aten = torch.ops.aten


def _attention(q_BHTE: Tensor, k_BHSE: Tensor, v_BHSV: Tensor, *rest: Any) -> int:
    B, H, T, E = q_BHTE.shape
    return 2 * B * H * T * k_BHSE.shape[2] * (E + v_BHSV.shape[3])


def _attention_backward(gradient: Tensor, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSV: Tensor, *rest: Any) -> int:
    """The scores once more, then the gradients of values, of scores, of queries and of keys."""
    B, H, T, E = q_BHTE.shape
    return 2 * B * H * T * k_BHSE.shape[2] * (3 * E + 2 * v_BHSV.shape[3])


def _packed_attention(*flash: Any) -> int:
    return int(flop_registry[aten._flash_attention_forward](*flash))


def _packed_attention_backward(*flash: Any) -> int:
    return int(flop_registry[aten._flash_attention_backward](*flash))


def _multi_head(q_BTD: Tensor, k_BSD: Tensor, *rest: Any) -> int:
    """The fused multi-head attention of inference: projections in and out, and attention."""
    (B, T, D), S = q_BTD.shape, k_BSD.shape[1]
    return 2 * B * D * (2 * T * D + 2 * S * D + 2 * T * S)


def _product(a: Tensor, b: Tensor, *rest: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _grouped_product(a: Tensor, b: Tensor, *rest: Any) -> int:
    """Groups are a dimension of both, or cut the rows, the columns or the dimension that is summed over."""
    groups = a.shape[0] if a.ndim == b.ndim == 3 else 1
    return 2 * groups * prod(a.shape[-2:]) * b.shape[-1]


def _vector(matrix: Tensor, *rest: Any) -> int:
    return 2 * matrix.numel()


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    """Each gradient costs what forward cost; torch's formula takes grouped convolutions for full ones."""
    transposed, mask = rest[4], rest[7]
    at = x if transposed else gradient
    return 2 * at.shape[0] * prod(at.shape[2:]) * weight.numel() * int(mask[0] + mask[1])


def _recurrent(x: Tensor, weights: Iterable[Tensor]) -> int:
    """Every step multiplies every matrix once; ``x`` holds time, batch and size, or time and batch in one."""
    return 2 * x.shape[:-1].numel() * sum(each.numel() for each in weights if each.ndim == 2)


_OURS: dict[str, Formula] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "aten._cudnn_attention_forward": lambda *a: _packed_attention(*a[:3], *a[4:8]),
    "aten._cudnn_attention_backward": lambda *a: _packed_attention_backward(*a[:6], *a[9:13]),
    "aten._flash_attention_forward_no_dropout_inplace": lambda *a: _packed_attention(*a[1:8]),
    "aten._native_multi_head_attention": _multi_head,
    "aten.convolution_backward": _convolution_backward,
    "aten.mkldnn_rnn_layer": lambda *a: _recurrent(a[0], a[1:3]),
    "aten.mkldnn_rnn_layer_backward": lambda *a: 2 * _recurrent(a[0], a[1:3]),
    "aten._cudnn_rnn": lambda *a: _recurrent(a[0], a[1]),
    "aten._cudnn_rnn_backward": lambda *a: (1 + bool(a[-1][3])) * _recurrent(a[0], a[1]),
    "aten.mv": _vector,
    "aten.addmv": lambda *a: _vector(a[1]),
    "aten.dot": _vector,
    "aten.addbmm": lambda *a: _product(*a[1:]),
    "aten._addmm_activation": lambda *a: _product(*a[1:]),
    "aten._int_mm": _product,
    "aten._scaled_mm_v2": _product,
    "aten._grouped_mm": _grouped_product,
    "aten._scaled_grouped_mm": _grouped_product,
}

# Position of the queries in the arguments; the keys and the values follow.
_SCORES_AGAIN: dict[str, int] = {
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": 1,
    "aten._scaled_dot_product_fused_attention_overrideable_backward": 1,
    "aten._scaled_dot_product_flash_attention_backward": 1,
    "aten._scaled_dot_product_efficient_attention_backward": 1,
    "aten._scaled_dot_product_cudnn_attention_backward": 1,
    "aten._flash_attention_backward": 1,
    "aten._efficient_attention_backward": 1,
    "aten._cudnn_attention_backward": 1,
    "flex_attention_backward": 0,
}


def has_formula(operator: Any) -> bool:
    """Whether calls of the operator are counted; ``operator`` is an overload packet or of higher order."""
    return str(operator) in _OURS or operator in flop_registry


def flops_of(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> tuple[int, int]:
    """Count what a call of an operator computes.

    Args:
        operator: for which :func:`has_formula` holds.
        arguments: of the call, by position.
        options: of the call, by name.
        result: of the call.

    Returns:
        All operations, and how many of them repeat some of forward: fused attention computes its scores once more in
        backward.
    """
    name = str(operator)
    if name in _OURS:
        total = _OURS[name](*arguments)
    else:
        total = int(flop_registry[operator](*arguments, **options, out_val=result))
    if name not in _SCORES_AGAIN:
        return total, 0
    at = _SCORES_AGAIN[name]
    E, V = arguments[at].shape[-1], arguments[at + 2].shape[-1]
    return total, total * E // (3 * E + 2 * V)
