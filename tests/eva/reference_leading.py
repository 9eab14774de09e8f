"""One step along the leading directions, with every matrix formed."""

import math

import torch
from torch import Tensor


def plain_step(
    W: Tensor, M: Tensor, G: Tensor, Q: Tensor, *, lr: float, momentum: float, damping: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The equations of `lightning_efficient.eva.leading`, line by line; Q is (D, R). Returns W, M, Q and V."""
    mu = momentum
    (rows, D), R = W.shape, Q.shape[1]
    M = mu * M + (1 - mu) * G
    U = mu * M + (1 - mu) * G
    A = torch.diag(math.sqrt(D) / U.norm(dim=1)) @ U
    P = torch.linalg.qr(A @ Q).Q if R > 1 else torch.nn.functional.normalize(A @ Q, dim=0)
    S = A.T @ P
    s = S.norm(dim=0)
    Q = S / s
    r = ((rows * D - s.square().sum()) / (min(rows, D) - R)).sqrt()
    t = torch.minimum(s, torch.maximum(r, damping * s))
    V = A - P @ torch.diag(s - t) @ Q.T
    return W - lr * 0.2 * math.sqrt(rows * D) / V.norm() * V, M, Q, V
