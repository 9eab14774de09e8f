"""Latencies by hand, and what any distribution of them must fulfil."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_efficient.dissect.result import from_json, to_json
from lightning_efficient.dissect.serving import Percentiles, RequestTimes, ServingResult, ServingRun, cdf

FIRST = RequestTimes(1.0, 1.5, (1.5, 1.6, 1.9, 2.5), n_prompt=10, n_out=4)
SECOND = RequestTimes(2.0, 2.25, (2.25,), n_prompt=20, n_out=1)
SAMPLES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


def test_latencies_by_hand() -> None:
    assert FIRST.ttft_s == 0.5
    assert FIRST.itl_s == pytest.approx((0.1, 0.3, 0.6))
    assert FIRST.e2e_s == 1.5
    assert FIRST.tpot_s == pytest.approx(1.0 / 3)
    assert sum(FIRST.itl_s) == pytest.approx(FIRST.e2e_s - FIRST.ttft_s)
    assert (SECOND.ttft_s, SECOND.itl_s, SECOND.tpot_s, SECOND.e2e_s) == (0.25, (), None, 0.25)


def test_times_that_contradict_each_other_are_refused() -> None:
    for times in (((), 0), ((1.5, 1.6), 3), ((1.4, 1.6), 2)):
        with pytest.raises(ValueError, match="each token of the answer needs one"):
            RequestTimes(1.0, 1.5, times[0], n_prompt=1, n_out=times[1])


def test_report_by_hand() -> None:
    run = ServingRun(
        batching="continuous",
        arrivals="burst of 3",
        max_batch=2,
        times=(FIRST, None, SECOND),
        tokens=((1, 2, 3, 4), (), (5,)),
        prefills=2,
        active_slots=(2, 1, 1),
        cache_bytes=1000,
    )
    report = run.report(model="Llama", notes=["a note"])
    assert (report.finished, report.failed, report.prompt_tokens, report.output_tokens) == (2, 1, 30, 5)
    assert report.wall_s == 1.5  # from 1.0 to 2.5
    assert report.output_tokens_per_s == pytest.approx(5 / 1.5)
    assert report.total_tokens_per_s == pytest.approx(35 / 1.5)
    assert report.occupancy == pytest.approx(4 / 6)
    assert (report.prefills, report.decode_steps, report.cache_bytes) == (2, 3, 1000)
    assert report.ttft.p50 == pytest.approx(0.375)
    assert report.e2e.p90 == pytest.approx(0.25 + 0.9 * 1.25)
    assert report.itl.count == 3
    assert report.tpot.count == 1
    assert [(point.seconds, point.share) for point in report.e2e_cdf] == [(0.25, 0.5), (1.5, 1.0)]
    result = ServingResult((report,))
    assert from_json(ServingResult, to_json(result)) == result
    with pytest.raises(ValueError, match="schema 99"):
        from_json(ServingResult, to_json(result) | {"schema": 99})


def test_a_run_without_an_answer_has_no_latency() -> None:
    report = ServingRun("static", "burst of 1", 2, (None,), ((),), 0, (), 0).report()
    assert (report.ttft, report.itl, report.tpot, report.e2e, report.e2e_cdf) == (None, None, None, None, ())
    assert (report.finished, report.failed, report.occupancy, report.output_tokens_per_s) == (0, 1, None, 0.0)


@given(SAMPLES)
def test_percentiles_are_ordered_and_interpolate_as_torch_does(values: list[float]) -> None:
    found = Percentiles.of(values)
    assert found is not None
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= found.max == max(values)
    sample = torch.tensor(values, dtype=torch.float64)
    for actual, share in ((found.p50, 0.5), (found.p90, 0.9), (found.p99, 0.99)):
        # Relative to the largest: torch interpolates with the same formula, up to rounding.
        assert math.isclose(actual, float(torch.quantile(sample, share)), abs_tol=1e-12 * max(values), rel_tol=1e-12)


@given(SAMPLES)
def test_the_distribution_rises_to_one(values: list[float]) -> None:
    points = cdf(values)
    assert len(points) == len(values)
    assert all(a.seconds <= b.seconds and a.share < b.share for a, b in itertools.pairwise(points))
    assert points[-1].share == 1.0
    assert points[0].share > 0
