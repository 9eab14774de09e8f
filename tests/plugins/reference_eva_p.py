"""EvaP written out: the mean gradients in one process, every matrix formed, torch's AdamW for the biases."""

import torch
from torch import nn

from lightning_efficient.eva.leading import start_directions
from tests.eva.reference_leading import plain_step
from tests.plugins.references import Reference, Step
from tests.plugins.tiny import Batch, TinyModule


def eva_p(
    *, lr: float, rank: int, momentum: float = 0.8, damping: float = 1e-3, weight_decay: float = 0.0
) -> Reference:
    """EvaP with decoupled weight decay; every layer of the tiny module is wider than the rank."""

    def on(module: TinyModule) -> Step:
        layers = [layer for layer in module.net if isinstance(layer, nn.Linear)]
        adamw = torch.optim.AdamW([layer.bias for layer in layers], lr=lr, weight_decay=weight_decay)
        states = [(torch.zeros_like(layer.weight), _start(layer, rank)) for layer in layers]

        def step(shares: list[Batch]) -> None:
            module.zero_grad()
            torch.stack([module.loss(share) for share in shares]).mean().backward()
            adamw.step()
            for i, (layer, (buffer, q)) in enumerate(zip(layers, states, strict=True)):
                assert layer.weight.grad is not None
                with torch.no_grad():
                    layer.weight *= 1 - lr * weight_decay
                    weight, buffer, q, _ = plain_step(
                        layer.weight, buffer, layer.weight.grad, q, lr=lr, momentum=momentum, damping=damping
                    )
                    layer.weight.copy_(weight)
                states[i] = buffer, q

        return step

    return on


def _start(layer: nn.Linear, rank: int) -> torch.Tensor:
    return start_directions(layer.in_features, rank, seed=layer.out_features, like=layer.weight.detach()).T
