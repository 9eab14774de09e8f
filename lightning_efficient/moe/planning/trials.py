"""Times a layer by some schedules, on tokens made up for it, and leaves no trace in the training."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_efficient.moe.layer import MoELayer
from lightning_efficient.moe.planning.sampler import Clock
from lightning_efficient.moe.schedule import Schedule
from lightning_efficient.moe.traffic import without_counting

# Whoever is that far behind the best is not run again: after the first turn, in which memory is taken, and later.
_FAR_BEHIND, _BEHIND = 1.5, 1.15


def run_trials(
    layer: MoELayer,
    schedules: Sequence[Schedule],
    *,
    tokens: Tensor,
    clock: Clock,
    rounds: int = 5,
    budget_s: float = 3.0,
) -> dict[Schedule, float]:
    """Time forward and backward of a layer by each schedule. All ranks call it, and get the same answer.

    Schedules take turns, so that what disturbs the machine disturbs all alike. The time of a turn is that of the
    slowest rank. Gradients, counters and the state of generators and of the layer stay as they are.

    Args:
        layer: the layer.
        schedules: to compare.
        tokens: (S, M), of the shape and kind that the layer will get; their values are not used.
        clock: of all ranks.
        rounds: turns of each that count, at most; one before them does not.
        budget_s: seconds for everything, roughly; one turn counts at least.

    Returns:
        The median seconds of each; of those far behind after the first turn, that turn's.
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

        first: dict[Schedule, float] = {}
        for schedule in schedules:
            first[schedule] = clock.time(lambda each=schedule: step(each))  # type: ignore[misc]
        spent_s = sum(first.values())
        running = [each for each in schedules if first[each] <= _FAR_BEHIND * min(first.values())]
        times: dict[Schedule, list[float]] = {each: [] for each in running}
        for number in range(rounds):
            for schedule in running:
                times[schedule].append(clock.time(lambda each=schedule: step(each)))  # type: ignore[misc]
                spent_s += times[schedule][-1]
            if number > 0:
                medians = {each: statistics.median(times[each]) for each in running}
                running = [each for each in running if medians[each] <= _BEHIND * min(medians.values())]
            if spent_s > budget_s or len(running) == 1:
                break
    return {each: statistics.median(times.get(each, [first[each]])) for each in schedules}


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
