"""ACP-SGD over real ranks equals the method on paper."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.compression import ACPSGD
from tests.compression.harness import (
    close,
    equal,
    errors,
    make_model,
    mean_gradients,
    prescribed,
    random_gradients,
    step,
    total,
    train,
    train_reference,
)
from tests.compression.reference import ReferenceACP, compressed_shapes
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 40
CAPS_MB = [0.002, 25.0]  # about one bucket per layer, one bucket


def _train_with_each_cap(rank: int, world_size: int) -> list[dict[str, Any]]:
    return [train(rank, world_size, partial(ACPSGD, rank=2), STEPS, {"bucket_cap_mb": cap}) for cap in CAPS_MB]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def runs(request: pytest.FixtureRequest) -> list[list[dict[str, Any]]]:
    """Results by rank and bucket cap."""
    return run_ranks(_train_with_each_cap, request.param)


@pytest.fixture(scope="module")
def reference() -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    return train_reference(ReferenceACP(compressed_shapes(make_model(), rank=2)), STEPS)


def test_the_model_has_compressed_and_raw_tensors_of_both_orientations() -> None:
    shapes = compressed_shapes(make_model(), rank=2)
    assert {rows > cols for rows, cols, _ in shapes.values()} == {True, False}
    assert 0 < len(shapes) < len(list(make_model().parameters()))


@pytest.mark.parametrize("cap", range(len(CAPS_MB)), ids=map(str, CAPS_MB))
def test_ranks_equal_one_process_on_the_joined_batch(runs: Any, reference: Any, cap: int) -> None:
    # 40 momentum steps amplify the rounding of float64 (2e-16) to about 5e-13 in 2 to 4 ranks.
    emitted, weights = reference
    for by_cap in runs:
        close(by_cap[cap]["emitted"], emitted, 1e-11)
        close(by_cap[cap]["weights_per_step"], weights, 1e-11)


def test_the_method_is_not_a_plain_all_reduce(runs: Any) -> None:
    result = runs[0][0]
    mean = torch.stack([by_cap[0]["own"][0]["0.weight"] for by_cap in runs]).mean(0)
    assert (result["emitted"][0]["0.weight"] - mean).norm() > 0.1 * mean.norm()


def test_replicas_are_bit_identical_after_every_step(runs: Any) -> None:
    for by_cap in runs[1:]:
        for mine, first in zip(by_cap, runs[0], strict=True):
            equal(mine["weights_per_step"], first["weights_per_step"])


def test_nothing_is_lost_emitted_plus_mean_error_is_the_sum_of_mean_gradients(runs: Any) -> None:
    for cap in range(len(CAPS_MB)):
        results = [by_cap[cap] for by_cap in runs]
        owed = {n: torch.stack([total(r["own"])[n] for r in results]).mean(0) for n in results[0]["own"][0]}
        paid = total(results[0]["emitted"])
        for name, error in errors(results[0]["compressor"]).items():
            paid[name] += error.view_as(paid[name])
        close(paid, owed, 1e-10)
        for name, error in errors(results[0]["compressor"]).items():
            close(error, torch.stack([errors(r["local"])[name] for r in results]).mean(0), 1e-15)


# ---- single matrices with prescribed gradients -----------------------------------------------------------------------

WIDE, TALL = (6, 15), (15, 6)


def _full_rank(rank: int, world_size: int, shape: tuple[int, int]) -> dict[str, Any]:
    make = partial(ACPSGD, rank=min(shape), min_compression_rate=0)
    ddp, compressor = prescribed({"w": shape}, make)
    emitted, locals_ = [], []
    for t in range(6):
        emitted.append(step(ddp, random_gradients({"w": shape}, rank, t))["w"])
        locals_.append(compressor.state_dict(sync=False)["parameters"]["w"])
    return {"emitted": emitted, "locals": locals_}


@pytest.mark.parametrize(("shape", "lossless"), [(TALL, 0), (WIDE, 1)], ids=["tall in P steps", "wide in Q steps"])
def test_full_rank_equals_allreduce_in_the_lossless_phase(shape: tuple[int, int], lossless: int) -> None:
    for result in run_ranks(_full_rank, 2, shape):
        owed = torch.zeros(shape, dtype=torch.float64)
        lossy = 0.0
        for t, (emitted, local) in enumerate(zip(result["emitted"], result["locals"], strict=True)):
            owed += mean_gradients({"w": shape}, 2, t)["w"]
            if t % 2 == lossless:
                # All that was owed, also by the lossy step before, is paid: what an all-reduce would have paid.
                close(emitted, owed, 1e-12)
                close(local["error"], torch.zeros(shape, dtype=torch.float64), 1e-12)
                owed.zero_()
            else:
                owed -= emitted
                lossy = max(lossy, local["error"].norm().item())
        assert lossy > 0.1, "the other phase must have been lossy, or this shows nothing"


def _square_full_rank(rank: int, world_size: int) -> list[Tensor]:
    ddp, _ = prescribed({"w": (7, 7)}, partial(ACPSGD, rank=9, min_compression_rate=0))
    return [step(ddp, random_gradients({"w": (7, 7)}, rank, t))["w"] for t in range(4)]


def test_full_rank_of_a_square_matrix_equals_allreduce_in_every_step() -> None:
    for emitted in run_ranks(_square_full_rank, 2):
        close(emitted, [mean_gradients({"w": (7, 7)}, 2, t)["w"] for t in range(4)], 1e-12)


def _low_rank_gradient(world_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return [left @ torch.randn(3, 20, generator=generator, dtype=torch.float64) for _ in range(world_size)]


def _constant(rank: int, world_size: int) -> tuple[list[float], list[Tensor]]:
    ddp, compressor = prescribed({"w": (12, 20)}, partial(ACPSGD, rank=3))
    own = {"w": _low_rank_gradient(world_size)[rank]}
    emitted, norms = [], []
    for _ in range(4):
        emitted.append(step(ddp, own)["w"])
        norms.append(errors(compressor.state_dict(sync=False))["w"].norm().item())
    return norms, emitted


def test_a_constant_gradient_of_the_factors_rank_is_paid_in_full_every_two_steps() -> None:
    mean = torch.stack(_low_rank_gradient(2)).mean(0)
    for norms, emitted in run_ranks(_constant, 2):
        assert min(norms[0::2]) > 0.1  # after a P step, or this shows nothing
        assert max(norms[1::2]) < 1e-12 * 20  # gradients of norm 20
        close(emitted[0] + emitted[1], 2 * mean, 1e-12)
        close(emitted[2] + emitted[3], 2 * mean, 1e-12)


def _projections(rank: int, world_size: int) -> list[tuple[float, float]]:
    shapes = {"a": (10, 14), "b": (14, 10)}
    ddp, compressor = prescribed(shapes, partial(ACPSGD, rank=3))
    left = []
    for t in range(12):
        step(ddp, random_gradients(shapes, rank, t))
        for state in compressor.state_dict(sync=False)["parameters"].values():
            error, sent_q = state["error"], not state["sends_q"]
            projected = state["P"] @ error if sent_q else error @ state["Q"].T
            left.append(((projected.norm() / error.norm()).item(), error.norm().item()))
    return left


def test_the_error_of_each_rank_is_orthogonal_to_the_basis_it_was_projected_on() -> None:
    # Only the local form has this: with the averaged reconstruction each rank would keep (own - mean) in the basis.
    for left in run_ranks(_projections, 2):
        assert max(share for share, _ in left) < 1e-12
        assert min(norm for _, norm in left) > 0.1


def _heterogeneous(rank: int, world_size: int) -> float:
    generator = torch.Generator().manual_seed(rank)
    own = torch.randn(16, 24, generator=generator, dtype=torch.float64)  # constant: the ranks' data differ for ever
    ddp, compressor = prescribed({"w": (16, 24)}, partial(ACPSGD, rank=4))
    worst = 0.0
    for t in range(300):
        gradient = own + 0.5 * random_gradients({"w": (16, 24)}, rank, t)["w"]
        step(ddp, {"w": gradient})
        worst = max(worst, (errors(compressor.state_dict(sync=False))["w"].norm() / own.norm()).item())
    return worst


def test_the_error_of_each_rank_stays_bounded_when_the_ranks_data_differ() -> None:
    # Keeping the averaged reconstruction would let it grow by |own - mean| per step: above 100 after 300 steps.
    worst = run_ranks(_heterogeneous, 2)
    assert max(worst) < 10


# ---- warm-up ---------------------------------------------------------------------------------------------------------


def _warm_up(rank: int, world_size: int) -> dict[str, Any]:
    plain = train(rank, world_size, None, 6, {"bucket_cap_mb": 0.02})
    warm = train(rank, world_size, partial(ACPSGD, rank=2, warmup_steps=6), 6, {"bucket_cap_mb": 0.02})
    longer = train(rank, world_size, partial(ACPSGD, rank=2, warmup_steps=6), 7, {"bucket_cap_mb": 0.02})
    unseeded = train(
        rank, world_size, partial(ACPSGD, rank=2, warmup_steps=6, seed_from_dense=False), 7, {"bucket_cap_mb": 0.02}
    )
    return {"plain": plain, "warm": warm, "longer": longer, "unseeded": unseeded}


@pytest.fixture(scope="module")
def warm_up() -> list[dict[str, Any]]:
    return run_ranks(_warm_up, 2)


def test_warm_up_equals_plain_ddp(warm_up: Any) -> None:
    for runs in warm_up:
        equal(runs["warm"]["weights_per_step"], runs["plain"]["weights_per_step"])
        assert runs["warm"]["stats"]["dense_buckets"] == runs["warm"]["stats"]["buckets"] > 6
        assert runs["warm"]["stats"]["bytes_sent"] == runs["warm"]["stats"]["bytes_dense"]


def test_seeding_from_the_warm_up_costs_nothing_on_the_wire(warm_up: Any) -> None:
    for runs in warm_up:
        assert runs["longer"]["stats"]["bytes_sent"] == runs["unseeded"]["stats"]["bytes_sent"]


def _seeded(rank: int, world_size: int) -> dict[bool, float]:
    results = {}
    for seeded in (True, False):
        make = partial(ACPSGD, rank=3, warmup_steps=1, seed_from_dense=seeded)
        ddp, compressor = prescribed({"w": (12, 20)}, make)
        own = {"w": _low_rank_gradient(world_size)[rank]}
        dense = step(ddp, own)["w"]
        close(dense, torch.stack(_low_rank_gradient(world_size)).mean(0), 1e-14)
        step(ddp, {"w": dense})  # the same on all ranks, so that the local errors show what the factors miss
        results[seeded] = (errors(compressor.state_dict(sync=False))["w"].norm() / dense.norm()).item()
    return results


def test_factors_seeded_from_the_last_dense_gradient_capture_it_at_once() -> None:
    for left in run_ranks(_seeded, 2):
        assert left[True] < 1e-13
        assert left[False] > 0.1


def test_replicas_are_bit_identical_after_a_seeded_warm_up(warm_up: Any) -> None:
    equal(warm_up[1]["longer"]["weights_per_step"], warm_up[0]["longer"]["weights_per_step"])


def test_compression_starts_right_after_the_last_warm_up_step(warm_up: Any) -> None:
    for runs in warm_up:
        stats = runs["longer"]["stats"]
        assert stats["dense_buckets"] == runs["warm"]["stats"]["dense_buckets"]
        assert stats["buckets"] > stats["dense_buckets"]


# ---- without error feedback ------------------------------------------------------------------------------------------


def _no_feedback(rank: int, world_size: int) -> tuple[list[Tensor], dict[str, Any]]:
    ddp, compressor = prescribed({"w": (9, 12)}, partial(ACPSGD, rank=2, error_feedback=False))
    own = {"w": _plain_matrix(rank)}
    return [step(ddp, own)["w"] for _ in range(3)], compressor.state_dict()


def _plain_matrix(rank: int) -> Tensor:
    return torch.randn(9, 12, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def test_without_error_feedback_each_step_is_a_bare_projection() -> None:
    mean = torch.stack([_plain_matrix(rank) for rank in range(2)]).mean(0)
    for emitted, state in run_ranks(_no_feedback, 2):
        assert "error" not in state["parameters"]["w"]
        for gradient in emitted:
            assert torch.linalg.matrix_rank(gradient) == 2
            # A projection of the mean: orthogonal to what it leaves out.
            assert abs((gradient * (mean - gradient)).sum().item()) < 1e-12
