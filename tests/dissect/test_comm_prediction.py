"""Lines through a sweep predict what a training step spends on a slow link."""

import pytest

from lightning_efficient.dissect import to_json
from tests.benchmarks._dissect_link_rank import LAYERS, WIDTH, predict_and_measure
from tests.netlab import Lab

pytestmark = [pytest.mark.netlab, pytest.mark.slow, pytest.mark.distributed]
RATES = ["1gbit", "100mbit"]
GRADIENT_BYTES = 4 * LAYERS * (WIDTH * WIDTH + WIDTH)


def test_predicted_and_measured_communication_of_a_step_agree() -> None:
    with Lab(2) as lab:
        of_ranks = lab.run_ranks(predict_and_measure, lab.links, RATES, timeout=150)
    for predictions in of_ranks:
        assert [each.rate for each in predictions] == RATES
        for each in predictions:
            assert sum(c.n_bytes * c.calls for c in each.collectives) == GRADIENT_BYTES
            # What issue 5 asks for; docs/benchmarks/dissect_links_* has 7 % as the worst of five rounds.
            assert abs(each.error) < 0.15, (each.rate, each.error, each.measured_s)
        fast, slow = predictions
        # Ten times the rate: the test would pass on any link if the rate did not matter.
        assert 5 < slow.predicted_s / fast.predicted_s < 15
    assert [to_json(each.fit) for each in of_ranks[0]] == [to_json(each.fit) for each in of_ranks[1]]
