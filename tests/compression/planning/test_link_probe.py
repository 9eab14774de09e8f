"""The link probe: its fit against exact data, and its measurement over real processes."""

import time

import pytest
import torch
import torch.distributed as dist

from lightning_efficient.compression.planning.cost_model import LinkModel
from lightning_efficient.compression.planning.link_probe import fit_link, measure_device, measure_link
from tests.support.ranks import rank_outcomes, run_ranks

SIZES = (4096, 65536, 1048576)


@pytest.mark.parametrize("world_size", [2, 4, 64])
@pytest.mark.parametrize("link", [LinkModel(1e-4, 8e-8), LinkModel(0.0, 1e-9), LinkModel(2e-3, 0.0)])
def test_fit_recovers_the_link_from_exact_times(link, world_size):
    points = [(n, link.all_reduce_s(n, world_size=world_size)) for n in SIZES]
    fitted = fit_link(points, world_size=world_size)
    # Least squares in float64 over times that span three orders of magnitude.
    assert fitted.alpha_s == pytest.approx(link.alpha_s, rel=1e-6, abs=1e-12)
    assert fitted.beta_s_per_byte == pytest.approx(link.beta_s_per_byte, rel=1e-6, abs=1e-16)
    assert fitted.residual < 1e-6


def test_fit_reports_its_relative_residual():
    link = LinkModel(1e-4, 8e-8)
    points = [
        (n, link.all_reduce_s(n, world_size=2) * factor) for n, factor in zip(SIZES, (1.2, 0.8, 1.1), strict=True)
    ]
    assert 0.02 < fit_link(points, world_size=2).residual < 0.3


def test_fit_never_gives_a_negative_latency_or_rate():
    superlinear = fit_link([(1000, 0.001), (2000, 0.004)], world_size=2)
    assert (superlinear.alpha_s, superlinear.beta_s_per_byte > 0) == (0.0, True)
    falling = fit_link([(1000, 0.004), (2000, 0.001)], world_size=2)
    assert (falling.alpha_s > 0, falling.beta_s_per_byte) == (True, 0.0)


@pytest.mark.parametrize("points", [[], [(10, 1.0)], [(10, 1.0), (10, 2.0)], [(10, 1.0), (20, 0.0)]])
def test_too_few_points_are_named(points):
    with pytest.raises(ValueError, match=rf"cannot fit a link \({len(points)} points"):
        fit_link(points, world_size=2)


def test_measuring_a_device_gives_finite_positive_rates():
    device = measure_device("cpu", side=256, repeats=3)
    # Any machine that runs this does between a million and a quadrillion operations per second.
    assert 1e6 < device.flops_per_s < 1e15
    assert 1e6 < device.memory_bytes_per_s < 1e15
    assert 0 < device.per_op_s < 1e-2


def test_no_process_group_is_an_error():
    with pytest.raises(RuntimeError, match="no process group"):
        measure_link()


def measured(rank, world_size):
    return measure_link(sizes=SIZES, repeats=3)


@pytest.mark.distributed
def test_all_ranks_get_the_same_link():
    links = run_ranks(measured, 3)
    assert links[0] == links[1] == links[2]
    # Loopback on any machine: above 1 Mbit/s, below a second of latency.
    assert links[0].bits_per_s > 1e6
    assert links[0].alpha_s < 1.0


def measured_with_a_slow_rank(rank, world_size):
    all_reduce = dist.all_reduce

    def slow(*args, **kwargs):
        if rank == 1:
            time.sleep(0.02)
        return all_reduce(*args, **kwargs)

    dist.all_reduce = slow
    return measure_link(sizes=SIZES, repeats=3)


@pytest.mark.distributed
def test_the_slowest_rank_sets_the_latency():
    # 20 ms per collective, spread over the 2 (W - 1) = 2 messages of a ring of two; it cannot be less.
    links = run_ranks(measured_with_a_slow_rank, 2)
    assert all(link.alpha_s >= 0.009 for link in links)


def sizes_measured_within(rank, world_size, budget_s):
    seen = []
    all_reduce = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        seen.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    measure_link(sizes=(4096, 16384, 65536, 2**20), repeats=2, budget_s=budget_s)
    return sorted(set(seen) - {16})  # without the two numbers the ranks agree on


@pytest.mark.distributed
def test_budget_leaves_out_large_messages_on_all_ranks_alike():
    # No budget at all: the two smallest sizes are measured anyway, nothing else.
    assert run_ranks(sizes_measured_within, 2, 0.0) == [[4096, 16384]] * 2
    assert run_ranks(sizes_measured_within, 2, 60.0) == [[4096, 16384, 65536, 2**20]] * 2


def measured_in_a_subgroup(rank, world_size):
    group = dist.new_group([0, 1])
    return measure_link(group, sizes=SIZES, repeats=2) if rank < 2 else None


@pytest.mark.distributed
def test_a_subgroup_is_measured_without_the_others():
    first, second, outsider = run_ranks(measured_in_a_subgroup, 3)
    assert first == second
    assert outsider is None


def measured_while_the_other_rank_sleeps(rank, world_size):
    if rank == 1:
        time.sleep(4)
        return
    measure_link(sizes=SIZES, timeout_s=1.0)
    return


@pytest.mark.distributed
def test_a_stuck_rank_is_a_clear_error_after_the_timeout():
    outcome = rank_outcomes(measured_while_the_other_rank_sleeps, 2, timeout=30)[0]
    assert outcome.status == "raised"
    assert "the link probe failed (4096 bytes over 2 ranks, timeout 1 s)" in outcome.error
    assert outcome.seconds < 3.5


def misused(rank, world_size):
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    messages = []
    for arguments in ({"group": alone}, {"sizes": (4096,)}, {"sizes": (1, 4096)}, {"repeats": 0}):
        try:
            measure_link(**arguments)
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.distributed
def test_misuse_is_named_before_anything_is_sent():
    for messages in run_ranks(misused, 2):
        assert len(messages) == 4
        assert "world size 1" in messages[0]
        assert all("bad probe" in message for message in messages[1:])


def test_probe_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    measure_device("cpu", side=64, repeats=1)
    assert torch.equal(before, torch.get_rng_state())
