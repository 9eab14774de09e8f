r"""The mathematics of Eva, Eva-f and Eva-s, as functions of tensors; no state, no module, no optimizer.

All three subtract one rank-1 matrix from the gradient and scale what is left. With the gradient :math:`G` (O x D) of a
weight, a vector :math:`a` (D) on its input side, a vector :math:`g` (O) on its output side and damping :math:`\gamma`::

    u = G a        alpha = |a|^2        beta = |g|^2        s = g . u

    Eva    F = (a a^T) (x) (g g^T) + gamma I      V = (G - l a^T) / gamma     l = g s / (gamma + alpha beta)
    Eva-f  F = a a^T + gamma I (inputs only)      V = (G - l a^T) / gamma     l = u / (gamma + alpha)
    Eva-s  as Eva, with means of G for a and g    V = (G - l a^T) |G| / |G - l a^T|

which is the Sherman-Morrison form of :math:`V = F^{-1} G`. A bias is one more column of G, whose entry of a is 1.
``<V, G>`` and ``|V|`` need only the scalars above, so every step size is known before V is formed, and V never is.

Sources: Zhang et al., "Eva: Practical Second-order Optimization with Kronecker-vectorized Approximation", ICLR 2023;
"Eva: A General Vectorized Approximation Framework for Second-order Optimization" (arXiv 2308.02123), for Eva-f, Eva-s.

Dimension letters: L layers; S segments, one for each layer and group; A entries of all layers' inputs; R outputs of
all layers; O outputs and D inputs of one segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_efficient.eva.layout import Layout

Variant = Literal["eva", "eva_f", "eva_s"]
DampingMode = Literal["absolute", "relative"]
Rescale = Literal["clip", "normalize", "match_grad", "graft", "none"]


class Curvature(NamedTuple):
    r"""The rank-1 term of every layer, and what it takes away.

    Attributes:
        left_R: :math:`l`, the column vector of the rank-1 term.
        grad_sq_S: :math:`|G|^2`.
        inner_S: :math:`\langle G - l a^T, G\rangle`; never below its bound :math:`(1 - \rho)|G|^2`.
        norm_sq_S: :math:`|G - l a^T|^2`; never below :math:`(1 - \rho)^2|G|^2`.
    """

    left_R: Tensor
    grad_sq_S: Tensor
    inner_S: Tensor
    norm_sq_S: Tensor


def curvature(
    a_A: Tensor,
    g_R: Tensor | None,
    u_R: Tensor,
    grad_sq_S: Tensor,
    *,
    layout: Layout,
    has_bias_S: Tensor,
    damping_S: Tensor,
    damping_mode: DampingMode,
) -> Curvature:
    r"""Compute the rank-1 term of every layer, and all scalars of a step.

    Args:
        a_A: the input-side vectors.
        g_R: the output-side vectors; None for Eva-f, which has none.
        u_R: :math:`G a` by row, the bias gradient included.
        grad_sq_S: :math:`|G|^2` of each segment, the bias included.
        layout: of the layers.
        has_bias_S: 1 where the segment has a bias column, else 0.
        damping_S: :math:`\gamma`, or its multiple of the curvature under ``"relative"``.
        damping_mode: ``"absolute"``, or ``"relative"``: :math:`\gamma = ` damping times :math:`\alpha\beta` (Eva-f:
            :math:`\alpha`), so that no unit of the loss and no batch size can switch the term off.
    """
    alpha_S = layout.sum_inputs(a_A.square()) + has_bias_S
    curv_S = alpha_S if g_R is None else alpha_S * layout.sum_outputs(g_R.square())
    gamma_S = damping_S * curv_S if damping_mode == "relative" else damping_S
    total_S = gamma_S + curv_S
    inverse_S = torch.where(total_S > 0, 1 / total_S, 0)
    if g_R is None:
        factor_S = inverse_S
        left_R = u_R * factor_S[layout.segment_of_row_R]
        u_sq_S = layout.sum_outputs(u_R.square())
        removed_S = u_sq_S * inverse_S
        left_sq_S = removed_S * inverse_S
    else:
        s_S = layout.sum_outputs(g_R * u_R)
        factor_S = s_S * inverse_S
        left_R = g_R * factor_S[layout.segment_of_row_R]
        removed_S = s_S * factor_S
        left_sq_S = factor_S.square() * layout.sum_outputs(g_R.square())
    rho_S = curv_S * inverse_S
    kept_S = 1 - rho_S
    inner_S = torch.maximum(grad_sq_S - removed_S, kept_S * grad_sq_S)
    norm_sq_S = torch.maximum(grad_sq_S - 2 * removed_S + left_sq_S * alpha_S, kept_S.square() * grad_sq_S)
    return Curvature(left_R, grad_sq_S, inner_S, norm_sq_S)


@dataclass(frozen=True)
class StepSize:
    """What turns ``G - l a^T`` into the update of each layer, before momentum and learning rate.

    Attributes:
        scale_L: factor of each layer.
        nu: the factor that all layers share, a scalar; the step size control.
    """

    scale_L: Tensor
    nu: Tensor


def step_size(
    curv: Curvature,
    *,
    layout: Layout,
    gamma_L: Tensor | None,
    rescale: Rescale,
    kl_clip: float | None,
    lrs: Sequence[float],
    group_sizes: Sequence[int],
) -> StepSize:
    r"""Compute the factor of each layer's update.

    With :math:`V = (G - l a^T)/\gamma` and sums over all layers::

        clip        nu = min(1, sqrt(kl_clip / sum lr^2 <V, G>)), 1 where the sum is 0
        normalize   nu = 1 / sqrt(sum <V, G>), with V not divided by gamma
        match_grad  nu = sqrt(sum |G|^2 / sum |V|^2)
        graft       |G| / |V| for each layer
        none        1

    Args:
        curv: of :func:`curvature`.
        layout: of the layers.
        gamma_L: the damping that V is divided by; None where it is not (relative damping, Eva-s).
        rescale: one of the above.
        kl_clip: bound of the clip; None: no clip.
        lrs: learning rate of each parameter group.
        group_sizes: layers of each group; the layers are ordered by group.
    """
    inner_L, norm_sq_L, grad_sq_L = (layout.sum_segments(x) for x in (curv.inner_S, curv.norm_sq_S, curv.grad_sq_S))
    one = torch.ones((), dtype=inner_L.dtype, device=inner_L.device)
    by_gamma_L = torch.ones_like(inner_L) if gamma_L is None or rescale == "normalize" else 1 / gamma_L
    if rescale == "graft":
        return StepSize(torch.where(norm_sq_L > 0, (grad_sq_L / norm_sq_L).sqrt(), 1), one)
    if rescale == "clip" and kl_clip is not None:
        parts = (inner_L * by_gamma_L).split(list(group_sizes))
        total = sum((part.sum() * lr**2 for part, lr in zip(parts, lrs, strict=True)), torch.zeros_like(one))
        nu = torch.where(total > 0, (kl_clip / total).sqrt().clamp(max=1), one)
    elif rescale == "normalize":
        total = inner_L.sum()
        nu = torch.where(total > 0, total.rsqrt(), one)
    elif rescale == "match_grad":
        total = (norm_sq_L * by_gamma_L.square()).sum()
        nu = torch.where(total > 0, (grad_sq_L.sum() / total).sqrt(), one)
    else:
        nu = one
    return StepSize(by_gamma_L * nu, nu)


def precondition(
    grad_OD: Tensor, a_D: Tensor, g_O: Tensor | None, *, damping: float, damping_mode: DampingMode = "absolute"
) -> Tensor:
    r"""Precondition one gradient matrix: the formulas above, for one layer, with V formed.

    A bias is passed as the last column of ``grad_OD`` and a 1 at the end of ``a_D``.

    Args:
        grad_OD: G.
        a_D: the input-side vector.
        g_O: the output-side vector; None for Eva-f.
        damping: :math:`\gamma`, above 0.
        damping_mode: under ``"relative"``, :math:`\gamma` is this multiple of the curvature and V is not divided by it.

    Returns:
        V, (O, D).

    Example::

        V = precondition(layer.weight.grad, inputs.mean(0), layer_output_grad.sum(0), damping=0.03)
    """
    u_O = grad_OD @ a_D
    curv = a_D @ a_D if g_O is None else (a_D @ a_D) * (g_O @ g_O)
    total = (1 + damping) * curv if damping_mode == "relative" else damping + curv
    left_O = u_O / total if g_O is None else g_O * ((g_O @ u_O) / total)
    left_O = torch.where(total > 0, left_O, 0)
    rest_OD = grad_OD - torch.outer(left_O, a_D)
    return rest_OD if damping_mode == "relative" else rest_OD / damping
