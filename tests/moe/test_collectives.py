"""The backward of each collective is its adjoint: <f(x), y> = <x, f'(y)>, added up over the group.

Where all ranks hold the same value and go on alike with it, it is one value, and counts once.
"""

import gc
import time
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from typing_extensions import override

from lightning_efficient.moe import (
    FixedSchedule,
    MoELayer,
    MoESizes,
    MoETopology,
    collectives,
    count_traffic,
    parallelize,
    schedule_named,
)
from lightning_efficient.moe.collectives import Collective, start, wait
from lightning_efficient.moe.ragged import uneven_all_to_all
from lightning_efficient.moe.topology import Group
from tests.support.ranks import run_ranks

COLLECTIVES = {  # name: is what goes in one value, is what comes out
    "all_to_all": (False, False),
    "split": (True, False),
    "merge": (False, True),
    "gather": (False, False),
    "reduce_scatter": (False, False),
    "all_reduce": (False, False),
    "sum_shares": (False, True),
    "replicated": (True, False),
}


@dataclass(slots=True)
class Products:
    """<f(x), y> and <x, f'(y)> over the group, and whether the twin in two halves gave the same."""

    name: str
    shape: tuple[int, ...]
    forward: float
    backward: float
    twin_is_equal: bool


def _products(rank: int, world: int, seed: int) -> list[Products]:
    topology = MoETopology.create(MoESizes(2, world // 2, 1))
    found = []
    draws = torch.Generator().manual_seed(seed)  # alike on all ranks
    for group in (topology.mp, topology.ep, topology.world):
        for name, (one_in, one_out) in COLLECTIVES.items():
            for _ in range(4):
                rows, *rest = (int(torch.randint(0, 5, (), generator=draws)) for _ in range(3))
                shape = (rows * group.size, *rest[: int(torch.randint(0, 3, (), generator=draws))])
                collective = getattr(collectives, name)
                found.append(_adjoint(name, collective, group, shape, one_in=one_in, one_out=one_out))
        for _ in range(4):
            rows_PP = torch.randint(0, 4, (group.size, group.size), generator=draws)
            send, receive = rows_PP[group.rank].tolist(), rows_PP[:, group.rank].tolist()
            uneven = uneven_all_to_all(send, receive)
            found.append(_adjoint("uneven_all_to_all", uneven, group, (sum(send), 3), one_in=False, one_out=False))
    return found


def _adjoint(
    name: str, collective: Collective, group: Group, shape: tuple[int, ...], *, one_in: bool, one_out: bool
) -> Products:
    x = _draw(shape, group, one=one_in).requires_grad_()
    out = collective(x, group)
    y = _draw(tuple(out.shape), group, one=one_out)
    (dx,) = torch.autograd.grad(out, x, y)
    twin = wait(start(x, group, collective))
    (twin_dx,) = torch.autograd.grad(twin, x, y)
    products = torch.tensor(
        [
            (out.detach() * y).sum() / (group.size if one_out else 1),
            (x.detach() * dx).sum() / (group.size if one_in else 1),
        ],
        dtype=torch.float64,
    )
    dist.all_reduce(products, group=group.process_group)
    return Products(name, shape, *products.tolist(), torch.equal(out, twin) and torch.equal(dx, twin_dx))


def _draw(shape: tuple[int, ...], group: Group, *, one: bool) -> Tensor:
    """Random numbers, other ones on each rank, or one value for all."""
    x = torch.randn(shape, dtype=torch.float64)
    if one:
        dist.broadcast(x, group_src=0, group=group.process_group)
    return x


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 6])
def test_backward_is_the_adjoint(world: int) -> None:
    ranks = run_ranks(_products, world, 7, timeout=120)
    assert {each.name for each in ranks[0]} == {*COLLECTIVES, "uneven_all_to_all"}
    for found in ranks:
        for each in found:
            # float64: sums of some hundred products
            assert each.forward == pytest.approx(each.backward, abs=1e-10), each
            assert each.twin_is_equal, each
    assert sum(abs(each.forward) > 0.1 for each in ranks[0]) > 50  # not all empty


def _values(rank: int, world: int) -> dict[str, Any]:
    group = MoETopology.create(MoESizes(world)).mp
    x = torch.arange(4.0) + 10 * rank
    out: dict[str, Any] = {name: getattr(collectives, name)(x, group).tolist() for name in COLLECTIVES}
    first, second = start(x, group, collectives.all_reduce), start(2 * x, group, collectives.all_reduce)
    out["two in flight"] = (wait(second) / wait(first)).tolist()
    bfloat = collectives.all_to_all(x.bfloat16(), group)
    out["bfloat16"] = (bfloat.dtype is torch.bfloat16, bfloat.float().tolist())
    return out


@pytest.mark.distributed
def test_forward_does_what_the_table_says() -> None:
    first, second = run_ranks(_values, 2, timeout=120)
    assert first["all_to_all"] == [0, 1, 10, 11]
    assert second["all_to_all"] == [2, 3, 12, 13]
    assert (first["split"], second["split"]) == ([0, 1], [12, 13])
    assert first["merge"] == second["gather"] == [0, 1, 2, 3, 10, 11, 12, 13]
    assert (first["reduce_scatter"], second["reduce_scatter"]) == ([10, 12], [14, 16])
    assert first["all_reduce"] == second["sum_shares"] == [10, 12, 14, 16]
    assert second["replicated"] == [10, 11, 12, 13]
    assert first["two in flight"] == [2, 2, 2, 2]
    assert second["bfloat16"] == (True, [2, 3, 12, 13])


def test_one_rank_sends_nothing_and_keeps_its_tensor() -> None:
    x = torch.randn(3, 2)
    with count_traffic() as traffic:
        for name in COLLECTIVES:
            assert getattr(collectives, name)(x, Group("mp")) is x
            assert wait(start(x, Group("mp"), getattr(collectives, name))) is x
    assert not traffic.calls


def test_a_flight_lands_once() -> None:
    flight = start(torch.ones(2), Group("mp"), collectives.all_reduce)
    wait(flight)
    with pytest.raises(AssertionError, match="once"):
        wait(flight)


class _Canary:
    """What the graph of a forward holds on to."""


class _Hold(Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, canary: _Canary) -> Tensor:
        ctx.canary = canary
        return x.clone()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def _graphs_alive(rank: int, world: int, backward: bool) -> dict[str, int]:
    layer, topology = MoELayer(4, 8, 4), MoETopology.create(MoESizes(2, 1, 2))
    parallelize(layer, topology)
    gc.disable()
    alive = {}
    for label in ("paper", "deepspeed", "s1_hier/2", "s2_saa/2", "s1_packed", "s2"):
        layer.scheduler = FixedSchedule(schedule_named(label))
        canary = _Canary()
        gone = weakref.ref(canary)
        y = layer(_Hold.apply(torch.randn(4, 4, requires_grad=True), canary))
        if backward:
            (y.sum() + layer.aux_loss).backward()
        del canary, y
        layer.aux_loss = layer.stats = None
        deadline = time.monotonic() + 5  # gloo's threads let go of a tensor a moment after it was sent
        while gone() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        alive[label] = int(gone() is not None)
    return alive


@pytest.mark.distributed
@pytest.mark.parametrize("backward", [False, True])
def test_a_graph_is_freed_with_its_output_and_needs_no_garbage_collector(backward: bool) -> None:
    for alive in run_ranks(_graphs_alive, 2, backward, timeout=120):
        assert not any(alive.values()), alive
