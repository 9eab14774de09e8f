"""Which requests share a batch, with a decoder whose steps take a known time."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_efficient.dissect.serving import (
    Batching,
    Burst,
    ClosedLoop,
    ContinuousBatching,
    Poisson,
    Request,
    ServingRun,
    StaticBatching,
    serve,
)


class Counting:
    """A decoder that counts: an answer is last prompt id + 1, + 2, ...; its steps can be slow. Strict about slots."""

    def __init__(
        self, slots: int = 2, *, prefill_s: float = 0.0, decode_s: float = 0.0, max_seq_len: int = 100
    ) -> None:
        self.slots, self.max_seq_len, self.cache_bytes = slots, max_seq_len, 7
        self.prefill_s, self.decode_s = prefill_s, decode_s
        self.held: dict[int, list[int]] = {}
        self.calls: list[tuple[str, list[int]]] = []

    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        time.sleep(self.prefill_s)
        for slot, prompt in zip(slots, prompts, strict=True):
            assert 0 <= slot < self.slots
            assert slot not in self.held
            self.held[slot] = list(prompt)
        return self._add("prefill", slots)

    def decode(self, slots: Sequence[int]) -> list[int]:
        time.sleep(self.decode_s)
        assert slots
        return self._add("decode", slots)

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            del self.held[slot]

    def _add(self, what: str, slots: Sequence[int]) -> list[int]:
        self.calls.append((what, list(slots)))
        for slot in slots:
            self.held[slot].append(self.held[slot][-1] + 1)
            assert len(self.held[slot]) <= self.max_seq_len
        return [self.held[slot][-1] for slot in slots]


def burst(lengths: Sequence[int], batching: Batching, decoder: Counting | None = None, **options) -> ServingRun:
    load = [Request((100 * number,), length) for number, length in enumerate(lengths)]
    decoder = decoder or Counting(batching.max_batch)
    return serve(decoder, load, Burst(len(load)), batching=batching, warm_up=False, timeout_s=30, **options)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.booleans())
def test_each_request_gets_its_own_tokens(lengths: list[int], size: int, continuous: bool) -> None:
    decoder = Counting(size)
    run = burst(lengths, ContinuousBatching(size) if continuous else StaticBatching(size), decoder)
    expected = [tuple(range(100 * i + 1, 100 * i + 1 + length)) for i, length in enumerate(lengths)]
    assert list(run.tokens) == expected
    assert [each.n_out for each in run.times if each] == lengths
    assert not decoder.held


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5))
def test_continuous_never_idles_a_slot_while_requests_wait(lengths: list[int], size: int) -> None:
    decoder = Counting(size)
    run = burst(lengths, ContinuousBatching(size), decoder)
    waiting = len(lengths)
    for what, slots in decoder.calls:
        if what == "prefill":
            waiting -= len(slots)
        elif waiting:
            assert len(slots) == size
    assert waiting == 0
    assert sum(run.active_slots) == sum(lengths) - len(lengths)  # a prompt gives the first token


def test_static_carries_finished_requests_to_the_end_of_the_batch() -> None:
    decoder = Counting(2)
    run = burst([2, 5, 3], StaticBatching(2), decoder)
    assert decoder.calls == [("prefill", [0, 1]), *[("decode", [0, 1])] * 4, ("prefill", [0]), *[("decode", [0])] * 2]
    assert run.active_slots == (2, 1, 1, 1, 1, 1)
    assert run.report().occupancy == pytest.approx(7 / 12)


def test_continuous_refills_a_slot_at_once() -> None:
    decoder = Counting(2)
    run = burst([2, 5, 3], ContinuousBatching(2), decoder)
    assert decoder.calls == [
        ("prefill", [0, 1]),
        ("decode", [0, 1]),
        ("prefill", [0]),
        ("decode", [0, 1]),
        ("decode", [0, 1]),
        ("decode", [1]),
    ]
    assert run.report().occupancy == pytest.approx(7 / 8)


def test_a_carried_request_stops_where_the_model_ends() -> None:
    decoder = Counting(2, max_seq_len=12)
    load = [Request((0,) * 9, 2), Request((0,), 11)]
    run = serve(decoder, load, Burst(2), batching=StaticBatching(2), warm_up=False)
    assert [len(each) for each in run.tokens] == [2, 11]
    assert [slots for what, slots in decoder.calls if what == "decode"] == [[0, 1]] * 2 + [[1]] * 8


def test_a_slow_step_shows_in_itl_and_a_slow_prompt_in_ttft() -> None:
    # A sleep lasts at least its time; the bounds above leave as much again for a busy machine.
    slow_step = burst([3] * 2, ContinuousBatching(2), Counting(2, decode_s=0.1)).report()
    assert 0.1 <= slow_step.itl.p50 < 0.2
    assert 0.1 <= slow_step.tpot.p50 < 0.2
    assert slow_step.ttft.p50 < 0.1
    slow_prompt = burst([3] * 2, ContinuousBatching(2), Counting(2, prefill_s=0.1)).report()
    assert 0.1 <= slow_prompt.ttft.p50 < 0.2
    assert slow_prompt.itl.p50 < 0.1


def test_waiting_for_a_slot_is_part_of_ttft() -> None:
    first, second = burst([5, 5], ContinuousBatching(1), Counting(1, decode_s=0.05)).times
    assert first.ttft_s < 0.05
    assert second.ttft_s >= 4 * 0.05


def test_poisson_requests_wait_for_their_time() -> None:
    arrivals = Poisson(100.0, 6, seed=3)
    run = serve(Counting(), [Request((1,), 2)] * 6, arrivals, batching=ContinuousBatching(2), warm_up=False)
    times = [each for each in run.times if each is not None]
    assert tuple(each.arrival_s for each in times) == arrivals.known_s()
    assert all(each.ttft_s >= 0 for each in times)


@pytest.mark.parametrize("batching", [StaticBatching(4), ContinuousBatching(4)])
def test_a_closed_loop_has_as_many_requests_under_way_as_clients(batching: Batching) -> None:
    run = serve(Counting(4), [Request((1,), 4)] * 7, ClosedLoop(3, 7), batching=batching, warm_up=False)
    times = [each for each in run.times if each is not None]
    assert len(times) == 7
    ends = sorted(each.token_s[-1] for each in times)
    assert sorted(each.arrival_s for each in times) == [0.0, 0.0, 0.0, *ends[:4]]
    assert max(run.active_slots) == 3


def test_what_is_unfinished_at_the_timeout_has_failed() -> None:
    decoder, seen = Counting(1, decode_s=0.02), []
    load = [Request((1,), 3), Request((1,), 90)]
    run = serve(
        decoder,
        load,
        Burst(2),
        batching=ContinuousBatching(1),
        timeout_s=0.8,
        warm_up=False,
        progress=seen.append,
    )
    report = run.report()
    assert (report.finished, report.failed, report.output_tokens) == (1, 1, 3)
    assert seen == [1]
    assert not decoder.held


def test_a_timeout_ends_the_wait_for_a_request() -> None:
    begun = time.perf_counter()
    run = serve(Counting(), [Request((1,), 1)], Poisson(1e-3, 1), batching=StaticBatching(1), timeout_s=0.2)
    assert run.report().failed == 1
    assert time.perf_counter() - begun < 2.0


def test_warm_up_is_not_timed_and_leaves_no_slot_in_use() -> None:
    decoder = Counting(2, prefill_s=0.05)
    run = serve(decoder, [Request((1,), 2)] * 3, Burst(3), batching=ContinuousBatching(2))
    assert decoder.calls[:2] == [("prefill", [0, 1]), ("decode", [0, 1])]
    assert run.prefills == sum(what == "prefill" for what, _ in decoder.calls) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": [Request((1,), 100)]}, r"1 \+ 100 = 101 tokens, more than the 100"),
        ({"arrivals": Burst(2)}, "1 requests and 2 arrivals"),
        ({"batching": StaticBatching(3)}, "3 places and the decoder 2 slots"),
        ({"timeout_s": 0.0}, "timeout is 0"),
    ],
)
def test_wrong_values_are_refused_before_any_work(change, message) -> None:
    decoder = Counting()
    arguments = {"requests": [Request((1,), 1)], "arrivals": Burst(1), "batching": StaticBatching(1)} | change
    with pytest.raises(ValueError, match=message):
        serve(decoder, **arguments)
    assert not decoder.calls


def test_a_batch_has_a_place() -> None:
    for make in (StaticBatching, ContinuousBatching):
        with pytest.raises(ValueError, match="is 0: a batch holds at least 1"):
            make(0)


@pytest.mark.parametrize("arrivals", [Burst(200), ClosedLoop(2, 200)])
def test_answers_of_one_token_look_at_the_clock_too(arrivals: Burst | ClosedLoop) -> None:
    load = [Request((number,), 1) for number in range(200)]
    decoder = Counting(2, prefill_s=0.02)
    run = serve(decoder, load, arrivals, batching=StaticBatching(2), warm_up=False, timeout_s=0.2)
    assert 0 < sum(each is not None for each in run.times) < 100
    assert not decoder.held


def test_the_cache_is_that_of_the_run_without_the_warm_up() -> None:
    class Growing(Counting):
        cache_bytes = property(lambda self: sum(map(len, self.held.values())), lambda self, value: None)  # type: ignore[assignment]

    load = [Request((number,) * 5, 2) for number in range(4)]
    decoder = Growing(4)  # warmed up with all four requests at once
    run = serve(decoder, load, ClosedLoop(1, 4), batching=ContinuousBatching(4), timeout_s=30)
    assert run.cache_bytes == 5 + 2  # one at a time: its prompt and its answer
