r"""The gate of a mixture-of-experts layer, and the moves of rows to the experts' slots and back, with gradients.

This file also chooses, in one place, between torch and Triton.

Dimension letters: S tokens, M model size, E experts, k choices per token, N slots.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from lightning_efficient.moe import torch_ops

_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_EXPERTS = 256
"""More than that, and a block of logits would not fit the registers."""


class GateOutput(NamedTuple):
    """Which experts each token goes to.

    Attributes:
        probs_SE: softmax of the logits, float32 (float64 where the logits are); differentiable.
        chosen_Sk: the probabilities of the chosen experts; differentiable, the gradient reaches the logits.
        expert_Sk: int64, the ids of the chosen experts, the best first; of equal ones the lower id.
        position_Sk: int64, the place in the queue of that expert, counted choice-major: all first choices in the order
            of tokens, then all second choices, and so on.
        counts_E: int64, how many assignments each expert has.
    """

    probs_SE: Tensor
    chosen_Sk: Tensor
    expert_Sk: Tensor
    position_Sk: Tensor
    counts_E: Tensor


def gate(logits_SE: Tensor, k: int, selection_bias_E: Tensor | None = None) -> GateOutput:
    r"""Choose k experts for each token.

    The choice goes by the logits; with a bias, which balances loads without a loss, by
    :math:`\mathrm{softmax}(logits) + bias`. It changes no probability that is returned, and has no gradient.

    .. math:: dlogits = p \odot (g - \textstyle\sum_e g_e p_e), \qquad g = g_{probs} + \mathrm{scatter}(g_{chosen})

    Args:
        logits_SE: of the router; float16 and bfloat16 are computed with in float32.
        k: experts per token.
        selection_bias_E: added to the probabilities, for the choice only.

    Raises:
        ValueError: the logits are not a matrix, or there are no k experts to choose.
    """
    if logits_SE.ndim != 2:
        raise ValueError(
            f"logits have the shape {tuple(logits_SE.shape)}: a gate takes (tokens, experts). Flatten them."
        )
    if not 1 <= k <= logits_SE.shape[1]:
        raise ValueError(
            f"k is {k}, with {logits_SE.shape[1]} experts: a token goes to at least 1, and to each at most once. "
            "Set k to 1 or more, or have more experts."
        )
    out = _Gate.apply(logits_SE, k, selection_bias_E)  # type: ignore[no-untyped-call]
    return GateOutput(*out)


def permute(x_SM: Tensor, slot_Sk: Tensor, source_N: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Copy the rows of tokens into the slots of their experts.

    Args:
        x_SM: one row per token.
        slot_Sk: int64, the slot of assignment (s, j); below 0, or N and above, where it was dropped.
        source_N: int64, the assignment s * k + j in slot n, -1 where the slot is empty; see :func:`invert`.
        dtype: of the result; that of ``x_SM`` without.

    Returns:
        (N, M): row n is ``x_SM[source_N[n] // k]``, zeros where the slot is empty.
    """
    out: Tensor = _Permute.apply(x_SM, slot_Sk, source_N, dtype or x_SM.dtype)  # type: ignore[no-untyped-call]
    return out


def unpermute(h_NM: Tensor, weight_Sk: Tensor, slot_Sk: Tensor, source_N: Tensor) -> Tensor:
    r"""Return what the experts made of each token, weighted: :math:`y_s = \sum_j w_{sj} h_{slot(s, j)}`.

    What was dropped is skipped, and empty slots are not read: they may hold anything. Sums are in float32 where rows
    are narrower.

    Args:
        h_NM: one row per slot.
        weight_Sk: of each assignment.
        slot_Sk: as in :func:`permute`.
        source_N: as in :func:`permute`.

    Returns:
        (S, M), in the dtype of ``h_NM``.
    """
    y_SM: Tensor = _Unpermute.apply(h_NM, weight_Sk, slot_Sk, source_N)  # type: ignore[no-untyped-call]
    return y_SM


def invert(slot_Sk: Tensor, num_slots: int) -> Tensor:
    """Return which assignment is in each slot: ``source_N[slot_Sk[s, j]] = s * k + j``, -1 where none is.

    Args:
        slot_Sk: int64, no two the same; below 0, or ``num_slots`` and above, where the assignment was dropped.
        num_slots: N.
    """
    return torch_ops.invert(slot_Sk, num_slots)


class _Gate(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, logits_SE: Tensor, k: int, bias_E: Tensor | None) -> tuple[Tensor, ...]:
        ctx.dtype = logits_SE.dtype
        ctx.functions = _functions_for(logits_SE, experts=logits_SE.shape[1])
        out: tuple[Tensor, ...] = ctx.functions.route(logits_SE, k, bias_E)
        probs_SE, _, *counted = out
        ctx.save_for_backward(probs_SE, counted[0])
        ctx.mark_non_differentiable(*counted)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, g_SE: Tensor | None, g_Sk: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if g_SE is None and g_Sk is None:
            return None, None, None
        return ctx.functions.route_gradient(*ctx.saved_tensors, g_SE, g_Sk, ctx.dtype), None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x_SM: Tensor, slot_Sk: Tensor, source_N: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(slot_Sk)
        ctx.dtype = x_SM.dtype
        out_NM: Tensor = _functions_for(x_SM).gather_rows(x_SM, source_N, slot_Sk.shape[1], dtype)
        return out_NM

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, dout_NM: Tensor) -> tuple[Tensor, None, None, None]:
        return _functions_for(dout_NM).sum_rows(dout_NM, *ctx.saved_tensors, None, ctx.dtype), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, h_NM: Tensor, weight_Sk: Tensor, slot_Sk: Tensor, source_N: Tensor) -> Tensor:
        ctx.save_for_backward(h_NM, weight_Sk, slot_Sk, source_N)
        y_SM: Tensor = _functions_for(h_NM).sum_rows(h_NM, slot_Sk, weight_Sk, h_NM.dtype)
        return y_SM

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, dy_SM: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dh, dw, *_ = ctx.needs_input_grad
        functions = _functions_for(dy_SM)
        return *functions.unpermute_gradients(dy_SM, *ctx.saved_tensors, dh=dh, dw=dw), None, None


def _functions_for(rows: Tensor, experts: int = 0) -> Any:
    """Return where the work is done: ``triton_ops`` on a CUDA device, or interpreted for tests; else ``torch_ops``."""
    wanted = rows.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not (wanted and rows.dtype in _TRITON_TYPES and experts <= _TRITON_EXPERTS and _has_triton()):
        return torch_ops
    from lightning_efficient.moe import triton_ops

    return triton_ops


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
