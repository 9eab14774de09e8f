"""Power-SGD over real ranks equals the method on paper, with any buckets, from the first step."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.compression import PowerSGD
from tests.compression.harness import (
    close,
    equal,
    errors,
    make_model,
    prescribed,
    random_gradients,
    step,
    total,
    train,
    train_reference,
)
from tests.compression.reference import ReferencePowerSGD, compressed_shapes
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 30
CAPS_MB = [0.002, 0.01, 25.0]


def _train_with_each_cap(rank: int, world_size: int) -> list[dict[str, Any]]:
    return [train(rank, world_size, partial(PowerSGD, rank=2), STEPS, {"bucket_cap_mb": cap}) for cap in CAPS_MB]


@pytest.fixture(scope="module")
def runs() -> list[list[dict[str, Any]]]:
    """Results by rank and bucket cap. That they arrive at all is a claim: torch's own hook hangs over gloo here."""
    return run_ranks(_train_with_each_cap, 2)


def test_ranks_equal_one_process_on_the_joined_batch(runs: Any) -> None:
    emitted, weights = train_reference(ReferencePowerSGD(compressed_shapes(make_model(), rank=2)), STEPS)
    for by_cap in runs:
        for result in by_cap:
            close(result["emitted"], emitted, 1e-11)
            close(result["weights_per_step"], weights, 1e-11)


def test_replicas_are_bit_identical_after_every_step(runs: Any) -> None:
    for one, other in zip(*runs, strict=True):
        equal(one["weights_per_step"], other["weights_per_step"])


def test_nothing_is_lost(runs: Any) -> None:
    for one, other in zip(*runs, strict=True):
        paid = total(one["emitted"])
        for name, error in errors(one["compressor"]).items():
            paid[name] += error.view_as(paid[name])
        owed = {n: (total(one["own"])[n] + total(other["own"])[n]) / 2 for n in paid}
        close(paid, owed, 1e-10)


def _columns(rank: int, world_size: int) -> list[tuple[float, float]]:
    """After a step, the share of the local error inside the basis P, which is the column space of the gradient."""
    ddp, compressor = prescribed({"w": (10, 14)}, partial(PowerSGD, rank=3))
    left = []
    for t in range(10):
        emitted = step(ddp, random_gradients({"w": (10, 14)}, rank, t))["w"]
        basis = torch.linalg.svd(emitted).U[:, :3]
        error = errors(compressor.state_dict(sync=False))["w"]
        left.append(((basis.T @ error).norm().item(), error.norm().item()))
    return left


def test_the_error_of_each_rank_is_orthogonal_to_the_basis_it_was_projected_on() -> None:
    for left in run_ranks(_columns, 2):
        assert max(inside for inside, _ in left) < 1e-12
        assert min(norm for _, norm in left) > 0.1


def _full_rank(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    shapes = {"wide": (6, 15), "tall": (15, 6)}
    ddp, _ = prescribed(shapes, partial(PowerSGD, rank=6, min_compression_rate=0))
    emitted = [step(ddp, random_gradients(shapes, rank, t)) for t in range(4)]
    return {name: [g[name] for g in emitted] for name in shapes}


def test_full_rank_equals_allreduce_in_every_step() -> None:
    shapes = {"wide": (6, 15), "tall": (15, 6)}
    for emitted in run_ranks(_full_rank, 2):
        for t in range(4):
            for name in shapes:
                mean = (random_gradients(shapes, 0, t)[name] + random_gradients(shapes, 1, t)[name]) / 2
                close(emitted[name][t], mean, 1e-12)
