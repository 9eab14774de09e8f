r"""The router: which experts a token goes to, which assignments fit, and the losses that keep the loads even.

.. math::

    p = \mathrm{softmax}(W_g x), \qquad y = \sum_{j=1}^{k} w_j \, E_{e_j}(x), \qquad
    w_j = p_{e_j} \Big/ \textstyle\sum_i p_{e_i} \;(k > 1), \quad w_1 = p_{e_1} \;(k = 1)

with the k experts of highest probability. Each expert has T slots, :math:`T = \lceil k f S / E \rceil`; assignments
beyond are dropped. See Shazeer et al. (2017), GShard (Lepikhin et al., 2020) and Switch Transformer (Fedus et al.,
2021).

Dimension letters: S tokens, M model size, E experts, k choices per token, T slots per expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_efficient.moe.balance import SelectionBias
from lightning_efficient.moe.ops import gate

DropPolicy: TypeAlias = Literal["position", "probs"]
"""Who keeps a slot of a full expert: who comes first, or who has the highest probability."""

Normalize: TypeAlias = Literal["before_drop", "after_drop", "never"]
"""When the weights of a token's k experts are divided by their sum."""


@dataclass(frozen=True, slots=True)
class Capacity:
    r"""How many slots an expert has, :math:`T = \lceil k f S / E \rceil`, within bounds.

    Args:
        factor: f in training. None: as many as are needed, nothing is dropped.
        eval_factor: f in evaluation; None: as in training.
        minimum: slots that an expert has at least.

    Raises:
        ValueError: a factor is not positive, or the minimum is below 1.
    """

    factor: float | None = 1.25
    eval_factor: float | None = None
    minimum: int = 4

    def __post_init__(self) -> None:
        for name, factor in (("capacity_factor", self.factor), ("eval_capacity_factor", self.eval_factor)):
            if factor is not None and not (factor > 0 and math.isfinite(factor)):
                raise ValueError(
                    f"{name} is {factor}: an expert needs slots. Set it above 0, or to null for no limit (nothing is "
                    "dropped)."
                )
        if self.minimum < 1:
            raise ValueError(f"min_capacity is {self.minimum}: an expert needs a slot. Set it to 1 or more.")

    def slots(self, tokens: int, *, num_experts: int, top_k: int, training: bool = True) -> int | None:
        """Return T, or None where there is no limit.

        Args:
            tokens: S, whose assignments share the slots.
            num_experts: E.
            top_k: k.
            training: whether ``factor`` holds, or ``eval_factor``.
        """
        factor = self.factor if training or self.eval_factor is None else self.eval_factor
        if factor is None:
            return None
        wanted = math.ceil(round(top_k * factor * tokens / num_experts, 6))
        return min(max(wanted, self.minimum), tokens)


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the assignments of tokens go.

    Args:
        weight_Sk: of what the expert returns; differentiable.
        expert_Sk: ids of the experts.
        position_Sk: places in the queues of the experts; with ``capacity`` T, those of T and above are dropped.
        counts_E: assignments of each expert before any is dropped.
        capacity: T; None: no limit.
        load: sums over the tokens, for the losses; see :meth:`Router.losses`.
    """

    weight_Sk: Tensor
    expert_Sk: Tensor
    position_Sk: Tensor
    counts_E: Tensor
    capacity: int | None
    load: Tensor


class Router(nn.Module):
    r"""The gate: one linear map, in float32 at least, under autocast, too.

    Args:
        dim: M.
        num_experts: E.
        top_k: k.
        capacity: slots of an expert.
        drop_policy: who keeps a slot of a full expert: ``position`` (first choices in the order of tokens, then
            second choices, ...; GShard) or ``probs`` (the highest probabilities).
        normalize: divide the weights of a token's experts by their sum: ``before_drop``, ``after_drop`` (as DeepSpeed
            does: a token that lost one expert gives all weight to the other) or ``never``. For k = 1 the weight is
            the plain probability, or the gate would get no gradient from the task.
        jitter: :math:`\epsilon` of the noise of Switch Transformer in training: inputs of the gate are multiplied by
            :math:`U(1 - \epsilon, 1 + \epsilon)`.
        balance_rate: u of the :class:`SelectionBias`, by which experts are then chosen; 0: none.

    Attributes:
        balance: the bias, or None.

    Raises:
        ValueError: a size is below 1, k is above E, there is no such policy, or jitter is not in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        capacity: Capacity | None = None,
        drop_policy: DropPolicy = "position",
        normalize: Normalize = "before_drop",
        jitter: float = 0.0,
        balance_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(dim, num_experts, top_k, drop_policy, normalize, jitter)
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity = capacity or Capacity()
        self.drop_policy = drop_policy
        self.normalize = normalize
        self.jitter = jitter
        self.balance = SelectionBias(num_experts, balance_rate) if balance_rate else None
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, as ``nn.Linear`` does, without a bias for the choice."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.balance is not None:
            self.balance.reset_parameters()

    @override
    def extra_repr(self) -> str:
        """Describe it within a printed module."""
        E, M = self.weight.shape
        return f"dim={M}, num_experts={E}, top_k={self.top_k}, capacity={self.capacity}"

    @override
    def forward(self, x_SM: Tensor, weight_EM: Tensor | None = None, *, slots_for: int | None = None) -> Routing:
        """Route tokens.

        Args:
            x_SM: the tokens, with noise where there is any.
            weight_EM: weights to use; the own ones without.
            slots_for: number of tokens that decides the capacity; S without.
        """
        weight_EM = self.weight if weight_EM is None else weight_EM
        wide = torch.promote_types(x_SM.dtype, torch.float32)
        with torch.autocast(x_SM.device.type, enabled=False):
            logits_SE = F.linear(x_SM.to(wide), weight_EM.to(wide))
            chosen = gate(logits_SE, self.top_k, None if self.balance is None else self.balance.bias)
            T = self.slots(x_SM.shape[0] if slots_for is None else slots_for)
            position_Sk = chosen.position_Sk
            if self.drop_policy == "probs" and T is not None:
                position_Sk = _positions_by_probability(chosen.chosen_Sk, chosen.expert_Sk, chosen.counts_E)
            weight_Sk = self._weights(chosen.chosen_Sk, position_Sk, T)
            z = logits_SE.logsumexp(-1).square().sum()
            load = torch.cat((chosen.probs_SE.sum(0), chosen.counts_E.to(wide), z[None]))
        return Routing(weight_Sk, chosen.expert_Sk, position_Sk, chosen.counts_E, T, load)

    def slots(self, tokens: int) -> int | None:
        """Return T for a number of tokens, None where there is no limit."""
        return self.capacity.slots(tokens, num_experts=self.num_experts, top_k=self.top_k, training=self.training)

    def counts(self, load: Tensor) -> Tensor:
        """Return the assignments of each expert, (E,), from ``Routing.load``."""
        return load[self.num_experts : 2 * self.num_experts]

    def losses(self, load: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        r"""Return the load-balancing loss and the z-loss.

        .. math::

            L_{aux} = E \sum_e \bar p_e \, \frac{c_e}{k S}, \qquad
            L_z = \frac{1}{S} \sum_s \left( \log \sum_e \exp z_{se} \right)^2

        with the mean probability :math:`\bar p_e` and the number of assignments :math:`c_e` of expert e (before any is
        dropped, all k choices counted), and the logits z. The first is 1 where loads are even.

        Args:
            load: ``Routing.load``, summed over the ranks that hold parts of the tokens.
            tokens: S, over the same ranks.
        """
        E = self.num_experts
        probs_E, counts_E, z = load.split((E, E, 1))
        tokens = max(tokens, 1)  # of none, the losses are 0
        balance = E * (probs_E / tokens * (counts_E.detach() / (self.top_k * tokens))).sum()
        return balance, z[0] / tokens

    def noise(self, x_SM: Tensor, seed: int) -> Tensor:
        """Return the tokens with noise, the same for the same seed.

        Args:
            x_SM: the tokens.
            seed: of a generator of its own.
        """
        generator = torch.Generator(x_SM.device).manual_seed(seed)
        factor_SM = torch.empty_like(x_SM).uniform_(1 - self.jitter, 1 + self.jitter, generator=generator)
        return x_SM * factor_SM

    def _weights(self, chosen_Sk: Tensor, position_Sk: Tensor, T: int | None) -> Tensor:
        if self.top_k == 1 or self.normalize == "never":
            return chosen_Sk
        kept_Sk = chosen_Sk
        if self.normalize == "after_drop" and T is not None:
            kept_Sk = chosen_Sk * (position_Sk < T)
        return kept_Sk / kept_Sk.sum(-1, keepdim=True).clamp_min(torch.finfo(kept_Sk.dtype).tiny)


def _positions_by_probability(chosen_Sk: Tensor, expert_Sk: Tensor, counts_E: Tensor) -> Tensor:
    """Places in the queues where the highest probability comes first; of equal ones, the earlier choice and token."""
    probs, experts = chosen_Sk.detach().T.flatten(), expert_Sk.T.flatten()
    order = probs.argsort(descending=True, stable=True)
    order = order[experts[order].argsort(stable=True)]
    first_E = counts_E.cumsum(0) - counts_E
    positions = torch.empty_like(experts)
    positions[order] = torch.arange(order.numel(), device=order.device) - first_E[experts[order]]
    return positions.view(chosen_Sk.shape[1], -1).T


def _check(dim: int, num_experts: int, top_k: int, drop_policy: str, normalize: str, jitter: float) -> None:
    for name, size in (("dim", dim), ("num_experts", num_experts), ("top_k", top_k)):
        if size < 1:
            raise ValueError(f"{name} is {size}: a router needs at least 1. Set it to 1 or more.")
    if top_k > num_experts:
        raise ValueError(
            f"top_k is {top_k}, of {num_experts} experts: a token goes to an expert once. Lower top_k or raise "
            "num_experts."
        )
    if drop_policy not in ("position", "probs"):
        raise ValueError(f"There is no drop_policy {drop_policy!r}: choose 'position' or 'probs'.")
    if normalize not in ("before_drop", "after_drop", "never"):
        raise ValueError(f"There is no normalize {normalize!r}: choose 'before_drop', 'after_drop' or 'never'.")
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter is {jitter}: inputs are multiplied by 1 - jitter to 1 + jitter. Choose from 0 to 1.")
