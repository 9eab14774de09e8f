"""Steps played against resources: timelines worked out by hand, and bounds that hold for any."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_efficient.moe import MoESizes
from lightning_efficient.moe.planning import LayerShape
from lightning_efficient.moe.planning.steps import Compute, Message, Start, Wait, steps
from lightning_efficient.moe.planning.timeline import play
from lightning_efficient.moe.schedule import SCHEDULES

SHAPE = LayerShape(tokens=256, dim=16, hidden=32, num_experts=8, top_k=2, capacity_factor=1.0)


def message(axis, seconds):
    return Message("all_to_all", axis, seconds, 1)


def flight(number, axis, seconds):
    return Start(number, message(axis, seconds), None)


def cost(step):
    """A second for each row and element, after a second of latency for what is sent."""
    return (0.0, step.rows) if isinstance(step, Compute) else (1.0, step.elements)


def by_size(step):
    return (0.0, step.rows) if isinstance(step, Compute) else (10.0, step.elements / 16)


def apart(one, other):
    return 1.0 if one == other else 0.0


def test_what_is_sent_runs_beside_the_device_until_it_is_waited_for():
    sent = flight(1, "ep", 9)
    assert play([sent, Compute("experts", 4), Wait(sent)], cost, apart).seconds == 10
    assert play([sent, Compute("experts", 14), Wait(sent)], cost, apart).seconds == 14
    assert play([sent, Wait(sent), Compute("experts", 4)], cost, apart).seconds == 14


def test_one_lane_sends_one_after_the_other_and_two_lanes_share():
    first, second = flight(1, "ep", 4), flight(2, "ep", 4)
    work = [first, second, Wait(first), Compute("experts", 10), Wait(second)]
    # First lands at 5, the second at 10, beside the device.
    assert play(work, cost, apart, lanes=1).seconds == 15
    # Both land at 1 + 8: the device begins later.
    assert play(work, cost, apart, lanes=2).seconds == 19


def test_links_of_different_groups_run_at_once_as_far_as_they_share_nothing():
    first, second = flight(1, "ep", 4), flight(2, "mp", 6)
    work = [first, second, Wait(first), Wait(second)]
    assert play(work, cost, apart).seconds == 7
    assert play(work, cost, lambda *_: 1.0).seconds == 11  # the latencies pass together
    # Half: until the first lands both run at 1 / 1.5, 4 each in 6 s; then 2 remain.
    assert play(work, cost, lambda *_: 0.5).seconds == pytest.approx(1 + 6 + 2)


def test_a_device_that_shares_with_its_link_is_slowed_only_while_both_run():
    sent = flight(1, "ep", 4)
    together = play([sent, Compute("experts", 10), Wait(sent)], cost, lambda *_: 1.0)
    assert together.seconds == pytest.approx(14)
    assert together.device == 10
    assert together.busy == {"experts": 10, "all_to_all ep": 5}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    chunks=st.sampled_from([1, 2, 4]),
    split=st.sampled_from([(2, 2, 2), (2, 4, 1), (1, 2, 2), (4, 2, 2)]),
    share=st.floats(0, 1),
    lanes=st.sampled_from([1, 2]),
    backward=st.booleans(),
)
def test_a_layer_takes_at_least_each_resource_and_at_most_their_sum(name, chunks, split, share, lanes, backward):
    schedule = SCHEDULES[name]
    schedule = schedule.with_chunks(chunks) if schedule.can_be_chunked else schedule
    work = steps(schedule, SHAPE, MoESizes(*split), backward=backward)
    line = play(
        work, lambda s: (0.0, s.rows) if isinstance(s, Compute) else (10.0, s.elements), lambda *_: share, lanes=lanes
    )
    most = sum(line.busy.values())
    assert line.device - 1e-6 <= line.seconds
    assert line.seconds <= most * (1 + 1e-9) + 1e-6


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_backward_waits_where_forward_starts(name):
    sizes = MoESizes(2, 2, 2)
    schedule = SCHEDULES[name]
    schedule = schedule.with_chunks(4) if schedule.can_be_chunked else schedule
    for backward in (False, True):
        open_flights = set()
        for step in steps(schedule, SHAPE, sizes, backward=backward):
            if isinstance(step, Start):
                assert step.forward is not None
                open_flights.add(step.flight)
            elif isinstance(step, Wait):
                open_flights.remove(step.start.flight)
        assert not open_flights


def test_in_backward_as_in_forward_a_chunk_computes_while_others_travel():
    schedule = SCHEDULES["s1"].with_chunks(4)
    sizes = MoESizes(2, 2, 2)
    cut, whole = (
        play(steps(each, SHAPE, sizes, backward=True), by_size, apart) for each in (schedule, SCHEDULES["s1"])
    )
    assert cut.device == whole.device
    assert cut.seconds < whole.seconds
