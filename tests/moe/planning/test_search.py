"""The search for the fastest schedule, on times that differ from the predictions in known ways."""

import math
import random

import pytest

from lightning_efficient.moe import MoESizes, schedule_named
from lightning_efficient.moe.planning import LayerShape, Prediction, candidates
from lightning_efficient.moe.planning.search import Search

SHAPE = LayerShape(tokens=1024, dim=512, hidden=1024, num_experts=8, top_k=2)
SCHEDULES = candidates(SHAPE, MoESizes(2, 2, 2))


def searched(seconds, errors, *, noise=0.03, turns=40, seed=0, spread=1.0):
    """The search, after all its turns; `errors` gives the prediction's share of the true time by schedule."""
    chance = random.Random(seed)
    search = Search([Prediction(each, seconds[each] * errors(each), 0.0) for each in SCHEDULES], spread=spread)
    for _ in range(turns):
        if (schedule := search.next()) is None:
            break
        search.note(schedule, seconds[schedule] * math.exp(chance.gauss(0, noise)))
    return search


def times(seed):
    chance = random.Random(1000 + seed)
    return {each: math.exp(chance.uniform(0, 0.7)) for each in SCHEDULES}


def regret(search, seconds):
    chosen = min(search.measured, key=search.measured.get)
    return seconds[chosen] / min(seconds.values())


def runs_of(search):
    return sum(map(len, search.runs.values()))


ERRORS = {
    "chunks take longer than predicted": lambda each: 0.75 ** (math.log2(each.chunks) / 3),
    "chunks take less": lambda each: 1.3 ** (math.log2(each.chunks) / 3),
    "packing takes longer": lambda each: 0.75 if each.packed else 1.0,
    "all takes longer": lambda each: 0.6,
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_that_schedules_have_in_common_are_learned(name):
    found = [(searched(times(seed), ERRORS[name], seed=seed), times(seed)) for seed in range(25)]
    regrets = [regret(*each) for each in found]
    assert sum(each <= 1.05 for each in regrets) >= 22
    # Not by trying everything.
    assert sum(len(search.runs) for search, _ in found) / len(found) < len(SCHEDULES) / 2


def test_the_predicted_best_runs_first_and_a_few_turns_do_better_than_predictions():
    gained = []
    for seed in range(25):
        seconds = times(seed)
        search = searched(seconds, ERRORS["packing takes longer"], turns=8, seed=seed)
        predicted = {each: seconds[each] * ERRORS["packing takes longer"](each) for each in SCHEDULES}
        first = min(predicted, key=predicted.get)
        assert next(iter(search.runs)) == first
        assert runs_of(search) <= 8
        gained.append(seconds[first] / min(seconds.values()) - regret(search, seconds))
    assert sum(gained) > 0


def test_it_ends_when_nothing_can_be_much_faster():
    seconds = dict.fromkeys(SCHEDULES, 2.0)
    seconds[schedule_named("s1_hier/4")] = 0.5
    search = searched(seconds, lambda _: 1.0, noise=0.0)
    assert next(iter(search.runs)) == schedule_named("s1_hier/4")
    assert search.next() is None
    assert runs_of(search) == 2


def test_short_ones_run_more_often_before_they_are_believed():
    seconds = dict.fromkeys(SCHEDULES, 0.02)
    seconds[schedule_named("s1")] = 0.005
    search = searched(seconds, lambda _: 1.0, noise=0.0)
    assert len(search.runs[schedule_named("s1")]) == 8


def test_with_a_wider_spread_it_finds_what_wrong_predictions_hide():
    def regrets(spread):
        found = []
        for seed in range(25):
            # Off by up to 7 times, as by lines through noise.
            chance = random.Random(seed)
            wrong = {each: math.exp(chance.uniform(-1, 1)) for each in SCHEDULES}
            found.append(regret(searched(times(seed), wrong.get, noise=0.1, seed=seed, spread=spread), times(seed)))
        return found

    usual, wide = regrets(1.0), regrets(3.0)
    assert sum(wide) < sum(usual)
    assert sum(wide) / len(wide) < 1.1
