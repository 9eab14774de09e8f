"""Small float64 models trained over real ranks with a compressor, reporting everything a claim may need."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.compression import Compressor, register_compressor
from lightning_efficient.compression.warnings import forget_warnings
from tests.compression.reference import ReferenceACP

FEATURES, CLASSES = 20, 6

MakeCompressor = Callable[[], Compressor]


def make_model(seed: int = 0) -> nn.Module:
    """Matrices of both orientations, a convolution, a norm and biases."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, 32),
        nn.LayerNorm(32),
        nn.Tanh(),
        nn.Unflatten(1, (2, 16)),
        nn.Conv1d(2, 12, 5, padding=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(192, 24),
        nn.Tanh(),
        nn.Linear(24, CLASSES),
    ).double()


def batch(step: int, rank: int, world_size: int, rows: int = 32) -> tuple[Tensor, Tensor]:
    """This rank's slice of a global batch that depends on the step only; ranks see different data."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (rows,), generator=generator)
    mine = slice(rank * rows // world_size, (rank + 1) * rows // world_size)
    return x[mine], y[mine]


def train(
    rank: int,
    world_size: int,
    make_compressor: MakeCompressor | None,
    steps: int = 40,
    ddp_kwargs: dict[str, Any] | None = None,
    start: dict[str, Any] | None = None,
    first_step: int = 0,
    include_error: bool = True,
) -> dict[str, Any]:
    """Momentum SGD for ``steps`` steps; ``start`` resumes from a former result.

    Returns per-step gradients (``emitted`` by DDP, ``own`` of this rank alone), per-step and final weights, the state
    after the last step and the counters.
    """
    model = make_model()
    ddp = DistributedDataParallel(model, **(ddp_kwargs or {}))
    compressor = register_compressor(ddp, make_compressor()) if make_compressor else None
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    if start is not None:
        model.load_state_dict(start["weights"])
        optimizer.load_state_dict(start["optimizer"])
        if compressor is not None:
            compressor.load_state_dict(start["compressor"])
    emitted, own, weights_per_step = [], [], []
    for step in range(first_step, first_step + steps):
        x, y = batch(step, rank, world_size)
        mine = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        own.append(dict(zip((n for n, _ in model.named_parameters()), mine, strict=True)))
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        emitted.append(gradients(model))
        optimizer.step()
        weights_per_step.append(flat_weights(model))
    return {
        "emitted": emitted,
        "own": own,
        "weights_per_step": weights_per_step,
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "compressor": compressor.state_dict(include_error=include_error) if compressor else None,
        "local": compressor.state_dict(sync=False) if compressor else None,
        "stats": compressor.stats.as_dict() if compressor else None,
    }


def train_reference(reference: ReferenceACP, steps: int = 40) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """The same training in one process on the joined batch: emitted gradients and weights, per step."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    emitted, weights = [], []
    for step in range(steps):
        x, y = batch(step, 0, 1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            p.grad = reference(name, p.grad)
        emitted.append(gradients(model))
        optimizer.step()
        weights.append(flat_weights(model))
    return emitted, weights


class Prescribed(nn.Module):
    """A model whose gradients are what the test says: the loss is ``sum_i <p_i, g_i>``.

    Parameters that a call gives no gradient are unused in it.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(tuple(shape), dtype=dtype)))

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return sum(((getattr(self, name) * g).sum() for name, g in gradients.items()), start=torch.zeros(()))


def prescribed(
    shapes: Mapping[str, Sequence[int]], make: MakeCompressor, dtype: torch.dtype = torch.float64, **ddp_kwargs: Any
) -> tuple[DistributedDataParallel, Any]:
    """A :class:`Prescribed` model under DDP with a compressor."""
    ddp = DistributedDataParallel(Prescribed(shapes, dtype), **ddp_kwargs)
    return ddp, register_compressor(ddp, make())


def step(ddp: DistributedDataParallel, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One backward pass with these gradients on this rank; returns what DDP made of them."""
    ddp.zero_grad()
    ddp(own).backward()
    return gradients(ddp.module)


def random_gradients(
    shapes: Mapping[str, Sequence[int]], rank: int, step: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Gradients of one rank in one step; every rank can compute those of the others."""
    generator = torch.Generator().manual_seed(7919 * step + rank)
    return {name: torch.randn(tuple(s), generator=generator, dtype=dtype) for name, s in shapes.items()}


def mean_gradients(
    shapes: Mapping[str, Sequence[int]], world_size: int, step: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The mean over the ranks of :func:`random_gradients`, in float64."""
    own = [random_gradients(shapes, rank, step, dtype) for rank in range(world_size)]
    return {name: torch.stack([g[name].double() for g in own]).mean(0) for name in shapes}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the gradients that are there."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def flat_weights(model: nn.Module) -> Tensor:
    """A copy of all weights as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def total(per_step: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum over the steps, in float64."""
    return {name: torch.stack([g[name].double() for g in per_step]).sum(0) for name in per_step[0]}


def errors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The error buffers of a state dict, averaged over the ranks where it holds all of them."""
    return {
        name: s["error"] if "error" in s else s["errors_by_rank"].mean(0) for name, s in state["parameters"].items()
    }


def close(actual: Any, expected: Any, tolerance: float) -> None:
    """Equal up to ``tolerance``, absolutely; containers of tensors too."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def equal(actual: Any, expected: Any) -> None:
    """Bit-equal; containers of tensors too."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """The messages warned inside the block, also of those said before."""
    forget_warnings()
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages.extend(str(w.message) for w in caught)
