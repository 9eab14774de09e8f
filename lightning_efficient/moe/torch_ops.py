"""The work of ``ops.py`` in torch's operations; ``triton_ops.py`` has the same functions, all but ``invert``.

Dimension letters: S tokens, M model size, E experts, k choices per token, A assignments (S k), N slots, B
rows of all bags.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_VECTOR = 16
"""Experts below which torch's softmax over the last dimension, on a CPU, leaves its vectorised path."""


def route(logits_SE: Tensor, k: int, bias_E: Tensor | None) -> tuple[Tensor, ...]:
    """Return the fields of :class:`~lightning_efficient.moe.ops.GateOutput`, in their order."""
    logits_SE = logits_SE.to(_wide(logits_SE))
    probs_SE = _softmax(logits_SE)
    expert_Sk = _best(logits_SE if bias_E is None else probs_SE + bias_E.to(probs_SE.dtype), k)
    return probs_SE, probs_SE.gather(1, expert_Sk), expert_Sk, *_queues(expert_Sk, logits_SE.shape[1])


def route_gradient(
    probs_SE: Tensor, expert_Sk: Tensor, g_SE: Tensor | None, g_Sk: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of the logits, in their dtype; see :func:`lightning_efficient.moe.ops.gate`."""
    g = torch.zeros_like(probs_SE) if g_SE is None else g_SE
    if g_Sk is not None:
        g = g.scatter_add(1, expert_Sk, g_Sk)
    return (g - (g * probs_SE).sum(-1, keepdim=True)).mul_(probs_SE).to(dtype)


def gather_rows(x_SM: Tensor, source_N: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Return (N, M): row n is the token of assignment ``source_N[n]``, zeros where that is -1."""
    filled_N = source_N >= 0
    return _sum_bags(x_SM.to(dtype), source_N[filled_N].div_(k, rounding_mode="floor"), filled_N[:, None], None)


def sum_rows(h_NM: Tensor, slot_Sk: Tensor, weight_Sk: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return (S, M): the sum over j of row ``slot_Sk[s, j]``, times its weight; what was dropped is skipped."""
    kept_Sk = _kept(slot_Sk, h_NM.shape[0])
    wide = _wide(h_NM)
    weight_B = None if weight_Sk is None else weight_Sk[kept_Sk].to(wide)
    return _sum_bags(h_NM.to(wide), slot_Sk[kept_Sk], kept_Sk, weight_B).to(dtype)


def unpermute_gradients(
    dy_SM: Tensor, h_NM: Tensor, weight_Sk: Tensor, slot_Sk: Tensor, source_N: Tensor, *, dh: bool, dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the rows and of the weights, None for what is not wanted."""
    # The products first: their temporaries are gone before the rows are made.
    dw_Sk = _row_products(dy_SM, h_NM, slot_Sk).to(weight_Sk.dtype) if dw else None
    return _weighted_rows(dy_SM, weight_Sk, source_N).to(h_NM.dtype) if dh else None, dw_Sk


def invert(slot_Sk: Tensor, num_slots: int) -> Tensor:
    """See :func:`lightning_efficient.moe.ops.invert`; no device is waited for."""
    slot_A = slot_Sk.reshape(-1)
    slot_A = slot_A.where(_kept(slot_A, num_slots), num_slots)
    source = slot_A.new_full((num_slots + 1,), -1)  # what was dropped goes to the last one, which nobody reads
    return source.scatter_(0, slot_A, torch.arange(len(slot_A), device=slot_A.device))[:num_slots]


def _wide(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _softmax(logits_SE: Tensor) -> Tensor:
    if logits_SE.is_cpu and logits_SE.shape[1] < _VECTOR:
        return logits_SE.t().contiguous().softmax(0).t().contiguous()
    return logits_SE.softmax(-1)


def _best(score_SE: Tensor, k: int) -> Tensor:
    """The k best of each row; of equal ones the lower id, which ``topk`` does not promise."""
    if k == 1:
        return score_SE.max(-1, keepdim=True).indices
    left_SE = score_SE.clamp(min=torch.finfo(score_SE.dtype).min)  # a score of -inf still beats what is taken
    best = []
    for _ in range(k):
        best.append(left_SE.max(-1, keepdim=True).indices)
        left_SE.scatter_(1, best[-1], -torch.inf)
    return torch.cat(best, 1)


def _queues(expert_Sk: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Places in the queues of the experts, and the lengths of the queues."""
    S, k = expert_Sk.shape
    sorted_A, order_A = expert_Sk.t().reshape(-1).sort(stable=True)
    starts = torch.searchsorted(sorted_A, torch.arange(E + 1, device=sorted_A.device))
    place_A = torch.arange(S * k, device=sorted_A.device) - starts.index_select(0, sorted_A)
    position_kS = torch.empty_like(place_A).scatter_(0, order_A, place_A).view(k, S)
    return position_kS.t().contiguous(), starts.diff()


def _kept(slot: Tensor, num_slots: int) -> Tensor:
    return (slot >= 0) & (slot < num_slots)


def _sum_bags(rows_M: Tensor, row_B: Tensor, kept: Tensor, weight_B: Tensor | None) -> Tensor:
    """Sum rows into bags; ``kept`` says how many of ``row_B`` each has. float32 rows are not copied on the way."""
    offsets = F.pad(kept.sum(1).cumsum(0), (1, 0))
    return F.embedding_bag(row_B, rows_M, offsets, mode="sum", per_sample_weights=weight_B, include_last_offset=True)


def _weighted_rows(dy_SM: Tensor, weight_Sk: Tensor, source_N: Tensor) -> Tensor:
    filled_N = source_N >= 0
    source_B = source_N[filled_N]
    wide = _wide(dy_SM)
    weight_B = weight_Sk.reshape(-1).index_select(0, source_B).to(wide)
    token_B = source_B.div_(weight_Sk.shape[1], rounding_mode="floor")
    return _sum_bags(dy_SM.to(wide), token_B, filled_N[:, None], weight_B)


def _row_products(dy_SM: Tensor, h_NM: Tensor, slot_Sk: Tensor) -> Tensor:
    wide = _wide(h_NM)
    if not h_NM.shape[0]:
        return torch.zeros(slot_Sk.shape, dtype=wide, device=h_NM.device)
    kept_Sk = _kept(slot_Sk, h_NM.shape[0])
    slots = slot_Sk.where(kept_Sk, 0).unbind(1)
    dw_Sk = torch.stack([h_NM.index_select(0, slot_S).to(wide).mul_(dy_SM).sum(-1) for slot_S in slots], 1)
    return dw_Sk.where(kept_Sk, 0)
