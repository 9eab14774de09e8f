r"""How the frozen A is chosen. It never adapts, so the choice matters more than in LoRA.

With orthonormal rows, :math:`A A^\top = I`, the gradient of B is the best one for :math:`s B A` up to the constant
:math:`1 / s^2` (LoRA-FA v2's correction :math:`s^{-2} g (A A^\top)^{-1}`), for every optimizer and at no cost. All
choices but ``kaiming`` and ``gaussian`` have orthonormal rows.

Dimension letters: K inputs, N outputs, R rank.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa.frozen import compressed, dense, sizes

OVERSAMPLING = 8
"""Extra directions of a random sketch."""

_DRAWN: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
"""Said in every draw: a Trainer changes the default dtype while it builds a model, and A must not depend on that."""


def draw_A(init: str, layer: nn.Module, rank: int, generator: torch.Generator) -> Tensor:
    """Return A, (R, K) float32 on the CPU (``"pissa"``: on the layer's device).

    ``"eva"`` and ``"gradient"`` start as ``"orthogonal"``: they wait for batches.

    Args:
        init: of :class:`~lightning_efficient.lora_fa.LoRAFAConfig`.
        layer: the frozen linear.
        rank: R.
        generator: of the CPU.
    """
    _, size_K = sizes(layer)
    if init == "kaiming":
        bound = 1 / math.sqrt(size_K)
        return (torch.rand(rank, size_K, generator=generator, **_DRAWN) * 2 - 1) * bound
    if init == "gaussian":
        return torch.randn(rank, size_K, generator=generator, **_DRAWN) / rank
    if init == "pissa":
        return _leading_of_weight(layer, rank, generator)
    return orthonormal_rows(torch.randn(rank, size_K, generator=generator, **_DRAWN))


def orthonormal_rows(A_RK: Tensor) -> Tensor:
    """Return a matrix of the same row space whose rows are orthonormal, (R, K), worked out in float64.

    Raises:
        ValueError: the rows are linearly dependent.
    """
    Q_KR, L_RR = torch.linalg.qr(A_RK.double().t())
    diagonal_R = L_RR.diagonal()
    if not diagonal_R.abs().min() > 1e-6 * diagonal_R.abs().max():  # true of NaN, too
        raise ValueError("The rows of A are linearly dependent: the adapter's rank would be lower than r. Lower r.")
    Q_RK: Tensor = (Q_KR * diagonal_R.sign()).t()
    return Q_RK.to(A_RK.dtype).contiguous()


def leading_directions(apply: Callable[[Tensor], Tensor], start_KQ: Tensor, rank: int, iterations: int) -> Tensor:
    r"""Return the leading R eigenvectors of a positive matrix :math:`\Sigma` as rows, by subspace iteration.

    Args:
        apply: :math:`X \mapsto \Sigma X`, for (K, Q).
        start_KQ: random, with Q above R.
        rank: R.
        iterations: products with the matrix, at least 2; each halves the influence of the rest, roughly.
    """
    Q_KQ = start_KQ
    for _ in range(iterations - 1):
        Q_KQ = torch.linalg.qr(apply(Q_KQ)).Q
    small_QQ = Q_KQ.t() @ apply(Q_KQ)
    vectors_QQ = torch.linalg.eigh((small_QQ + small_QQ.t()) / 2).eigenvectors
    leading_KR: Tensor = Q_KQ @ vectors_QQ[:, -rank:].flip(1)
    return leading_KR.t().contiguous()


def sketch(size_K: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return the random start of :func:`leading_directions`, (K, Q)."""
    return torch.randn(size_K, min(size_K, rank + OVERSAMPLING), generator=generator, **_DRAWN)


def _leading_of_weight(layer: nn.Module, rank: int, generator: torch.Generator) -> Tensor:
    ordinary, other = dense(layer), compressed(layer)
    if ordinary is not None:
        weight_NK = ordinary.weight.detach().float()
    elif other is not None:
        weight_NK = other.weight(torch.float32)
    else:
        raise ValueError(f"init='pissa' cannot read the weight of a {type(layer).__name__}. Use init='orthogonal'.")
    with torch.no_grad():
        start_KQ = sketch(weight_NK.shape[1], rank, generator).to(weight_NK.device)
        return leading_directions(lambda X: weight_NK.t() @ (weight_NK @ X), start_KQ, rank, iterations=6)
