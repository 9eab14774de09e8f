"""Orthonormal bases of skinny factors, stored with their vectors as rows.

Shapes: R rank, D dimension of the vectors (rows N or columns M of a gradient matrix), ... any leading batch.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Orthogonalization = Literal["qr", "cholesky"]


def orthogonalize(x_RD: Tensor, method: Orthogonalization = "qr") -> Tensor:
    """Return an orthonormal basis of the row space of ``x_RD``.

    Rows that are linearly dependent, or all zero, are completed to a full orthonormal set, so the result is always a
    usable basis. The same input gives the same bits on every rank that runs the same kernel.

    Args:
        x_RD: finite factors of shape (..., R, D) with R <= D, in float32 or float64.
        method: ``"qr"`` is Householder QR. ``"cholesky"`` is Cholesky-QR applied twice (two small Gram matrices
            instead of a panel factorisation), which falls back to QR where the Gram matrix is not positive definite;
            that test reads one flag on the host.

    Returns:
        A tensor of the shape of ``x_RD`` whose rows satisfy ``Q Q^T = I``.
    """
    if method == "cholesky":
        q_RD = _cholesky_qr2(x_RD)
        if q_RD is not None:
            return q_RD
    elif method not in get_args(Orthogonalization):
        raise ValueError(
            f"orthogonalization is {method!r}: it must be one of {get_args(Orthogonalization)}. Set one of them."
        )
    q_DR: Tensor = torch.linalg.qr(x_RD.mT).Q
    return q_DR.mT


def _cholesky_qr2(x_RD: Tensor) -> Tensor | None:
    """Two rounds of Cholesky-QR, or None where ``x_RD`` is too close to rank deficient for it."""
    # One round leaves an error of cond(x)^2 * eps; the second removes it as long as cond(x)^2 * eps << 1. The pivot
    # ratio of the first round bounds the condition number from below and tells the two cases apart.
    q_RD = x_RD
    for _ in range(2):
        chol_RR, info = torch.linalg.cholesky_ex(q_RD @ q_RD.mT)
        pivots = chol_RR.diagonal(dim1=-2, dim2=-1)
        smallest_safe = 1e2 * torch.finfo(x_RD.dtype).eps ** 0.5
        safe = (info == 0).all() & (pivots.amin(-1) > smallest_safe * pivots.amax(-1)).all()
        if not bool(safe):
            return None
        # Inverting the small triangle turns the solve over D columns into a product, which is several times faster.
        identity = torch.eye(chol_RR.shape[-1], dtype=x_RD.dtype, device=x_RD.device)
        q_RD = torch.linalg.solve_triangular(chol_RR, identity, upper=False) @ q_RD
    return q_RD
