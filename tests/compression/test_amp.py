"""Loss scaling leaves no trace: neither changing scales nor skipped steps change the trajectory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.compression import ACPSGD, Compressor, PowerSGD, register_compressor
from tests.compression.harness import batch, equal, errors, flat_weights, make_model, prescribed, random_gradients, step
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

MAKERS: dict[str, Callable[..., Compressor]] = {"acp_sgd": ACPSGD, "power_sgd": PowerSGD}

# A scale for each step; None marks a step in which one rank's gradients overflow.
SCRIPT: list[float | None] = [2.0**12, 2.0**12, None, 2.0**11, 2.0**3, None, None, 2.0**16, 2.0**16, None, 1.0, 2.0**-4]


def _train(rank: int, world_size: int, make: Callable[[], Compressor], where: str | None) -> dict[str, Any]:
    """Train by the script in float32; with ``where`` None without a scaler, leaving out the steps that overflow."""
    model = make_model().float()
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=10_000, enabled=where is not None)
    scaler.scale(torch.zeros(()))  # the scaler makes its tensors at the first use
    loss_scale = scaler.get_scale if where is not None else None
    compressor = register_compressor(ddp, make(), loss_scale=loss_scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    overflow = False

    def poison(grad: Tensor) -> Tensor:
        return torch.cat([grad.flatten()[:-1], grad.new_tensor([torch.inf])]).view_as(grad) if overflow else grad

    if where is not None:
        model.get_parameter(where).register_hook(poison)
    skipped, weights = [], []
    for t, scale in enumerate(SCRIPT):
        if where is None and scale is None:
            continue
        overflow = scale is None and rank == world_size - 1
        if where is not None and scale is not None:
            scaler.update(scale)
        x, y = batch(t, rank, world_size)
        optimizer.zero_grad()
        before = flat_weights(model)
        scaler.scale(F.cross_entropy(ddp(x.float()), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(torch.equal(before, flat_weights(model)))
        if not skipped[-1]:
            weights.append(flat_weights(model))
    return {
        "weights": weights,
        "skipped": skipped,
        "errors": errors(compressor.state_dict(sync=False)),
        "buckets": compressor.stats.buckets,
    }


# Parameters in the last bucket, in one between, and in the first.
PLACES = {"last bucket": "0.weight", "raw tensor": "4.bias", "first bucket": "9.weight"}


def _all(rank: int, world_size: int) -> dict[Any, dict[str, Any]]:
    results = {}
    for method, make in MAKERS.items():
        build = partial(make, rank=2)
        results[method, None] = _train(rank, world_size, build, None)
        for place, name in PLACES.items():
            results[method, place] = _train(rank, world_size, build, name)
    return results


@pytest.fixture(scope="module")
def runs() -> list[dict[Any, dict[str, Any]]]:
    return run_ranks(_all, 2)


CASES = [pytest.param(method, place, id=f"{method}, inf in the {place}") for method in MAKERS for place in PLACES]


@pytest.mark.parametrize(("method", "place"), CASES)
def test_scaled_training_is_bit_identical_to_unscaled_without_the_skipped_steps(
    runs: Any, method: str, place: str
) -> None:
    for results in runs:
        scaled, unscaled = results[method, place], results[method, None]
        assert scaled["buckets"] > len(SCRIPT)
        equal(scaled["weights"], unscaled["weights"])
        equal(scaled["errors"], unscaled["errors"])


@pytest.mark.parametrize(("method", "place"), CASES)
def test_an_overflow_on_one_rank_skips_the_step_on_every_rank(runs: Any, method: str, place: str) -> None:
    for results in runs:
        assert results[method, place]["skipped"] == [scale is None for scale in SCRIPT]


# ---- non-finite gradients without a scaler ---------------------------------------------------------------------------

SHAPES = {"a": (10, 14), "b": (14, 10), "c": (5,), "d": (12, 12)}


def _snapshot(compressor: Compressor) -> dict[str, Any]:
    return {n: dict(s) for n, s in compressor.state_dict(sync=False)["parameters"].items()}


def _non_finite(rank: int, world_size: int) -> dict[Any, Any]:
    results = {}
    for method, make in MAKERS.items():
        for atomic in (None, False, True):
            for value in (torch.nan, torch.inf):
                ddp, compressor = prescribed(SHAPES, partial(make, rank=2, atomic=atomic), bucket_cap_mb=0.0005)
                for t in range(3):
                    step(ddp, random_gradients(SHAPES, rank, t))
                before = _snapshot(compressor)
                bad = random_gradients(SHAPES, rank, 3)
                if rank == 1:
                    bad["b"][3, 2] = value
                emitted = step(ddp, bad)
                after = _snapshot(compressor)
                later = step(ddp, random_gradients(SHAPES, rank, 4))
                results[method, atomic, value] = before, after, emitted, later
    return results


@pytest.fixture(scope="module")
def non_finite() -> list[dict[Any, Any]]:
    return run_ranks(_non_finite, 2)


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("atomic", [None, False], ids=str)
def test_a_non_finite_gradient_leaves_the_state_of_its_bucket_alone(
    non_finite: Any, method: str, value: float, atomic: bool | None
) -> None:
    for results in non_finite:
        key = next(k for k in results if k[:2] == (method, atomic) and str(k[2]) == str(value))
        before, after, emitted, later = results[key]
        assert not emitted["b"].isfinite().any()
        equal(after["b"], before["b"])
        for name in ("a", "d"):  # other buckets go on
            assert emitted[name].isfinite().all()
            assert not torch.equal(after[name]["error"], before[name]["error"])
        assert all(g.isfinite().all() for g in later.values()), "one bad step must not poison the next"


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_an_atomic_step_leaves_the_state_of_every_bucket_alone(non_finite: Any, method: str, value: float) -> None:
    for results in non_finite:
        key = next(k for k in results if k[:2] == (method, True) and str(k[2]) == str(value))
        before, after, emitted, later = results[key]
        assert not any(g.isfinite().any() for g in emitted.values())
        equal(after, before)
        assert all(g.isfinite().all() for g in later.values())


def test_all_ranks_emit_the_same_gradients_in_a_non_finite_step(non_finite: Any) -> None:
    one, other = ([r[2:] for r in results.values()] for results in non_finite)
    equal(one, other)


# ---- buckets that are not compressed belong to the step too ----------------------------------------------------------


class _SparseAndDense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6, sparse=True)
        self.linear = nn.Linear(6, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.embedding(tokens)).square().sum()


def _sparse_overflow(rank: int, world_size: int) -> dict[str, tuple[Any, Any]]:
    results = {}
    for method, make in MAKERS.items():
        torch.manual_seed(0)
        model = _SparseAndDense()
        ddp = DistributedDataParallel(model)
        compressor = register_compressor(ddp, make(rank=2, atomic=True))
        overflow = False

        def poison(grad: Tensor) -> Tensor:
            return grad * torch.inf if overflow else grad  # noqa: B023

        model.embedding.weight.register_hook(poison)
        for _ in range(2):
            ddp(torch.arange(3)).backward()
        before = _snapshot(compressor)
        overflow = rank == 1
        ddp(torch.arange(3)).backward()
        results[method] = before, _snapshot(compressor)
        dist.barrier()
    return results


def test_an_overflow_in_an_uncompressed_bucket_stops_the_atomic_step_too() -> None:
    for results in run_ranks(_sparse_overflow, 2):
        for before, after in results.values():
            equal(after, before)
