"""Times a layer by some schedules, on tokens made up for it, and leaves no trace in the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_efficient.moe.agreement import from_first
from lightning_efficient.moe.layer import MoELayer
from lightning_efficient.moe.planning.sampler import Clock
from lightning_efficient.moe.planning.search import Search
from lightning_efficient.moe.schedule import Schedule
from lightning_efficient.moe.traffic import without_counting

# Where the first that counts takes no more than this share of the budget, each schedule runs once before it counts.
_SHORT = 0.04
_LEAST_TURNS = 6


def run_trials(
    layer: MoELayer, search: Search, *, tokens: Tensor, clock: Clock, turns: int = 40, budget_s: float = 2.5
) -> None:
    """Run forward and backward of a layer by the schedules that the search asks for, and tell it the seconds.

    All ranks call it; rank 0 decides which comes next, and the time of a turn is that of the slowest rank. The first
    run does not count, nor, where runs are short, the first of each schedule: they take memory. Gradients, counters and
    the state of generators and of the layer stay as they are.

    Args:
        layer: the layer.
        search: of the schedules; it knows the times afterwards.
        tokens: (S, M), of the shape and kind that the layer will get; their values are not used.
        clock: of all ranks.
        turns: that count, at most.
        budget_s: seconds for everything, roughly. Six turns count however long they take.
    """
    with _untouched(tokens.device):
        # Tokens are equal on an MP group, as in training.
        generator = torch.Generator(tokens.device).manual_seed(1 + layer.topology.dp.rank)
        x_SM = torch.randn(tokens.shape, device=tokens.device, generator=generator).to(tokens.dtype).requires_grad_()
        wanted = [x_SM, *(each for each in layer.parameters() if each.requires_grad)]
        grad_SM = torch.randn_like(x_SM)

        def step(schedule: Schedule) -> None:
            y_SM, _ = layer.run(x_SM, schedule)
            torch.autograd.grad(y_SM, wanted, grad_SM.to(y_SM.dtype), allow_unused=True)

        spent_s = first_s = 0.0
        for turn in range(turns):
            schedule = from_first(search.next(), layer.topology.world)
            if schedule is None:
                break
            if turn == 0 or (schedule not in search.runs and first_s < _SHORT * budget_s):
                spent_s += clock.time(lambda: step(schedule))  # noqa: B023
            seconds = clock.time(lambda: step(schedule))  # noqa: B023
            search.note(schedule, seconds)
            first_s = first_s or seconds
            spent_s += seconds
            if spent_s > budget_s and turn + 1 >= _LEAST_TURNS:
                break


@contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Gradients are on, whatever the mode; generators are put back, and traffic is not counted."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        without_counting(),
    ):
        yield
