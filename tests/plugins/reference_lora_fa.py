"""LoRA-FA written out: explicit matrices, B's gradient by its formula, nothing of the package.

Dimension letters: T rows, K inputs, N outputs, R rank.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from tests.plugins.references import Reference, Step
from tests.plugins.tiny import Batch, MakeOptimizer, TinyModule


def lora_fa(*, r: int, alpha: float, seed: int, optimizer: MakeOptimizer) -> Reference:
    """An optimizer on every B, with dB = s dy^T (x A^T)."""

    def on(module: TinyModule) -> Step:
        for index, layer in enumerate(module.net):
            if isinstance(layer, nn.Linear):
                module.net[index] = Adapted(layer, first_A(f"{index}", r, layer.in_features, seed), alpha / r)
        layers = [each for each in module.net if isinstance(each, Adapted)]
        update = optimizer(each.B_NR for each in layers)

        def step(shares: list[Batch]) -> None:
            x, y = (torch.cat(parts) for parts in zip(*shares, strict=True))
            outputs: list[Tensor] = []
            inputs = []
            for layer in layers:
                inputs.append(x)
                outputs.append(layer(x))
                x = outputs[-1].tanh()
            gradients = torch.autograd.grad(F.cross_entropy(outputs[-1], y), outputs)
            for layer, x_TK, dy_TN in zip(layers, inputs, gradients, strict=True):
                layer.B_NR.grad = (layer.scale * dy_TN.T @ (x_TK @ layer.A_RK.T)).detach()
            update.step()

        return step

    return on


class Adapted(nn.Module):
    """Parameters in the order in which the package's layers have them."""

    def __init__(self, base: nn.Linear, A_RK: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        dtype = base.weight.dtype
        self.factors = nn.ParameterList([A_RK.to(dtype), torch.zeros(base.out_features, len(A_RK), dtype=dtype)])

    @property
    def A_RK(self) -> Tensor:
        return self.factors[0]

    @property
    def B_NR(self) -> Tensor:
        return self.factors[1]

    @override
    def forward(self, x_TK: Tensor) -> Tensor:
        return self.base(x_TK) + self.scale * x_TK @ self.A_RK.T @ self.B_NR.T


def first_A(name: str, r: int, inputs: int, seed: int) -> Tensor:
    """Orthonormal rows (R, K) of a Gaussian that seed and name decide; what every version has to draw."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    gaussian_RK = torch.randn(r, inputs, generator=generator)
    q_KR, upper_RR = torch.linalg.qr(gaussian_RK.double().T)
    return (q_KR * upper_RR.diagonal().sign()).T.float()
