r"""Rank-1 curvature from the leading direction of the momentum: what the mean vectors of Eva and Eva-s stand in for.

Not from the papers. Eva-s curves along the *mean* of the gradient's rows and columns, which is seldom where the
curvature is. Here the vectors are the leading singular pairs of the momentum, followed by one power step in each
training step. For the weight W (O x D) with gradient G, momentum M and the tracked Q (D x R, R the rank)::

    M <- mu M + (1 - mu) G          U = mu M + (1 - mu) G               (Nesterov)
    A = diag(sqrt(D) / |U_i|) U                                         every row to unit root mean square
    P = orth(A Q)                   S = A^T P        s_j = |S_j|        Q <- S diag(1/s)
    r^2 = (|A|^2 - sum s^2) / (min(O, D) - R)                             mean square of the other singular values
    t_j = min(s_j, max(r, damping s_j))
    V = A - P diag(s - t) Q^T                                           leading directions brought down to the others
    W <- W - lr * 0.2 * |A| / |V| * V

With rank 1, ``V = (I + (s - t)/t p p^T)^-1 A``: the Sherman-Morrison form of Eva with :math:`g = p` and a damping that
each layer sets by itself. ``|A|^2 = O D`` where no row is zero, and ``|V|^2 = |A|^2 - sum (s^2 - t^2)``, so the length
of V is known before V, which is never formed.

Dimension letters: O outputs and D inputs of the layer; R rank.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

RMS = 0.2
"""Root mean square of an update over the learning rate: about that of Adam's."""


class Leading(NamedTuple):
    """The tracked directions after a step, and how much of them was taken away.

    Attributes:
        q_RD: the new input-side directions, Q^T.
        rho: share of the leading direction that was taken away, ``1 - t/s``, a scalar.
    """

    q_RD: Tensor
    rho: Tensor


def start_directions(inputs: int, rank: int, *, seed: int, like: Tensor) -> Tensor:
    """Return orthonormal directions (R, D), the same on every rank and device.

    Args:
        inputs: D.
        rank: R, at most D.
        seed: of the directions.
        like: gives type and device.
    """
    generator = torch.Generator().manual_seed(seed)
    q_RD = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    return _orthonormal(q_RD).to(like.device, like.dtype)


def leading_step(
    weight_OD: Tensor,
    momentum_OD: Tensor,
    grad_OD: Tensor,
    q_RD: Tensor,
    *,
    lr: float,
    momentum: float,
    damping: float,
) -> Leading:
    """Update weight and momentum in place.

    Args:
        weight_OD: W.
        momentum_OD: M.
        grad_OD: G.
        q_RD: directions of the last step; its rank is below both O and D, or 0, which only normalises the rows.
        lr: learning rate; it and the next two may be scalar tensors, for a compiled step.
        momentum: mu.
        damping: least share of a leading direction that is left.
    """
    rank, D = q_RD.shape
    momentum_OD.lerp_(grad_OD, 1 - momentum)
    u_OD = torch.lerp(momentum_OD, grad_OD, 1 - momentum).to(q_RD.dtype)
    norm_O = torch.linalg.vector_norm(u_OD, dim=1)
    floor = 1e-12 * norm_O.max() + 1e-30
    row_O = torch.where(norm_O > 0, math.sqrt(D) / (norm_O + floor), 0)
    square = (row_O * norm_O).square().sum()  # |A|^2
    if rank == 0:
        _subtract(weight_OD, u_OD, row_O * (RMS * lr))
        return Leading(q_RD, torch.zeros_like(square))
    # Thin factors first and along the rows: the products then run at memory speed.
    p_RO = _orthonormal(row_O * (q_RD @ u_OD.T))
    s_RD = (p_RO * row_O) @ u_OD
    s_R = torch.linalg.vector_norm(s_RD, dim=1)
    rest = (square - s_R.square().sum()).clamp(min=0)
    t_R = torch.minimum(s_R, torch.maximum((rest / (min(weight_OD.shape) - rank)).sqrt(), damping * s_R))
    norm = (rest + t_R.square().sum()).sqrt()
    scale = RMS * lr * square.sqrt() / torch.where(norm > 0, norm, 1)
    # Without a gradient there is no direction: the last one stays.
    q_RD = torch.where(s_R.unsqueeze(1) > 0, s_RD / s_R.clamp(min=1e-30).unsqueeze(1), q_RD)
    taken_RO = p_RO * ((s_R - t_R) * scale).unsqueeze(1)
    _subtract(weight_OD, u_OD, row_O * scale, taken_RO, q_RD)
    return Leading(q_RD, torch.where(s_R[0] > 0, 1 - t_R[0] / s_R[0].clamp(min=1e-30), 0))


def _subtract(
    weight_OD: Tensor,
    u_OD: Tensor,
    factor_O: Tensor,
    taken_RO: Tensor | None = None,
    q_RD: Tensor | None = None,
) -> None:
    """``W -= diag(factor) U - taken^T q``, rounded to the type of W once."""
    narrow = weight_OD.dtype != u_OD.dtype
    target = torch.zeros_like(u_OD) if narrow else weight_OD
    target.addcmul_(u_OD, factor_O.unsqueeze(1), value=-1)
    if taken_RO is not None and q_RD is not None:
        if len(q_RD) == 1:
            target.addr_(taken_RO[0], q_RD[0])
        else:
            target.addmm_(taken_RO.T, q_RD)
    if narrow:
        weight_OD.add_(target)


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span."""
    if len(rows) == 1:
        length: Tensor = torch.linalg.vector_norm(rows)
        return rows / length.clamp(min=1e-30)
    columns: Tensor = torch.linalg.qr(rows.T)[0]
    return columns.T
