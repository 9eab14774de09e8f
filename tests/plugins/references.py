"""What each plugin must equal: the same training in one process, in plain torch, with its own arithmetic.

A reference makes, for a module, the function of a step: it takes the shares of a batch that the ranks would see, and
updates the weights. For a compressor that is an optimizer behind what turns the gradients of all ranks into the one
that every rank applies; for an optimizer it stands in a file of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.compression.reference import ReferenceACP, ReferencePowerSGD, compressed_shapes
from tests.plugins.tiny import PLAIN_SGD, Batch, MakeOptimizer, TinyModule, flat_weights, joint_batches, share

Step = Callable[[list[Batch]], None]
Reference = Callable[[TinyModule], Step]
Gradients = dict[str, Tensor]
Reduce = Callable[[list[Gradients]], Gradients]


def train_reference(
    reference: Reference, *, world_size: int, epochs: int, make_module: type[TinyModule] = TinyModule
) -> Tensor:
    """Train the tiny module in float64 and return its final weights as one vector."""
    module = make_module().double()
    step = reference(module)
    for _ in range(epochs):
        for batch in joint_batches():
            step([share(batch, rank, world_size) for rank in range(world_size)])
    return flat_weights(module)


def exchanging(make_reduce: Callable[[], Reduce], make_optimizer: MakeOptimizer = PLAIN_SGD) -> Reference:
    """An optimizer that applies what `reduce` makes of the ranks' gradients."""

    def on(module: TinyModule) -> Step:
        optimizer, reduce = make_optimizer(module.parameters()), make_reduce()

        def step(shares: list[Batch]) -> None:
            for name, gradient in reduce([_gradients(module, each) for each in shares]).items():
                module.get_parameter(name).grad = gradient
            optimizer.step()

        return step

    return on


def _gradients(module: TinyModule, batch: Batch) -> Gradients:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(module.loss(batch), parameters), strict=True))


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
