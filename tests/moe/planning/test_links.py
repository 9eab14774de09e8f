"""Lines through times: of synthetic links exactly, of slowed real ones roughly."""

import random

import pytest
import torch

from lightning_efficient._links import AlphaBeta, fit_line
from lightning_efficient.moe import MoESizes, MoETopology
from lightning_efficient.moe.planning import Clock, GroupSampler, Links, measure_links
from lightning_efficient.moe.planning.links import twins, why_refused
from lightning_efficient.moe.planning.steps import Message
from tests.netlab import Lab

SIZES = MoESizes(2, 2, 2)
LINE = {
    "all_to_all": AlphaBeta(3e-4, 4e-8),
    "all_gather": AlphaBeta(1e-4, 2e-9),
    "reduce_scatter": AlphaBeta(2e-4, 3e-9),
    "all_reduce": AlphaBeta(5e-4, 8e-9),
}


class Synthetic:
    """Links of known lines, and how much they share; each time is off by up to ``noise``."""

    def __init__(self, *, slower=1.0, share=0.0, noise=0.0):
        self.slower, self.share, self.noise = slower, share, noise
        self.random = random.Random(0)
        self.spent = 0.0
        self.sizes = []

    def seconds(self, op, n_bytes):
        return self.slower * LINE[op].predict(n_bytes)

    def alone(self, op, axis, n_bytes, *, calls):
        seconds = self.seconds(op, n_bytes) * (1 + self.noise * self.random.uniform(-1, 1))
        self.spent += calls * seconds
        self.sizes.append(n_bytes * calls)
        return seconds

    def together(self, first, second):
        return self.both(self.seconds(first[0], first[2]), self.seconds(second[0], second[2]))

    def beside_device(self, link, seconds):
        self.spent += seconds
        return seconds, self.both(seconds, self.seconds(link[0], link[2]))

    def both(self, one, other):
        both = max(one, other) + self.share * min(one, other)
        self.spent += both
        return both


def test_synthetic_links_are_recovered_to_a_percent():
    links = measure_links(SIZES, Synthetic(share=0.4))
    for op, axis in [("all_to_all", "block"), ("all_to_all", "ep"), ("all_gather", "mp"), ("reduce_scatter", "esp")]:
        assert links.fits[op, axis].alpha_s == pytest.approx(LINE[op].alpha_s, rel=0.01)
        assert links.fits[op, axis].beta_s_per_byte == pytest.approx(LINE[op].beta_s_per_byte, rel=0.01)
    assert links.share("block", "mp") == pytest.approx(0.4)
    assert links.share("mp", "block") == pytest.approx(0.4)
    assert links.share("device", "ep") == pytest.approx(0.4)
    assert links.share("ep", "ep") == 1.0
    assert not links.refused


def test_small_noise_is_fitted_and_wild_noise_is_refused():
    links = measure_links(SIZES, Synthetic(noise=0.05))
    assert links.fits["all_to_all", "block"].beta_s_per_byte == pytest.approx(4e-8, rel=0.1)
    assert not links.refused
    # Times that fall with the size, as if by chance.
    points = [(1e4, 0.03), (1e5, 0.001), (1e6, 0.02), (4e6, 0.005)]
    assert "do not lie on a line" in why_refused(points, AlphaBeta(*fit_line(points)))


def test_times_that_hardly_depend_on_the_size_are_a_latency_and_no_noise():
    points = [(1e4, 0.010), (1e5, 0.011), (1e6, 0.010), (4e6, 0.011)]
    assert why_refused(points, AlphaBeta(*fit_line(points))) is None


@pytest.mark.parametrize("slower", [1.0, 10.0, 60.0])
def test_slower_links_get_smaller_messages_within_the_budget(slower):
    sampler = Synthetic(slower=slower)
    links = measure_links(SIZES, sampler, budget_s=2.5)
    # At 60 times slower a sample of the least size takes 0.3 s: some overrun is the price of two sizes.
    assert sampler.spent < (4.0 if slower < 60 else 9.0)
    assert links.seconds == pytest.approx(sampler.spent)
    assert links.fits["all_to_all", "ep"].beta_s_per_byte == pytest.approx(slower * 4e-8, rel=0.01)


def test_samples_hold_a_mebibyte_where_there_is_time():
    sampler = Synthetic()
    measure_links(SIZES, sampler)
    assert max(sampler.sizes) >= 2**20


def test_groups_of_the_same_ranks_are_measured_once():
    assert twins(MoESizes(2, 2, 2)) == {"block": "block", "ep": "ep", "mp": "mp", "esp": "mp"}
    assert twins(MoESizes(2, 4, 1)) == {"block": "block", "ep": "block", "mp": "mp"}
    assert twins(MoESizes(4, 2, 2)) == {"block": "block", "ep": "ep", "mp": "block", "esp": "esp"}
    assert twins(MoESizes(1, 1, 1)) == {}


def test_an_all_reduce_that_was_not_measured_is_a_reduce_scatter_and_an_all_gather():
    links = Links({("all_gather", "mp"): AlphaBeta(1.0, 0.1)})
    assert links.cost(Message("all_reduce", "mp", 10, 1)) == (2.0, 2.0)
    with pytest.raises(ValueError, match="no line for all_to_all over ep"):
        links.cost(Message("all_to_all", "ep", 10, 1))


def test_links_survive_as_plain_values():
    links = measure_links(SIZES, Synthetic(share=0.5), lanes=2)
    assert Links.from_dict(links.as_dict()) == links


def rates(rank, world_size, links, wanted):
    topology = MoETopology.create(SIZES)
    sampler = GroupSampler(Clock(topology, device=torch.device("cpu")))
    found = []
    for rate in wanted:
        if rank == 0:
            links.limit(rate)
        found.append(measure_links(SIZES, sampler, lanes=2))
    return found


@pytest.mark.netlab
@pytest.mark.slow
@pytest.mark.distributed
def test_the_fit_follows_a_changed_rate():
    # Low rates, which two busy cores can fill.
    with Lab(4) as lab:
        of_ranks = lab.run_ranks(rates, lab.links, ["40mbit", "80mbit"], timeout=150)
    slow, fast = of_ranks[0]
    assert [each.fits for each in of_ranks[0]] == [each.fits for each in of_ranks[3]]
    for op, axis in [("all_to_all", "block"), ("all_to_all", "ep"), ("all_gather", "mp")]:
        change = slow.fits[op, axis].beta_s_per_byte / fast.fits[op, axis].beta_s_per_byte
        assert change == pytest.approx(2, rel=0.2), (op, axis)
    # A rank sends 3/4 of its buffer over its link of 5 MB/s, with headers, and waits for the slowest of three others.
    assert slow.fits["all_to_all", "block"].beta_s_per_byte == pytest.approx(1.1 * 0.75 / 5e6, rel=0.2)
