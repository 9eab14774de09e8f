r"""Even loads without a loss: a bias for the choice of experts, which moves against the loads after each step.

.. math:: b_e \leftarrow b_e + u \, \mathrm{sign}\left(\tfrac{1}{E} \textstyle\sum_i c_i - c_e\right)

with the number of assignments :math:`c_e` of expert e since the last step, over all ranks, before any is dropped.
Experts are chosen by :math:`p + b`, and weighted by p: no gradient of a balancing loss disturbs the task's. See Wang et
al., *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*, arXiv:2408.15664, section 3.

Dimension letters: E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

_FORGOTTEN = 1000


class SelectionBias(nn.Module):
    """The bias of one router, and what it learns from.

    Args:
        num_experts: E.
        rate: u, by which a bias moves.

    Attributes:
        bias: (E,), float32 whatever the module is cast to: steps of 0.001 would be lost in bfloat16.

    Raises:
        ValueError: the rate is not positive.
    """

    bias: Tensor

    def __init__(self, num_experts: int, rate: float) -> None:
        super().__init__()
        if not 0 < rate < 1:
            raise ValueError(
                f"balance_rate is {rate}: biases of probabilities move by it in each step. Set it to 0.001, or to 0 "
                "for none."
            )
        self.rate = rate
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))
        self._counts_E: Tensor | None = None
        self._forwards = 0

    def reset_parameters(self) -> None:
        """Forget what was learned."""
        self.bias.zero_()
        self._counts_E, self._forwards = None, 0

    def count(self, counts_E: Tensor) -> None:
        """Take the assignments of a forward into account.

        Args:
            counts_E: of this rank's model-parallel group.
        """
        counts_E = counts_E.to(self.bias.dtype)  # one type on all ranks, also where a layer did not run
        self._counts_E = counts_E if self._counts_E is None else self._counts_E + counts_E
        self._forwards += 1
        if self._forwards == _FORGOTTEN:
            warnings.warn(
                f"balance_rate is {self.rate:g}, and nothing moved a bias in {_FORGOTTEN} forwards: loads stay as they "
                "are. Call lightning_efficient.moe.balance_loads(model) after each optimizer step, as strategy 'parm' "
                "does.",
                stacklevel=2,
            )

    def take_counts(self) -> Tensor:
        """Return the assignments since the last call."""
        counts_E = torch.zeros_like(self.bias) if self._counts_E is None else self._counts_E
        self._counts_E, self._forwards = None, 0
        return counts_E

    @torch.no_grad()
    def move(self, counts_E: Tensor) -> None:
        """Move the bias against the loads.

        Args:
            counts_E: of all ranks.
        """
        self.bias += self.rate * (counts_E.mean() - counts_E).sign()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype != exact.dtype:
            self.bias = exact.to(self.bias.device)
        return self

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_counts_E": None}
