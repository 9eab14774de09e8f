"""Predictions and choices on links of known lines."""

import pytest

from lightning_efficient._links import AlphaBeta
from lightning_efficient.moe import MoESizes, schedule_named
from lightning_efficient.moe.planning import DeviceCost, LayerShape, Links, Prediction, candidates, choose, predict
from lightning_efficient.moe.planning.links import LINKS
from lightning_efficient.moe.planning.predict import fallback

SIZES = MoESizes(2, 2, 2)
SHAPE = LayerShape(tokens=1024, dim=512, hidden=1024, num_experts=8, top_k=2)
DEVICE = DeviceCost(
    {
        (work, way): AlphaBeta(1e-5, seconds)
        for work, seconds in (("gate", 1e-7), ("move", 1e-7), ("experts", 1e-5))
        for way in ("forward", "backward")
    }
)


def two_hosts(*, inside, across, latency=1e-4):
    """Links of two hosts with an ESP group each, at MB/s inside a host and out of it; both ranks share the way out.

    Of an all-to-all each rank sends a half to the other host, of what else it takes part in a half to its neighbour.
    """
    slow, fast = 1e-6 / across, 1e-6 / inside
    beta = {"block": slow + 0.25 * fast, "ep": slow, "mp": 0.5 * fast, "esp": 0.5 * fast}
    return Links({(op, axis): AlphaBeta(latency, beta[axis]) for op, axis in LINKS})


def own_links(rate, *, latency=2e-3):
    """Every rank has one link of so many MB/s, which all its groups share."""
    beta = {"block": 0.75e-6 / rate, "ep": 0.5e-6 / rate, "mp": 0.5e-6 / rate, "esp": 0.5e-6 / rate}
    shares = {("block", "mp"): 1.0, ("ep", "esp"): 1.0, ("ep", "mp"): 1.0}
    return Links({(op, axis): AlphaBeta(latency, beta[axis]) for op, axis in LINKS}, shares)


def best(links, shape=SHAPE, **restrictions):
    own = candidates(shape, SIZES, **restrictions)
    return choose([predict(each, shape, sizes=SIZES, links=links, device=DEVICE) for each in own])


def test_different_networks_get_different_choices():
    # The research's finding: fused where links are alike, hierarchical and in chunks where hosts are far apart.
    alike = best(own_links(25))
    apart = best(two_hosts(inside=1000, across=25))
    assert alike.transport == "fused"
    assert apart.transport == "hierarchical"
    assert apart.chunks > 1


def test_chunks_pay_where_computing_can_hide_behind_links_and_not_where_latency_rules():
    assert best(two_hosts(inside=1000, across=100)).chunks > 1
    assert best(two_hosts(inside=1000, across=100, latency=0.1)).chunks == 1


@pytest.mark.parametrize("label", ["paper", "deepspeed", "s1", "s1/4", "s2_saa/2", "s2_hier/4"])
def test_predictions_grow_with_tokens_and_with_slower_links(label):
    schedule = schedule_named(label)

    def seconds(tokens, across):
        shape = LayerShape(tokens=tokens, dim=512, hidden=1024, num_experts=8, top_k=2)
        links = two_hosts(inside=1000, across=across)
        return predict(schedule, shape, sizes=SIZES, links=links, device=DEVICE).seconds

    by_tokens = [seconds(tokens, 25) for tokens in (64, 256, 512, 1024, 4096)]
    assert by_tokens == sorted(by_tokens)
    assert len(set(by_tokens)) == 5
    by_rate = [seconds(1024, across) for across in (400, 100, 25, 5)]
    assert by_rate == sorted(by_rate)
    assert len(set(by_rate)) == 4


def test_a_prediction_says_what_it_is_made_of():
    found = predict(schedule_named("s1"), SHAPE, sizes=SIZES, links=two_hosts(inside=1000, across=5), device=DEVICE)
    assert found.dominant == "all_to_all block"
    # Unchunked, all but the auxiliary sums runs one after the other.
    assert found.seconds == pytest.approx(sum(found.parts.values()), rel=0.01)
    assert found.seconds == found.forward_s + found.backward_s
    assert 0 < found.exposed_s < found.seconds


def labels(sizes, shape=SHAPE, **restrictions):
    return [each.label for each in candidates(shape, sizes, **restrictions)]


def test_candidates_do_different_things_and_the_papers_baseline_is_none():
    own = labels(SIZES)
    assert {"s1", "s2", "deepspeed", "s1_hier", "s2_hier", "s1_hier/4", "s2_saa/2"} <= set(own)
    assert "paper" not in own
    assert "s2_saa" not in own
    assert own[0] == "s1"  # the simplest first
    # Without expert sharding, hierarchical is fused; without MP, after the gate is before it.
    assert not [each for each in labels(MoESizes(2, 4, 1)) if "hier" in each]
    assert not [each for each in labels(MoESizes(1, 2, 2)) if each.startswith("s2")]
    assert labels(MoESizes(1, 2, 2), splits=["after"])[0] == "s2"
    # DeepSpeed's order needs as many shards as MP ranks, and without shards it is S2.
    assert "deepspeed" not in labels(MoESizes(2, 4, 1))
    assert "deepspeed" not in labels(MoESizes(4, 2, 2))
    # Nothing travels: nothing to cut and nothing to pack.
    assert labels(MoESizes(2, 1, 1), splits=["before"]) == ["s1"]
    # Slots that are all filled, and rows of no slots, are packed already.
    for factor in (1.0, None):
        even = LayerShape(tokens=1024, dim=512, hidden=1024, num_experts=8, top_k=2, capacity_factor=factor)
        assert not [each for each in labels(SIZES, even) if "packed" in each]


def test_restrictions_hold():
    assert all(each.startswith("s1") for each in labels(SIZES, splits=["before"]))
    assert not [each for each in labels(SIZES, splits=["after"]) if each.startswith("s1")]
    assert labels(SIZES, chunks=4, splits=["before"]) == ["s1/4", "s1_hier/4", "s1_packed/4", "s1_hier_packed/4"]
    assert labels(SIZES, name="s1_hier") == ["s1_hier", "s1_hier/2", "s1_hier/4", "s1_hier/8"]
    assert labels(SIZES, name="paper") == ["paper"]
    with pytest.raises(ValueError, match="no schedule is left"):
        candidates(SHAPE, SIZES, splits=[])


def test_small_layers_are_not_cut_into_crumbs():
    tiny = LayerShape(tokens=32, dim=512, hidden=1024, num_experts=8, top_k=1)
    assert all(each.chunks == 1 for each in candidates(tiny, SIZES))


def test_of_equally_fast_ones_the_simpler_is_chosen():
    simple, other = schedule_named("s1"), schedule_named("s1_hier/8")

    def chosen(one, another, **measured):
        return choose([Prediction(simple, one, 0.0), Prediction(other, another, 0.0)], **measured).label

    assert chosen(1.02, 1.0) == "s1"
    assert chosen(1.05, 1.0) == "s1_hier/8"
    # What was measured counts more than what was predicted.
    assert chosen(1.0, 2.0, measured={"s1": 3.0, "s1_hier/8": 2.0}) == "s1_hier/8"


def test_without_measurements_the_one_that_sends_least_runs():
    assert fallback(SIZES, ["before", "after"]).name == "s1_hier"
    assert fallback(SIZES, ["after"]).name == "deepspeed"
    assert fallback(MoESizes(4, 2, 2), ["after"]).name == "s2_hier"
