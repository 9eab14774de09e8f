"""Plain training steps under a `Recorder`, for the tests of what it makes of them."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from typing_extensions import override

from lightning_efficient.dissect import Attribution, Breakdown, Recorder, Row
from lightning_efficient.dissect.attribution import ENGINE, TRAINING_STEP

Loss = Callable[[nn.Module], Tensor]


def record(
    model: nn.Module,
    loss: Loss,
    *,
    steps: int = 2,
    warmup: int = 1,
    optimizer: Optimizer | None = None,
    watched: nn.Module | None = None,
) -> Attribution:
    """Train, the last `steps` steps under a recorder.

    Args:
        model: what trains.
        loss: of the model.
        steps: that are recorded.
        warmup: steps before.
        optimizer: default: SGD.
        watched: what the recorder looks at; default: the model.
    """
    optimizer = optimizer or SGD([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    recorder = Recorder(watched or model, [optimizer])
    for _ in range(warmup):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    with recorder:
        for _ in range(steps):
            recorded_step(recorder, model, loss, optimizer)
    return recorder.result()


def recorded_step(recorder: Recorder, model: nn.Module, loss: Loss, optimizer: Optimizer) -> None:
    with recorder.step():
        with recorder.range("forward", TRAINING_STEP):
            value = loss(model)
        with recorder.range("backward", ENGINE):
            value.backward()
        optimizer.step()
        optimizer.zero_grad()


def rows(breakdown: Breakdown) -> dict[str, Row]:
    return {row.name: row for row in breakdown.rows}


def times(breakdown: Breakdown) -> dict[tuple[str, str], float]:
    """Seconds by row and phase, where there are any."""
    phases = ("forward", "recompute", "backward", "optimizer", "data", "communication", "other")
    found = {(row.name, phase): float(getattr(row, f"{phase}_s")) for row in breakdown.rows for phase in phases}
    return {key: seconds for key, seconds in found.items() if seconds}


class Sleepy(nn.Module):
    """A linear layer that rests in forward, in backward, or in neither.

    Args:
        size: of input and output.
        forward_s: seconds to sleep in forward.
        backward_s: seconds to sleep in backward.
    """

    def __init__(self, size: int, *, forward_s: float = 0.0, backward_s: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.forward_s, self.backward_s = forward_s, backward_s

    @override
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.forward_s)
        rested: Tensor = _RestInBackward.apply(self.linear(x), self.backward_s)
        return rested


class _RestInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        time.sleep(ctx.seconds)
        return grads[0], None
