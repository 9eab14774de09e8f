"""How the next token is chosen.

Dimension letters: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Pick: TypeAlias = Callable[[Tensor], Tensor]
"""From logits (N, V) to token ids (N,)."""


def greedy(logits_NV: Tensor) -> Tensor:
    """Return the most likely tokens, (N,)."""
    return logits_NV.argmax(-1)


@dataclass(frozen=True, slots=True)
class Sampling:
    r"""Draw from :math:`\mathrm{softmax}(z / \tau)`, where z are the logits, restricted to the largest if asked for.

    Args:
        temperature: :math:`\tau`, above 0.
        top_k: draw among so many of the most likely tokens; ``None``: among all.
        generator: of the random numbers, on the logits' device; ``None``: torch's global one.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: it divides the logits. Give a number above 0.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: there must be a token to draw. Give 1 or more, or None.")

    def __call__(self, logits_NV: Tensor) -> Tensor:
        """Return token ids, (N,)."""
        scaled_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / self.temperature
        if self.top_k is not None and self.top_k < scaled_NV.shape[-1]:
            # By index, not by a threshold: equal logits would let in more than top_k.
            top_NK, ids_NK = scaled_NV.topk(self.top_k, dim=-1)
            drawn_N1 = torch.multinomial(top_NK.softmax(-1), 1, generator=self.generator)
            return ids_NK.gather(-1, drawn_N1)[:, 0]
        return torch.multinomial(scaled_NV.softmax(-1), 1, generator=self.generator)[:, 0]
