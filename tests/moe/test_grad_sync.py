"""Gradients after the sync are those of one process, whatever the backwards of a step, and leave while it runs."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from lightning_efficient.moe import FixedSchedule, GradientSync, MoELayer, MoESizes, MoETopology, aux_loss, parallelize
from lightning_efficient.moe.experts import local
from lightning_efficient.moe.schedule import schedule_named
from tests.moe._grid import SOME_SPLITS, Setting, own_part, run_once
from tests.moe.reference import Result, reference
from tests.support.ranks import run_ranks

S, M = 6, 4


class Net(nn.Module):
    """Dense and MoE layers in turn; the dense maps of `sometimes` are used when asked for."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.never = nn.Linear(M, M)  # first: buckets are sent in order, and it would hold up those of earlier layers
        self.blocks = nn.ModuleList(
            [nn.Linear(M, M), MoELayer(M, 8, 8, bias=True, capacity_factor=None)][i % 2] for i in range(2 * depth)
        )
        self.sometimes = nn.Linear(M, M)

    def forward(self, x: Tensor, *, sometimes: bool = True) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.sometimes(x) if sometimes else x


def net_of(depth: int = 2) -> Net:
    torch.manual_seed(0)
    net = Net(depth).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


def data_of(step: int, d: int) -> Tensor:
    return torch.randn(S, M, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + d))


def loss_of(net: Net, step: int, d: int, *, sometimes: bool = True) -> Tensor:
    return net(data_of(step, d), sometimes=sometimes).square().mean() + aux_loss(net)


def by_all(d: int) -> bool:
    return True


def by_first(d: int) -> bool:
    return d == 0


def by_none(d: int) -> bool:
    return False


@cache
def one_process(D: int, steps: tuple[int, ...], used: Callable[[int], bool] = by_all) -> dict[str, Tensor | None]:
    """The mean over D batches, added up over steps."""
    net = net_of()
    for step in steps:
        for d in range(D):
            (loss_of(net, step, d, sometimes=used(d)) / D).backward()
    return {name: each.grad for name, each in net.named_parameters()}


def apart(net: nn.Module, theirs: dict[str, Tensor | None], topology: MoETopology) -> float:
    """The largest difference of what is on this rank; infinite where one has a gradient and the other none."""
    found = [0.0]
    for name, parameter in net.named_parameters():
        other = theirs[name]
        if parameter.grad is None or other is None:
            found.append(0.0 if parameter.grad is other else float("inf"))
            continue
        if isinstance(parameter, DTensor):
            other = own_part(other, name.rsplit(".")[-1], topology)
        found.append(float((local(parameter.grad) - other).abs().max()))
    return max(found)


def backward(net: Net, sync: GradientSync, step: int, d: int, *, sometimes: bool = True) -> None:
    sync.begin(net)
    loss_of(net, step, d, sometimes=sometimes).backward()
    sync.finish()


def _sum(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {
        name: grad if (more := other[name]) is None else more if grad is None else grad + more
        for name, grad in one.items()
    }


def _steps(rank: int, world: int) -> list[dict[str, Any]]:
    found = []
    for sizes in SOME_SPLITS:
        topology = MoETopology.create(sizes)
        D, d = topology.dp.size, topology.dp.rank
        net = net_of()
        parallelize(net, topology)
        sync = GradientSync(net, topology, bucket_mb=0.001)
        results: dict[str, Any] = {"sizes": sizes}

        backward(net, sync, 0, d)
        results["one"] = apart(net, one_process(D, (0,)), topology)

        backward(net, sync, 1, d)
        results["added to whole gradients"] = apart(net, one_process(D, (0, 1)), topology)

        for parameter in net.parameters():
            if parameter.grad is not None:
                local(parameter.grad).zero_()
        backward(net, sync, 2, d)
        results["after zeros"] = apart(net, one_process(D, (2,)), topology)

        net.zero_grad()
        sync.enabled = False
        backward(net, sync, 0, d)
        local_only = net.sometimes.weight.grad.clone()  # type: ignore[union-attr]
        backward(net, sync, 1, d)
        sync.enabled = True
        backward(net, sync, 2, d)
        results["accumulated"] = apart(net, one_process(D, (0, 1, 2)), topology)
        alone = net_of()
        loss_of(alone, 0, d).backward()
        results["not synced while disabled"] = float((local_only - alone.sometimes.weight.grad).abs().max())  # type: ignore[operator]

        net.zero_grad()
        backward(net, sync, 3, d, sometimes=d == 0)
        results["used by some"] = apart(net, one_process(D, (3,), by_first), topology)

        net.zero_grad()
        backward(net, sync, 4, d, sometimes=False)
        results["used by none"] = apart(net, one_process(D, (4,), by_none), topology)
        results["never"] = net.never.weight.grad is None

        # On top of whole gradients comes a micro-batch that is not synced and leaves some parameters out.
        net.zero_grad()
        backward(net, sync, 5, d)
        sync.enabled = False
        backward(net, sync, 6, d, sometimes=False)
        sync.enabled = True
        backward(net, sync, 7, d)
        parts = one_process(D, (5, 7)), one_process(D, (6,), by_none)
        results["whole ones outlive a micro-batch"] = apart(net, _sum(*parts), topology)
        found.append(results)
    return found


@pytest.mark.distributed
def test_gradients_are_those_of_one_process_through_all_kinds_of_steps() -> None:
    for found in run_ranks(_steps, 4, timeout=150):
        assert len(found) == len(SOME_SPLITS)
        for each in found:
            assert each.pop("never")
            sizes = each.pop("sizes")
            # float64, of some hundred products of size 1
            assert max(each.values()) < 1e-11, (sizes, each)


def _replicas(rank: int, world: int, settings: list[Setting], results: list[Result]) -> list[dict[str, float]]:
    found = []
    for sizes in SOME_SPLITS:
        topology = MoETopology.create(sizes)
        D = topology.dp.size
        for setting, result in zip(settings, results, strict=True):
            layer = setting.layer()
            parallelize(layer, topology)
            layer.scheduler = FixedSchedule(schedule_named("s2_hier"))
            sync = GradientSync(layer, topology)
            x, grad = setting.data(1)
            copies = {
                name: getattr(result, name).expand(D, *getattr(result, name).shape[1:])
                for name in ("y", "aux", "balance", "z")
            }
            alike = replace(result, **copies, dx=(result.dx / D).expand(D, -1, -1))
            found.append(run_once(layer, sync, topology, (x.expand(D, -1, -1), grad.expand(D, -1, -1)), alike)[0])
    return found


@pytest.mark.distributed
def test_replicas_with_the_same_data_leave_every_gradient_unchanged() -> None:
    """Those of a single rank; so experts divided by EDP, or summed over too many, show."""
    settings = [Setting(2, drops, "swiglu", bias=True, S=8) for drops in ("position", "dropless")]
    results = [reference(each.layer(), *each.data(1)) for each in settings]
    for found in run_ranks(_replicas, 4, settings, results, timeout=120):
        assert len(found) == len(SOME_SPLITS) * 2
        assert max(value for each in found for value in each.values()) < 1e-9


def _sequence_parallel(rank: int, world: int) -> dict[str, float]:
    """Norms in sequence parallelism: each rank of an MP group has the gradient of its part of the sequence."""
    topology = MoETopology.create(MoESizes(2, 1, 1))
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(M), nn.Linear(M, M)).double()
    alone = copy.deepcopy(net)
    parallelize_module(net[0], mesh["tensor_parallel"], SequenceParallel(sequence_dim=0, use_local_output=True))
    sync = GradientSync(net, topology)
    data = data_of(0, topology.dp.rank)
    mine = net[0](data.chunk(2)[topology.mp.rank])
    (mine.square().sum() / 2).backward()
    sync.finish()
    for d in range(topology.dp.size):
        (alone[0](data_of(0, d)).square().sum() / 2 / topology.dp.size).backward()
    return {
        name: float((local(each.grad) - alone[0].get_parameter(name).grad).abs().max())
        for name, each in net[0].named_parameters()
    }


@pytest.mark.distributed
def test_partial_gradients_of_tensor_parallelism_are_added_up() -> None:
    for found in run_ranks(_sequence_parallel, 4, timeout=120):
        assert set(found) == {"weight", "bias"}
        assert max(found.values()) < 1e-12


def _overlap(rank: int, world: int) -> dict[str, Any]:
    topology = MoETopology.create(MoESizes(2, 1, 2))
    net = net_of(depth=4)
    parallelize(net, topology)
    sync = GradientSync(net, topology, bucket_mb=0.0005)
    x = data_of(0, topology.dp.rank).requires_grad_()
    sent: list[int] = []
    x.register_hook(lambda grad: sent.append(sync.sent))
    y = net(x)
    (y.square().mean() + aux_loss(net)).backward()
    at_end = sync.sent
    sync.finish()
    order = [bucket.parameters for bucket in sync.buckets if bucket.group.size > 1]
    sizes = [sum(local(each).nbytes for each in bucket) for bucket in order]
    return {
        "buckets": len(order),
        "before the last gradient": sent,
        "before the end": at_end,
        "overlapped": sync.overlapped,
        "sent": sync.sent,
        "large": [(size, len(bucket)) for size, bucket in zip(sizes, order, strict=True) if size > 500],
    }


@pytest.mark.distributed
def test_buckets_leave_while_backward_runs() -> None:
    for found in run_ranks(_overlap, 4, timeout=120):
        assert found["buckets"] > 8
        # That of `never` waits for the end, and the routers' is full with the first layer's.
        assert found["before the last gradient"][0] >= found["buckets"] // 2
        assert found["overlapped"] == found["before the end"]
        assert found["sent"] == found["buckets"]
        assert all(parameters == 1 for _, parameters in found["large"])


def _two_types(rank: int, world: int) -> dict[str, Any]:
    topology = MoETopology.create(MoESizes(1, 2, 1))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(M, M), nn.Linear(M, M).bfloat16(), MoELayer(M, 8, 4, capacity_factor=None))
    parallelize(net, topology)
    sync = GradientSync(net, topology)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter) * (rank + 1)
    sync.finish()
    return {name: (each.grad.dtype, float(local(each.grad).max())) for name, each in net.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.distributed
def test_parameters_of_two_types_are_summed_apart() -> None:
    for rank, found in enumerate(run_ranks(_two_types, 4, timeout=120)):
        edp = (1 + 3 if rank % 2 == 0 else 2 + 4) / 4  # over the ranks with the same experts, by DP
        assert found == {
            "0.weight": (torch.float32, 2.5),
            "0.bias": (torch.float32, 2.5),
            "1.weight": (torch.bfloat16, 2.5),
            "1.bias": (torch.bfloat16, 2.5),
            "2.router.weight": (torch.float32, 2.5),
            "2.experts.w_in": (torch.float32, edp),
            "2.experts.w_out": (torch.float32, edp),
        }


def _refused(rank: int, world: int) -> str:
    topology = MoETopology.create(MoESizes(1, 2, 1))
    net = net_of()
    parallelize(net, topology)
    GradientSync(net, topology, bucket_mb=0.001)
    loss_of(net, 0, rank).backward()
    try:
        loss_of(net, 1, rank).backward()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_a_second_backward_before_the_first_is_finished_is_refused() -> None:
    for message in run_ranks(_refused, 2, timeout=120):
        assert "backward ran twice. Call finish() after each backward, or set enabled=False" in message


def _frozen(rank: int, world: int) -> list[float]:
    topology = MoETopology.create(MoESizes(2, 1, 1))
    net = net_of()
    parallelize(net, topology)
    net.blocks[0].requires_grad_(False)
    sync = GradientSync(net, topology)
    found = []
    for step in range(2):
        net.zero_grad()
        backward(net, sync, step, topology.dp.rank)
        expected = dict(one_process(topology.dp.size, (step,)))
        if step == 0:
            expected["blocks.0.weight"] = expected["blocks.0.bias"] = None
        found.append(apart(net, expected, topology))
        net.blocks[0].requires_grad_(True)
    sync.remove()
    net.zero_grad()
    loss_of(net, 5, topology.dp.rank).backward()
    found.append(float(sync.sent - sum(bucket.group.size > 1 for bucket in sync.buckets) * 2))
    return found


@pytest.mark.distributed
def test_frozen_parameters_are_left_out_and_taken_in_when_thawed_and_no_hook_stays() -> None:
    for before, after, sent_since in run_ranks(_frozen, 4, timeout=120):
        assert before < 1e-11
        assert after < 1e-11
        assert sent_since <= 0
