"""What the profiler's records become: sizes of collectives, and ranges that compute nothing."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_efficient.dissect import Event, attribute, events_of
from tests.support.ranks import run_ranks

STEP, NODE = "le::step", "autograd::engine::evaluate_function: "


def sizes_of_calls(rank: int, world_size: int) -> dict[str, int]:
    """What each call is said to be handed in, without the backend's own record of it."""
    own, whole = torch.zeros(500, dtype=torch.float64), torch.zeros(500 * world_size, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these names are deprecated in new releases of torch, and known to all
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            dist.all_gather_into_tensor(whole, own)
            dist.reduce_scatter_tensor(own, whole)
            dist.all_to_all_single(torch.empty_like(whole), whole)
            dist.all_reduce(whole)
            dist.broadcast(own, src=0)
    return {each.name: each.n_bytes for each in events_of(recorded) if each.name.startswith("c10d::")}


@pytest.mark.distributed
def test_a_call_says_what_is_handed_in_and_not_what_comes_out() -> None:
    sizes = run_ranks(sizes_of_calls, 2)[0]
    # Collectives on one list of tensors take a type nobody records, so that single precision is assumed.
    assert sizes["c10d::_allgather_base_"] == 8 * 500
    assert sizes["c10d::_reduce_scatter_base_"] == 8 * 1000
    assert sizes["c10d::alltoall_base_"] == 8 * 1000
    assert sizes["c10d::allreduce_"] == 4 * 1000
    assert sizes["c10d::broadcast_"] == 4 * 500


def test_ranges_are_told_from_operators() -> None:
    linear = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    with profile(activities=[ProfilerActivity.CPU]) as recorded, torch.profiler.record_function("mine"):
        linear(torch.zeros(1, 2)).sum().backward()
        optimizer.step()
    ranges = {each.name for each in events_of(recorded) if each.is_range}
    assert ranges == {"mine", "Optimizer.step#SGD.step"}


def test_a_wait_inside_of_a_librarys_range_is_communication() -> None:
    events = [
        Event(STEP, 0, 1000),
        Event("le::P:forward:<training_step>", 100, 500),
        Event("DistributedDataParallel.forward", 110, 490, is_range=True),
        Event("aten::mm", 120, 220),
        Event("gloo:all_reduce", 200, 400, thread=9, is_async=True),
    ]
    rows = {row.name: row for row in attribute(events, {}).host.rows}
    assert rows["<communication>"].communication_s == pytest.approx(180e-9)
    assert rows["<training_step>"].forward_s == pytest.approx(220e-9)


@pytest.mark.parametrize("around", ["le::P:backward:<engine>", "le::P:forward:<training_step>", "le::P:other:<loop>"])
def test_backward_on_another_thread_counts_once_wherever_it_was_asked_for(around: str) -> None:
    events = [
        Event(STEP, 0, 1000),
        Event(around, 100, 900),
        Event("aten::mm", 110, 200, sequence=3),
        Event(f"{NODE}MmBackward0", 300, 800, thread=2, sequence=3, forward_thread=1),
    ]
    host = attribute(events, {}).host
    assert sum(row.total_s for row in host.rows) == pytest.approx(host.step_s)


def test_a_kernel_that_a_range_launched_is_no_idle_time() -> None:
    events = [
        Event(STEP, 0, 1000),
        Event("le::F:m", 100, 300, correlation=7),
        Event("triton_kernel", 150, 210, on_device=True, correlation=7),
        Event("le::F:n", 400, 600, correlation=8),
        Event("other_kernel", 450, 470, on_device=True, correlation=8),
    ]
    device = attribute(events, {"m": ("mlp", "M"), "n": ("mlp", "N")}).device
    assert device is not None
    rows = {row.name: row.forward_s for row in device.rows}
    assert rows["m"] == pytest.approx(60e-9)
    assert rows["n"] == pytest.approx(20e-9)
