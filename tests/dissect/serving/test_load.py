"""When requests come, and what they ask for."""

import itertools
import statistics

import pytest

from lightning_efficient.dissect.serving import Burst, ClosedLoop, Poisson, Request, check_requests, synthetic_requests


def test_a_burst_comes_at_once() -> None:
    assert Burst(3).known_s() == (0.0, 0.0, 0.0)


def test_a_closed_loop_starts_with_its_clients() -> None:
    assert ClosedLoop(2, 5).known_s() == (0.0, 0.0)
    assert ClosedLoop(9, 5).known_s() == (0.0,) * 5


def test_poisson_arrivals_follow_their_seed() -> None:
    assert Poisson(4.0, 50, seed=1).known_s() == Poisson(4.0, 50, seed=1).known_s()
    assert Poisson(4.0, 50, seed=1).known_s() != Poisson(4.0, 50, seed=2).known_s()


def test_poisson_gaps_have_the_mean_and_spread_of_an_exponential() -> None:
    arrivals = (0.0, *Poisson(4.0, 20_000).known_s())
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert min(gaps) > 0
    # Five standard errors of the mean, 5 / (4 sqrt(20 000)) = 3.5 %; for the deviation about the same.
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.036)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)


def test_synthetic_requests_are_seeded_and_in_range() -> None:
    load = synthetic_requests(400, 50, prompt_tokens=7, new_tokens=(3, 6), seed=1)
    assert load == synthetic_requests(400, 50, prompt_tokens=7, new_tokens=(3, 6), seed=1)
    assert load != synthetic_requests(400, 50, prompt_tokens=7, new_tokens=(3, 6), seed=2)
    assert {each.max_new_tokens for each in load} == {3, 4, 5, 6}
    assert {len(each.prompt_ids) for each in load} == {7}
    assert {token for each in load for token in each.prompt_ids} == set(range(50))
    assert len(synthetic_requests(1, 50)[0].prompt_ids) == 512  # the paper's


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Burst(0), "requests is 0"),
        (lambda: ClosedLoop(0, 3), "clients is 0"),
        (lambda: Poisson(0.0, 3), r"rate is 0\.0"),
        (lambda: Poisson(float("inf"), 3), "or use Burst"),
        (lambda: synthetic_requests(1, 9, prompt_tokens=0), "prompt tokens is 0"),
        (lambda: synthetic_requests(1, 9, new_tokens=0), "new tokens is 0"),
        (lambda: synthetic_requests(1, 9, new_tokens=(4, 2)), "4 to 2: it is empty"),
        (lambda: check_requests([], 9), "requests is 0"),
        (lambda: check_requests([Request((), 1)], 9), "Request 0 has 0 prompt tokens"),
        (
            lambda: check_requests([Request((1,), 2), Request((1,) * 7, 3)], 9),
            r"Request 1 .* 7 \+ 3 = 10.*the 9 that",
        ),
    ],
)
def test_wrong_values_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_request_may_fill_the_model() -> None:
    check_requests([Request((1,) * 7, 2)], 9)
