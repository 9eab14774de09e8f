"""What each plugin must equal: the same training in one process, in plain torch, with its own arithmetic.

A reference turns the gradients of all ranks into the one gradient every rank applies. It is made anew for each run and
may carry state from step to step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.compression.reference import ReferenceACP, ReferencePowerSGD, compressed_shapes
from tests.plugins.tiny import TinyModule, flat_weights, joint_batches, share

Gradients = dict[str, Tensor]
Reduce = Callable[[list[Gradients]], Gradients]


def mean(per_rank: list[Gradients]) -> Gradients:
    """What plain DDP computes."""
    return {name: torch.stack([g[name] for g in per_rank]).mean(0) for name in per_rank[0]}


def low_rank(kind: type[ReferenceACP], rank: int) -> Callable[[], Reduce]:
    """One worker with the mean gradient: compression by a known basis is linear, so W workers equal it."""

    def make() -> Reduce:
        compress = kind(compressed_shapes(TinyModule(), rank))
        return lambda per_rank: {name: compress(name, g) for name, g in mean(per_rank).items()}

    return make


def acp(rank: int) -> Callable[[], Reduce]:
    return low_rank(ReferenceACP, rank)


def power(rank: int) -> Callable[[], Reduce]:
    return low_rank(ReferencePowerSGD, rank)


def top_k(density: float) -> Callable[[], Reduce]:
    """Each rank's largest elements of each parameter, with error feedback."""

    def largest(a: Tensor) -> Tensor:
        smallest = a.abs().flatten().sort(descending=True).values[max(1, round(density * a.numel())) - 1]
        return torch.where(a.abs() >= smallest, a, 0.0)

    def make() -> Reduce:
        errors: dict[tuple[int, str], Tensor] = {}

        def reduce(per_rank: list[Gradients]) -> Gradients:
            total: Gradients = {}
            for rank, gradients in enumerate(per_rank):
                for name, gradient in gradients.items():
                    a = gradient + errors.get((rank, name), 0.0)
                    sent = largest(a)
                    errors[rank, name] = a - sent
                    total[name] = total.get(name, 0.0) + sent / len(per_rank)
            return total

        return reduce

    return make


def majority(per_rank: list[Gradients]) -> Gradients:
    return {name: torch.stack([g[name].sign() for g in per_rank]).sum(0).sign() for name in per_rank[0]}


def in_bfloat16(per_rank: list[Gradients]) -> Gradients:
    """Shares rounded to 16 bits, and their sum too."""
    return {
        name: sum((g[name] / len(per_rank)).bfloat16() for g in per_rank).double()  # type: ignore[union-attr]
        for name in per_rank[0]
    }


def train_reference(reduce: Reduce, *, world_size: int, lr: float, epochs: int) -> Tensor:
    """Train `TinyModule` in float64 and return its final weights as one vector."""
    module = TinyModule(lr).double()
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for batch in joint_batches():
            per_rank = [_gradients(module, share(batch, rank, world_size)) for rank in range(world_size)]
            for name, gradient in reduce(per_rank).items():
                module.get_parameter(name).grad = gradient
            optimizer.step()
    return flat_weights(module)


def _gradients(module: TinyModule, batch: tuple[Tensor, Tensor]) -> Gradients:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(module.loss(batch), parameters), strict=True))
