"""`AutoSchedule` on real ranks: one choice for all, once for each shape, without a trace in the training."""

import random
import time
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_efficient._links import AlphaBeta
from lightning_efficient.moe import MoELayer, MoESizes, MoETopology, count_traffic, parallelize, schedule_named
from lightning_efficient.moe.planning import AutoSchedule, Links
from lightning_efficient.moe.planning.links import LINKS
from tests.support.ranks import run_ranks

SIZES = MoESizes(2, 2, 2)
TIMEOUT = 150.0  # ranks measure for some seconds, beside whatever else runs on the machine


def made(sizes=SIZES, **options):
    topology = MoETopology.create(sizes)
    torch.manual_seed(0)
    layer = MoELayer(32, 64, 8, 2, **{"capacity_factor": 1.25, **options})
    parallelize(layer, topology)
    return topology, layer


def quick(topology, **options):
    return AutoSchedule(topology, **{"trials": 1, "budget_s": 1.2, **options})


def with_links(scheduler, lines=None, **options):
    """The same scheduler, to which the links are known: what it does then depends on no noise of the machine."""
    scheduler._prepare(torch.device("cpu"))
    scheduler.plan.links = Links(lines or {key: AlphaBeta(1e-4, 1e-8) for key in LINKS}, **options)
    return scheduler


def choose_with_noise(rank, world_size, trials):
    topology, layer = made()
    noise, clock, ahead = random.Random(rank), time.perf_counter, 0.0

    def noisy():
        nonlocal ahead
        ahead += rank * noise.choice([0.0, 0.0005, 0.005])
        return clock() + ahead

    time.perf_counter = noisy
    scheduler = quick(topology, trials=trials)
    found = [scheduler.schedule_for(layer, torch.zeros(tokens, 32)).label for tokens in (64, 256)]
    time.perf_counter = clock
    # Even if each rank remembers links of its own.
    lines = {key: AlphaBeta(1e-4, 10 ** noise.uniform(-9, -6)) for key in LINKS}
    scheduler = with_links(quick(topology, trials=0), lines)
    found += [scheduler.schedule_for(layer, torch.zeros(tokens, 32)).label for tokens in (128, 512, 1024)]
    return found, [choice.as_dict() for choice in scheduler.plan.choices.values()]


@pytest.mark.distributed
@pytest.mark.parametrize("trials", [0, 2])
def test_all_ranks_choose_alike_under_noise(trials):
    of_ranks = run_ranks(choose_with_noise, 4, trials, timeout=TIMEOUT)
    assert all(each == of_ranks[0] for each in of_ranks)


def traces(rank, world_size):
    topology, layer = made(jitter=0.1)
    x_SM = torch.zeros(64, 32)
    before = {name: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()
              for name, parameter in layer.state_dict().items()}  # fmt: skip
    random_state = torch.get_rng_state()
    scheduler = quick(topology, trials=2)
    with count_traffic() as counted, torch.inference_mode():
        first = scheduler.schedule_for(layer, x_SM)
    with count_traffic() as again, torch.no_grad():
        second = scheduler.schedule_for(layer, x_SM)
    tried = next(iter(scheduler.plan.choices.values())).measured
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, parameter in layer.state_dict().items():
        assert torch.equal(parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter, before[name])
    return {
        "same": first == second,
        "tried": len(tried),
        "choices": len(scheduler.plan.choices),
        "bytes": counted.total_bytes + again.total_bytes,
        "grads": [name for name, parameter in layer.named_parameters() if parameter.grad is not None],
        "state": (layer.stats, layer.aux_loss, layer.training),
    }


@pytest.mark.distributed
def test_trials_leave_no_trace_and_run_without_gradients_being_on():
    for found in run_ranks(traces, 4, timeout=TIMEOUT):
        assert found == {
            "same": True, "tried": found["tried"], "choices": 1, "bytes": 0, "grads": [], "state": (None, None, True),
        }  # fmt: skip
        assert found["tried"]


def remembered(rank, world_size, path):
    topology, layer = made()
    x_SM = torch.zeros(64, 32)
    first = with_links(quick(topology, cache=path))
    label = first.schedule_for(layer, x_SM).label
    second = quick(topology, cache=path)
    torch.distributed.barrier()
    measured = second.plan.links
    second.schedule_for(layer, x_SM)
    kept = second.plan.choices == first.plan.choices and second.plan.links == first.plan.links
    # Other sizes of groups: nothing of it holds.
    other_topology, other_layer = made(MoESizes(2, 4, 1))
    other = quick(other_topology, cache=path)
    other.schedule_for(other_layer, x_SM)
    return label, measured, kept, other.plan.links != first.plan.links, other.plan.setting["sizes"]["expert_parallel"]


@pytest.mark.distributed
def test_what_is_in_the_file_is_not_measured_again(tmp_path):
    for _, before, kept, anew, ep in run_ranks(remembered, 4, tmp_path / "plan.json", timeout=TIMEOUT):
        assert before is None
        assert kept
        assert anew
        assert ep == 4


def flips(rank, world_size):
    """Shapes whose fastest schedules split at different places, as links change between them."""
    topology, layer = made()

    def links(after_is_slow):
        lines = {key: AlphaBeta(1e-5, 1e-9) for key in LINKS}
        # Gathering rows of tokens after the experts, or the slots: the one or the other is dear.
        lines["all_gather", "mp"] = AlphaBeta(1e-5, 1e-5 if after_is_slow else 1e-9)
        lines["all_reduce", "mp"] = AlphaBeta(1e-5 if after_is_slow else 1.0, 1e-9)
        return Links(lines)

    def fresh(after_is_slow):
        scheduler = with_links(quick(topology, trials=0))
        scheduler.plan.links = links(after_is_slow)
        return scheduler

    found = []
    free = fresh(after_is_slow=False)
    found.append(free.schedule_for(layer, torch.zeros(64, 32)).split)
    other = fresh(after_is_slow=True)
    found.append(other.schedule_for(layer, torch.zeros(64, 32)).split)
    # Once a layer splits after the gate, it does so for other numbers of tokens, and after a restart.
    free.plan.links = links(after_is_slow=True)
    found.append(free.schedule_for(layer, torch.zeros(128, 32)).split)
    resumed = quick(topology, trials=0)
    resumed.load_state_dict(free.state_dict())
    kept = resumed.schedule_for(layer, torch.zeros(64, 32)), resumed.plan.choices == free.plan.choices
    resumed.plan.links = links(after_is_slow=True)
    found.append(resumed.schedule_for(layer, torch.zeros(256, 32)).split)
    # Where nothing is dropped it may choose freely.
    whole_topology, whole = topology, MoELayer(32, 64, 8, 2, capacity_factor=None)
    parallelize(whole, whole_topology)
    resumed.schedule_for(whole, torch.zeros(64, 32))
    resumed.plan.links = links(after_is_slow=False)
    found.append(resumed.schedule_for(whole, torch.zeros(128, 32)).split)
    return found, kept[1]


@pytest.mark.distributed
def test_a_layer_that_may_drop_tokens_keeps_to_one_split():
    for found, kept in run_ranks(flips, 4, timeout=TIMEOUT):
        assert found == ["after", "before", "after", "after", "after"]
        assert kept


def refused(rank, world_size, splits, trials):
    topology, layer = made()
    slow, doubted = dict.fromkeys(LINKS, AlphaBeta(1e-2, 1e-6)), dict.fromkeys(LINKS, "noise")
    scheduler = with_links(quick(topology, splits=splits, trials=trials), slow, refused=doubted)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        schedule = scheduler.schedule_for(layer, torch.zeros(64, 32))
    (choice,) = scheduler.plan.choices.values()
    told = [str(each.message) for each in told if "told apart from noise" in str(each.message)]
    return schedule.label, dict(choice.measured), choice.doubtful, told


@pytest.mark.distributed
@pytest.mark.parametrize(("splits", "label"), [(("before", "after"), "s1_hier"), (("after",), "deepspeed")])
def test_links_that_are_all_noise_are_no_ground_to_choose_by(splits, label):
    of_ranks = run_ranks(refused, 4, splits, 0, timeout=TIMEOUT)
    assert [each[:3] for each in of_ranks] == [(label, {}, True)] * 4
    assert [len(each[3]) for each in of_ranks] == [1, 0, 0, 0]


@pytest.mark.distributed
def test_where_links_are_all_noise_the_layers_own_runs_decide():
    of_ranks = run_ranks(refused, 4, ("before", "after"), 6, timeout=TIMEOUT)
    for label, measured, doubtful, told in of_ranks:
        assert measured == of_ranks[0][1]
        assert measured[label] <= 1.03 * min(measured.values())  # of equals the simplest
        assert doubtful
        assert [f"run by {label}: the fastest of those tried" in each for each in told] == [True] * len(told)
    assert [len(each[3]) for each in of_ranks] == [1, 0, 0, 0]


def checkpointed(rank, world_size):
    """A layer within a checkpoint measures in its first forward, which backward computes again."""
    topology, layer = made()
    x_SM = torch.randn(64, 32, generator=torch.Generator().manual_seed(topology.dp.rank)).requires_grad_()
    layer.scheduler = quick(topology, trials=4)
    y_SM = checkpoint(layer, x_SM, use_reentrant=False)
    (again,) = torch.autograd.grad(y_SM.square().sum() + layer.aux_loss, x_SM)
    (once,) = torch.autograd.grad(layer(x_SM).square().sum() + layer.aux_loss, x_SM)
    (choice,) = layer.scheduler.plan.choices.values()
    return len(choice.measured), float((again - once).abs().max()), layer.stats.load.requires_grad


@pytest.mark.distributed
def test_measuring_within_a_checkpoint_leaves_no_trace_in_it():
    for tried, apart, holds_a_graph in run_ranks(checkpointed, 4, timeout=TIMEOUT):
        assert tried
        assert apart < 1e-5  # float32
        assert not holds_a_graph


def many_lengths(rank, world_size):
    topology, layer = made()
    scheduler = quick(topology, trials=2)
    for tokens in (32, 64, 96, 128, 160, 192):
        scheduler.schedule_for(layer, torch.zeros(tokens, 32))
    return [bool(choice.measured) for choice in scheduler.plan.choices.values()]


@pytest.mark.distributed
def test_many_lengths_are_not_all_tried():
    for tried in run_ranks(many_lengths, 4, timeout=TIMEOUT):
        assert tried == [True] * 4 + [False] * 2


def evaluated_first(rank, world_size):
    topology, layer = made()
    scheduler = quick(topology, trials=0)
    layer.eval()
    scheduler.schedule_for(layer, torch.zeros(128, 32))
    before = scheduler.state_dict()["kept"]
    layer.train()
    schedule = scheduler.schedule_for(layer, torch.zeros(256, 32))
    return before, [each["split"] for each in scheduler.state_dict()["kept"]], schedule.split


@pytest.mark.distributed
def test_evaluation_does_not_settle_where_training_splits():
    for before, after, split in run_ranks(evaluated_first, 4, timeout=TIMEOUT):
        assert before == []
        assert after == [split]


def unwritable(rank, world_size, path):
    topology, layer = made()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with_links(quick(topology, cache=path / "plan.json")).schedule_for(layer, torch.zeros(64, 32))
    return [str(each.message) for each in told if "cannot be written" in str(each.message)]


@pytest.mark.distributed
def test_a_file_that_cannot_be_written_costs_nothing_but_a_warning(tmp_path):
    path = tmp_path / "a file"
    path.touch()
    of_ranks = run_ranks(unwritable, 4, path, timeout=TIMEOUT)
    assert [len(each) for each in of_ranks] == [1, 0, 0, 0]


def no_tokens(rank, world_size):
    topology, layer = made()
    layer.scheduler = quick(topology)
    y = layer(torch.zeros(0, 32, requires_grad=True))
    (y.sum() + layer.aux_loss).backward()
    return tuple(y.shape), float(layer.aux_loss)


@pytest.mark.distributed
def test_no_tokens_are_no_error():
    assert run_ranks(no_tokens, 4, timeout=TIMEOUT) == [((0, 32), 0.0)] * 4


def test_alone_there_is_nothing_to_measure():
    layer = MoELayer(32, 64, 8, 2)
    scheduler = AutoSchedule(layer.topology)
    assert scheduler.schedule_for(layer, torch.zeros(64, 32)) == schedule_named("s1")
    assert scheduler.plan.links is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"splits": ["middle"]}, "splits are"),
        ({"splits": []}, "splits are"),
        ({"trials": -1}, "trials=-1"),
        ({"chunks": 0}, "chunks=0"),
        ({"budget_s": 0.0}, "budget_s=0"),
        ({"name": "s9"}, "no schedule 's9'"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        AutoSchedule(MoETopology(), **options)
