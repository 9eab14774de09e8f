"""Top-k, sign and half-precision compression equal the methods on paper."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.compression import HalfPrecision, SignSGD, TopK
from lightning_efficient.compression.sign_sgd import count_votes, pack_signs
from tests.compression.harness import close, equal, errors, mean_gradients, prescribed, random_gradients, step, train
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

SHAPES = {"a": (10, 14), "b": (14, 10), "raw": (5,), "scalar": ()}
ONE_BUCKET = ["a", "b", "raw", "scalar"]


# ---- top-k -----------------------------------------------------------------------------------------------------------


def _flat(g: dict[str, Tensor]) -> Tensor:
    return torch.cat([g[name].flatten() for name in ONE_BUCKET])


def _largest(a: Tensor, density: float) -> Tensor:
    threshold = a.abs().sort(descending=True).values[max(1, round(density * a.numel())) - 1]
    return torch.where(a.abs() >= threshold, a, 0.0)


def _reference_top_k(world_size: int, steps: int, density: float) -> list[Tensor]:
    """Per parameter; which elements are largest is unique as long as no two magnitudes are equal."""
    numels = [torch.Size(SHAPES[name]).numel() for name in ONE_BUCKET]
    error = [torch.zeros(286, dtype=torch.float64) for _ in range(world_size)]
    emitted = []
    for t in range(steps):
        total = torch.zeros(286, dtype=torch.float64)
        for rank in range(world_size):
            a = _flat(random_gradients(SHAPES, rank, t)) + error[rank]
            sent = torch.cat([_largest(part, density) for part in a.split(numels)])
            error[rank] = a - sent
            total += sent
        emitted.append(total / world_size)
    return emitted


def _top_k(rank: int, world_size: int) -> dict[str, Any]:
    ddp, compressor = prescribed(SHAPES, partial(TopK, 0.1))
    emitted = [_flat(step(ddp, random_gradients(SHAPES, rank, t))) for t in range(10)]
    whole, _ = prescribed(SHAPES, partial(TopK, 1.0))
    dense = [step(whole, random_gradients(SHAPES, rank, t)) for t in range(3)]
    small, small_compressor = prescribed(SHAPES, partial(TopK, 0.1), torch.float32)
    paid = sum(step(small, random_gradients(SHAPES, rank, t, torch.float32))["a"] for t in range(5))
    return {
        "emitted": emitted,
        "dense": dense,
        "bytes": compressor.stats.bytes_sent,
        "float32": paid + errors(small_compressor.state_dict())["a"].view(10, 14),
        "trained": train(rank, world_size, partial(TopK, 0.05), 15, {"bucket_cap_mb": 0.01}),
    }


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def top_k(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(_top_k, request.param)


def test_top_k_equals_its_reference(top_k: Any) -> None:
    expected = _reference_top_k(len(top_k), 10, 0.1)
    for result in top_k:
        close(result["emitted"], expected, 1e-13)


def test_top_k_of_everything_equals_allreduce(top_k: Any) -> None:
    for result in top_k:
        close(result["dense"], [mean_gradients(SHAPES, len(top_k), t) for t in range(3)], 1e-15)


def test_top_k_sends_a_value_and_a_position_for_each_chosen_element(top_k: Any) -> None:
    assert {result["bytes"] for result in top_k} == {10 * (14 + 14 + 1 + 1) * (8 + 8)}


def test_top_k_in_float32_loses_nothing(top_k: Any) -> None:
    owed = sum(mean_gradients(SHAPES, len(top_k), t, torch.float32)["a"] for t in range(5))
    for result in top_k:
        close(result["float32"].double(), owed, 1e-5)


def test_top_k_keeps_the_replicas_bit_identical(top_k: Any) -> None:
    for result in top_k[1:]:
        equal(result["trained"]["weights_per_step"], top_k[0]["trained"]["weights_per_step"])


# ---- signs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 64, 1001])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_packed_votes_count_as_the_sign_of_the_sum_of_signs(numel: int, ranks: int) -> None:
    x = torch.randn(ranks, numel, generator=torch.Generator().manual_seed(numel))
    packed = torch.stack([pack_signs(row, zero_votes_plus=False) for row in x])
    assert packed.dtype == torch.uint8
    assert packed.shape[1] == -(-numel // 8)
    out = torch.empty(numel)
    count_votes(packed, out=out)
    equal(out, x.sign().sum(0).sign())


VOTES = {"a": (10, 14), "silent": (6, 6), "raw": (5,), "scalar": ()}


def _sign(rank: int, world_size: int) -> dict[str, Any]:
    ddp, compressor = prescribed(VOTES, SignSGD)
    zero = torch.zeros(6, 6, dtype=torch.float64)
    emitted = [step(ddp, random_gradients(VOTES, rank, t) | {"silent": zero}) for t in range(3)]
    sent = compressor.stats.bytes_sent
    half_zero = {**random_gradients(VOTES, rank, 0), "silent": zero.clone()}
    half_zero["silent"][0, 0] = 1.0  # not all zero: the other elements must cancel, over two ranks
    cancelled = step(ddp, half_zero)["silent"]
    bad = random_gradients(VOTES, rank, 5)
    if rank == 1:
        bad["a"][2, 3] = torch.nan
    broken = step(ddp, bad)
    healed = step(ddp, random_gradients(VOTES, rank, 6))
    return {
        "emitted": emitted,
        "bytes": sent,
        "cancelled": cancelled,
        "broken": broken,
        "healed": healed,
        "trained": train(rank, world_size, SignSGD, 5)["weights_per_step"],
    }


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def sign(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(_sign, request.param)


def test_sign_is_the_majority_of_the_signs_and_zero_in_a_tie(sign: Any) -> None:
    for result in sign:
        for t, emitted in enumerate(result["emitted"]):
            for name in ("a", "raw", "scalar"):
                ballots = [random_gradients(VOTES, rank, t)[name].sign() for rank in range(len(sign))]
                equal(emitted[name], torch.stack(ballots).sum(0).sign())
    ties = sum(int((emitted["a"] == 0).sum()) for emitted in sign[0]["emitted"])
    assert (ties > 0) == (len(sign) == 2)


def test_sign_of_a_parameter_that_is_zero_on_all_ranks_is_zero(sign: Any) -> None:
    for result in sign:
        assert not any(emitted["silent"].any() for emitted in result["emitted"])


def test_zeros_of_two_ranks_cancel(sign: Any) -> None:
    if len(sign) == 2:
        for result in sign:
            assert result["cancelled"][0, 0] == 1
            assert result["cancelled"].sum() == 1


def test_sign_sends_one_bit_per_element_and_a_byte_per_parameter(sign: Any) -> None:
    numel = 140 + 36 + 5 + 1
    for result in sign:
        assert result["bytes"] == 3 * (-(-numel // 8) + 4 + 1)


def test_sign_passes_nan_on_to_every_rank_and_recovers(sign: Any) -> None:
    for result in sign:
        assert not result["broken"]["a"].isfinite().any()
        assert all(g.isfinite().all() for g in result["healed"].values())


def test_sign_keeps_the_replicas_bit_identical(sign: Any) -> None:
    for result in sign[1:]:
        equal(result["trained"], sign[0]["trained"])


# ---- half precision --------------------------------------------------------------------------------------------------


def _half(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for dtype in ("bfloat16", "float16"):
        ddp, compressor = prescribed(SHAPES, partial(HalfPrecision, dtype), torch.float32)
        emitted = step(ddp, random_gradients(SHAPES, rank, 0, torch.float32))
        overflow = {n: g * 1e30 for n, g in random_gradients(SHAPES, rank, 1, torch.float32).items()}
        huge = step(ddp, overflow)
        results[dtype] = emitted, huge, compressor.stats.as_dict()
    return results


def test_half_precision_is_the_mean_up_to_the_rounding_of_16_bits_at_half_the_bytes() -> None:
    one, other = run_ranks(_half, 2)
    mean = mean_gradients(SHAPES, 2, 0, torch.float32)
    for dtype, precision in (("bfloat16", 2**-8), ("float16", 2**-11)):
        equal(one[dtype][0], other[dtype][0])
        for name, gradient in one[dtype][0].items():
            close(gradient.double(), mean[name], 8 * precision)
            rounded = sum(
                (random_gradients(SHAPES, rank, 0, torch.float32)[name] / 2).to(getattr(torch, dtype))
                for rank in range(2)
            )
            equal(gradient, rounded.float())  # two ranks: one rounding of each share, one of the sum
        stats = one[dtype][2]
        assert stats["bytes_sent"] * 2 == stats["bytes_dense"]


def test_float16_that_overflows_is_not_finite_on_every_rank() -> None:
    for results in run_ranks(_half, 2):
        assert all(g.isfinite().all() for g in results["bfloat16"][1].values())
        assert not any(g.isfinite().any() for g in results["float16"][1].values())
