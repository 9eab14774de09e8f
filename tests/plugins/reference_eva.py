"""Eva, Eva-f and Eva-s written out: one process on the joint batch, dense solves, nothing of the package.

Gradients and vectors come from explicit activations; a bias is the last column of its layer's matrix, whose input is 1.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.plugins.references import Reference, Step
from tests.plugins.tiny import Batch, TinyModule

NEW_WEIGHT = 0.95


def eva(
    variant: str,
    *,
    lr: float,
    damping: float,
    kl_clip: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    skipped: Sequence[int] = (),
) -> Reference:
    """Eva or Eva-f with the KL clip, over all samples, g summed over rows.

    Args:
        variant: `eva` or `eva_f`.
        lr: Learning rate.
        damping: Absolute.
        kl_clip: Bound of the squared step.
        momentum: Share of the last update that is kept.
        weight_decay: Added to the update.
        skipped: Numbers of the layers that SGD trains.
    """

    def on(module: TinyModule) -> Step:
        averages: dict[int, tuple[Tensor, Tensor]] = {}
        update = _sgd(module, lr=lr, momentum=momentum, weight_decay=weight_decay)

        def step(shares: list[Batch]) -> None:
            inputs, outputs = _activations(module, shares)
            gradients = [dy.T @ x for x, dy in zip(inputs, outputs, strict=True)]
            directions = {}
            for i, (x, dy) in enumerate(zip(inputs, outputs, strict=True)):
                new = x.mean(0), dy.sum(0)
                averages[i] = _mixed(averages[i], new) if i in averages else new
                if i not in skipped:
                    directions[i] = _solve(gradients[i], *averages[i], damping=damping, both=variant == "eva")
            size = sum((v * gradients[i]).sum() for i, v in directions.items()) * lr**2
            nu = min(1.0, float((kl_clip / size).sqrt()))
            update([nu * directions[i] if i in directions else g for i, g in enumerate(gradients)])

        return step

    return on


def eva_s(*, lr: float, damping: float, momentum: float = 0.9, weight_decay: float = 0.0) -> Reference:
    """Eva-s as published: sums of the means of the gradients, each layer's step as long as its gradient."""

    def on(module: TinyModule) -> Step:
        sums: dict[int, tuple[Tensor, Tensor]] = {}
        update = _sgd(module, lr=lr, momentum=momentum, weight_decay=weight_decay)

        def step(shares: list[Batch]) -> None:
            inputs, outputs = _activations(module, shares)
            updates = []
            for i, (x, dy) in enumerate(zip(inputs, outputs, strict=True)):
                gradient = dy.T @ x
                weight, bias = gradient[:, :-1], gradient[:, -1:]
                of_inputs, of_outputs = sums.get(i, (0.0, 0.0))
                sums[i] = of_inputs + weight.mean(0), of_outputs + weight.mean(1)
                direction = _solve(weight, *sums[i], damping=damping, both=True)
                updates.append(torch.cat((direction * weight.norm() / direction.norm(), bias), dim=1))
            update(updates)

        return step

    return on


def _activations(module: TinyModule, shares: list[Batch]) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs of each layer with a 1 behind them, and the gradients of the mean loss at its outputs; by row."""
    h, y = (torch.cat(parts) for parts in zip(*shares, strict=True))
    inputs, outputs = [], []
    for layer in _layers(module):
        inputs.append(torch.cat((h, torch.ones(len(h), 1, dtype=h.dtype)), dim=1).detach())
        outputs.append(h @ layer.weight.T + layer.bias)
        h = outputs[-1].tanh()
    return inputs, list(torch.autograd.grad(F.cross_entropy(outputs[-1], y), outputs))


def _mixed(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    a, g = ((1 - NEW_WEIGHT) * before + NEW_WEIGHT * now for before, now in zip(old, new, strict=True))
    return a, g


def _solve(gradient: Tensor, a: Tensor, g: Tensor, *, damping: float, both: bool) -> Tensor:
    """`F^-1 G` with the whole curvature `(g g^T) (x) (a a^T) + damping I`, or with its input side alone."""
    right = torch.outer(a, a)
    if not both:
        return torch.linalg.solve(right + damping * torch.eye(len(a), dtype=a.dtype), gradient.T).T
    curvature = torch.kron(torch.outer(g, g), right)
    curvature += damping * torch.eye(len(curvature), dtype=a.dtype)
    return torch.linalg.solve(curvature, gradient.flatten()).view_as(gradient)


def _sgd(module: TinyModule, *, lr: float, momentum: float, weight_decay: float) -> Callable[[list[Tensor]], None]:
    layers = _layers(module)
    buffers = [torch.zeros(layer.out_features, layer.in_features + 1, dtype=torch.float64) for layer in layers]

    @torch.no_grad()
    def update(directions: list[Tensor]) -> None:
        for layer, buffer, direction in zip(layers, buffers, directions, strict=True):
            matrix = torch.cat((layer.weight, layer.bias[:, None]), dim=1)
            buffer.mul_(momentum).add_(direction + weight_decay * matrix)
            layer.weight -= lr * buffer[:, :-1]
            layer.bias -= lr * buffer[:, -1]

    return update


def _layers(module: TinyModule) -> list[nn.Linear]:
    return [layer for layer in module.net if isinstance(layer, nn.Linear)]
