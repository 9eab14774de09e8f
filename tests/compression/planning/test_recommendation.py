"""The recommendation: accuracy first, then speed, and no compression where nothing is gained."""

import pytest

from lightning_efficient.compression.planning.cost_model import DeviceModel, LinkModel, Workload
from lightning_efficient.compression.planning.recommendation import RANKS, recommend

# 12 layers of 1024 x 1024: 48 MiB of gradients, half a second of compute.
WORKLOAD = Workload.from_work([(1024, 1024), (1024,)] * 12, forward_s=0.15, backward_s=0.35)


def at(bits_per_s: float, **changes):
    link = LinkModel.from_rate(bits_per_s, latency_s=1e-4)
    return recommend(WORKLOAD, link, **{"world_size": 4, "bucket_caps_mb": (1.0, 4.0, 25.0), **changes})


def test_fast_link_needs_no_compression():
    answer = at(100e9)
    assert answer.rank is None
    assert answer.chosen.estimate.step_s <= 1.05 * WORKLOAD.no_communication_s


def test_slow_link_gets_the_largest_rank_that_hides():
    answer = at(500e6)
    assert answer.rank is not None
    budget = 0.05 * WORKLOAD.no_communication_s
    assert answer.chosen.estimate.exposed_s <= budget
    assert all(c.estimate.exposed_s > budget for c in answer.candidates if c.rank is not None and c.rank > answer.rank)


def test_rank_rises_with_the_link_and_is_never_one():
    ranks = [at(bits).rank for bits in (20e6, 50e6, 100e6, 300e6, 1e9)]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) >= 3
    assert min(ranks) >= 2


def test_hopeless_link_still_gets_the_best_there_is():
    answer = at(1e6)
    assert answer.rank == 2
    assert "no rank hides" in answer.reason


def test_compression_that_costs_more_than_it_saves_is_not_recommended():
    answer = at(1e9, device=DeviceModel(flops_per_s=1e8, memory_bytes_per_s=1e8))
    assert answer.rank is None
    assert "do not compress" in answer.reason


def test_candidates_are_plain_then_every_rank():
    answer = at(500e6)
    assert [c.rank for c in answer.candidates] == [None, *RANKS]
    assert answer.candidates[0].compression_rate == 1.0
    rates = [c.compression_rate for c in answer.candidates[1:]]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 1}, r"world size \(1\)"),
        ({"ranks": (1, 2)}, "rank 1 is not recommended"),
        ({"ranks": ()}, "hold"),
    ],
)
def test_bad_choices_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        at(1e9, **changes)
