"""A mixture of experts by its definition, token by token, on one process: what every schedule must equal."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.moe import MoELayer


@dataclass
class Result:
    """Outputs and gradients of all token groups together."""

    y: Tensor
    dx: Tensor
    d_router: Tensor
    d_experts: dict[str, Tensor]
    aux: Tensor
    balance: Tensor
    z: Tensor
    dropped: int


def reference(layer: MoELayer, x_DSM: Tensor, grad_DSM: Tensor, *, slices: int = 1) -> Result:
    """Run a whole layer on the tokens of all data-parallel ranks.

    Args:
        layer: on one process.
        x_DSM: tokens by data-parallel rank.
        grad_DSM: gradients of the outputs; the loss is the mean over D of sum(y * grad) + aux.
        slices: into how many parts the tokens of a rank are cut before the gate.
    """
    weights = {name: each.detach().clone().requires_grad_() for name, each in layer.named_parameters()}
    x_DSM = x_DSM.detach().clone().requires_grad_()
    outputs, losses, auxes, balances, zs, dropped = [], [], [], [], [], 0
    for x_SM, grad_SM in zip(x_DSM, grad_DSM, strict=True):
        y_SM, balance, z, lost = one_group(layer, weights, x_SM, slices)
        aux = layer.aux_loss_coef * balance + layer.z_loss_coef * z
        outputs.append(y_SM)
        auxes.append(aux)
        balances.append(balance)
        zs.append(z)
        losses.append((y_SM * grad_SM).sum() + aux)
        dropped += lost
    (torch.stack(losses).mean()).backward()

    def grad(name: str) -> Tensor:
        found = weights[name].grad
        return torch.zeros_like(weights[name]) if found is None else found

    return Result(
        torch.stack(outputs).detach(),
        x_DSM.grad,  # type: ignore[arg-type]
        grad("router.weight"),
        {name: grad(name) for name in weights if name.startswith("experts.")},
        torch.stack(auxes).detach(),
        torch.stack(balances).detach(),
        torch.stack(zs).detach(),
        dropped,
    )


def one_group(
    layer: MoELayer, weights: dict[str, Tensor], x_SM: Tensor, slices: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return the outputs, the load-balancing loss, the z-loss, and how many assignments were dropped."""
    router, S = layer.router, x_SM.shape[0]
    part = math.ceil(S / slices)
    E, k = router.num_experts, router.top_k
    y_SM = torch.zeros_like(x_SM)
    counts, dropped = torch.zeros(E, dtype=x_SM.dtype), 0
    logits_SE = x_SM @ weights["router.weight"].T
    probs_SE = logits_SE.softmax(-1)
    known_SE = probs_SE.tolist()
    for begin in range(0, S, part):
        tokens = range(begin, min(begin + part, S))
        slots = router.slots(part)
        ids = {s: sorted(range(E), key=lambda e: -known_SE[s][e])[:k] for s in tokens}
        queue: dict[int, list[tuple[int, int]]] = {e: [] for e in range(E)}
        for j in range(k):
            for s in tokens:
                queue[ids[s][j]].append((s, j))
        for e, each in queue.items():
            counts[e] += len(each)
            if router.drop_policy == "probs":
                each.sort(key=lambda sj: -known_SE[sj[0]][e])
        kept = {sj for each in queue.values() for sj in each[:slots]}
        dropped += sum(map(len, queue.values())) - len(kept)
        rows = []
        for s in tokens:
            chosen = probs_SE[s, ids[s]]
            mask = torch.tensor([(s, j) in kept for j in range(k)])
            if k > 1 and router.normalize == "before_drop":
                chosen = chosen / chosen.sum()
            if k > 1 and router.normalize == "after_drop":
                chosen = chosen / (chosen * mask).sum().clamp_min(1e-300)
            row = sum(
                (chosen[j] * expert(layer, weights, ids[s][j], x_SM[s]) for j in range(k) if mask[j]),
                torch.zeros_like(x_SM[s]),
            )
            rows.append(row)
        y_SM = torch.cat((y_SM[:begin], torch.stack(rows), y_SM[begin + len(rows) :]))
    share_E = counts / (k * S)
    balance = E * (probs_SE.mean(0) * share_E).sum()
    z = logits_SE.logsumexp(-1).square().mean()
    return y_SM, balance, z, dropped


def expert(layer: MoELayer, weights: dict[str, Tensor], e: int, x_M: Tensor) -> Tensor:
    h_GH = torch.einsum("m,mgh->gh", x_M, weights["experts.w_in"][e])
    if "experts.b_in" in weights:
        h_GH = h_GH + weights["experts.b_in"][e]
    activations: dict[str, Any] = {"gelu": F.gelu, "relu": F.relu}
    act = layer.experts.activation
    h_H = F.silu(h_GH[0]) * h_GH[1] if act == "swiglu" else activations[act](h_GH[0])
    y_M = h_H @ weights["experts.w_out"][e]
    return y_M + weights["experts.b_out"][e] if "experts.b_out" in weights else y_M
