"""Independent single-process implementations, per matrix and in the plain layout, to hold the compressors against."""

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def initial_basis(name: str, columns: int, rank: int, seed: int = 0) -> Tensor:
    """The documented start: the orthonormalised Gaussian drawn from (seed, crc32 of the name), as (columns, rank)."""
    generator = torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
    gaussian = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian.T).Q


def compressed_shapes(
    model: nn.Module, rank: int, min_compression_rate: float = 2.0
) -> dict[str, tuple[int, int, int]]:
    """Name to (rows, columns, rank) of the parameters that the documented rule compresses."""
    shapes = {}
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            rows, cols = p.shape[0], math.prod(p.shape[1:])
            r = min(rank, rows, cols)
            if (rows + cols) * r / 2 * min_compression_rate < rows * cols:
                shapes[name] = (rows, cols, r)
    return shapes


class ReferenceACP:
    """ACP-SGD of one worker on given (mean) gradients: P in the first step, then Q, in turns."""

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]]) -> None:
        self.error = {n: torch.zeros(rows, cols, dtype=torch.float64) for n, (rows, cols, _) in shapes.items()}
        self.basis = {n: initial_basis(n, cols, rank) for n, (_, cols, rank) in shapes.items()}
        self.sends_p = dict.fromkeys(shapes, True)

    def __call__(self, name: str, gradient: Tensor) -> Tensor:
        if name not in self.error:
            return gradient.clone()
        a = gradient.reshape(gradient.shape[0], -1) + self.error[name]
        basis = self.basis[name]
        approximation = a @ basis @ basis.T if self.sends_p[name] else basis @ basis.T @ a
        factor = a @ basis if self.sends_p[name] else a.T @ basis
        self.error[name] = a - approximation
        self.basis[name] = torch.linalg.qr(factor).Q
        self.sends_p[name] = not self.sends_p[name]
        return approximation.reshape(gradient.shape)


class ReferencePowerSGD(ReferenceACP):
    """Power-SGD of one worker on given (mean) gradients, one power iteration per step."""

    def __call__(self, name: str, gradient: Tensor) -> Tensor:
        if name not in self.error:
            return gradient.clone()
        a = gradient.reshape(gradient.shape[0], -1) + self.error[name]
        p = torch.linalg.qr(a @ self.basis[name]).Q
        q = a.T @ p
        self.basis[name] = q
        self.error[name] = a - p @ q.T
        return (p @ q.T).reshape(gradient.shape)
