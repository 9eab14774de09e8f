"""Tiny nets with their batches, and training loops over them with Eva, the reference or any optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.eva.reference import ReferenceEva, backward, recorded

FEATURES, CLASSES = 6, 4


@dataclass(frozen=True)
class Task:
    """A net and what it is fed with."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Tensor]
    rows_per_sample: int = 1

    def net(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().double()

    def batch(self, step: int, samples: int = 20) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        x = self.inputs(samples, generator)
        shape = (samples,) if self.rows_per_sample == 1 else (samples, self.rows_per_sample)
        return x, torch.randint(CLASSES, shape, generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy over all rows, with a small penalty on the logits.

    Without that, the gradient of the last layer would sum to rounding noise over the classes, which Eva-s blows up
    under relative damping.
    """
    x, y = batch
    logits = model(x).flatten(0, -2)
    return F.cross_entropy(logits, y.flatten()) + 0.05 * logits.square().sum(-1).mean()


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 9), nn.Tanh(), nn.Linear(9, 5, bias=False), nn.Tanh(), nn.Linear(5, CLASSES)
    )


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, dilation=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )


def _sequence() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES)
    )  # fmt: skip


def _floats(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, generator: torch.randn(n, *shape, generator=generator, dtype=torch.float64)


MLP = Task(_mlp, _floats(FEATURES))
CONV = Task(_conv, _floats(3, 6, 6))
SEQUENCE = Task(_sequence, lambda n, generator: torch.randint(11, (n, 7), generator=generator), rows_per_sample=7)
TASKS = {"mlp": MLP, "conv and batch norm": CONV, "3-d linear": SEQUENCE}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    steps: int,
    *,
    first: int = 0,
    samples: int = 20,
    forward: Callable[..., Any] | None = None,
) -> None:
    """Take ``steps`` steps; ``forward`` runs in place of the model, compiled for one."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(forward or model, task.batch(step, samples)).backward()  # type: ignore[arg-type]
        optimizer.step()


def train_reference(reference: ReferenceEva, task: Task, steps: int, *, samples: int = 20) -> None:
    """The same training by the reference."""
    model = reference.model
    for step in range(steps):
        model.zero_grad()
        with recorded(model) as uses:
            loss = loss_of(model, task.batch(step, samples))
        backward(loss, uses)
        reference.step(uses)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the gradients that are there."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(actual: Any, expected: Any) -> float:
    """The largest difference between two nested containers of tensors, relative to the largest entry of each tensor."""
    if isinstance(expected, Tensor):
        assert actual.shape == expected.shape
        scale = expected.abs().max().clamp(min=1e-300)
        return ((actual - expected).abs().max() / scale).item()
    assert actual.keys() == expected.keys()
    return max(relative_difference(actual[key], expected[key]) for key in expected)


def equal(actual: Any, expected: Any) -> None:
    """Bit-equal; containers of tensors too."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
