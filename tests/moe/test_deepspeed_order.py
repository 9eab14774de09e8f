"""Our `deepspeed` order against DeepSpeed's own layer: what the benchmark compares with is what it says it is."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_efficient.moe import SCHEDULES, MoELayer, MoESizes, MoETopology, parallelize
from lightning_efficient.moe.experts import local
from tests.benchmarks._parm_deepspeed import DeepSpeedMoE, LayerWeights, deepspeed_can, why_no_deepspeed
from tests.support.ranks import run_ranks

S, M, H, E = 48, 16, 32, 8
SIZES = [
    MoESizes(2, 2, 2),
    MoESizes(2, 4, 1),
    MoESizes(4, 4, 1),
    MoESizes(4, 1, 4),
    MoESizes(2, 1, 2),
    MoESizes(1, 4, 1),
]

needs_deepspeed = pytest.mark.skipif(why_no_deepspeed() is not None, reason=why_no_deepspeed() or "")


def _both(rank: int, world_size: int, sizes: list[MoESizes], k: int, factor: float) -> list[dict[str, float]]:
    """For each topology: by tensor, the largest difference between ours and theirs; `dropped`: assignments."""
    found = []
    for each in sizes:
        topology = MoETopology.create(each, timeout=timedelta(seconds=60))
        torch.manual_seed(0)
        layer = MoELayer(M, H, E, k, capacity_factor=factor, activation="gelu", normalize="after_drop")
        up, down = layer.experts.w_in.detach()[:, :, 0].clone(), layer.experts.w_out.detach().clone()
        theirs = DeepSpeedMoE(
            topology, LayerWeights(layer.router.weight.detach().clone(), up, down), top_k=k, capacity_factor=factor
        )
        parallelize(layer, topology)
        torch.manual_seed(1 + topology.dp.rank)
        x_SM, grad_SM = torch.randn(S, M), torch.randn(S, M)
        my_x, their_x = x_SM.clone().requires_grad_(), x_SM.clone().requires_grad_()
        my_y, stats = layer.run(my_x, SCHEDULES["deepspeed"])
        my_y.backward(grad_SM)
        their_y = theirs(their_x)
        their_y.backward(grad_SM)
        inner = theirs.module.deepspeed_moe
        gate = _grad(layer.router.weight)
        if topology.mp.size > 1:  # ours is a share of the MP group's
            dist.all_reduce(gate, group=topology.mp.process_group)
        pairs = {
            "output": (my_y, their_y),
            "d input": (_grad(my_x), _grad(their_x)),
            "d gate": (gate, _grad(inner.gate.wg.weight)),
            "d up": (
                _grad(layer.experts.w_in)[:, :, 0],
                torch.stack([_grad(expert.up_HM).T for expert in inner.experts.deepspeed_experts]),
            ),
            "d down": (
                _grad(layer.experts.w_out),
                torch.stack([_grad(expert.down_MH).T for expert in inner.experts.deepspeed_experts]),
            ),
        }
        apart = {name: float((mine - other).abs().max()) for name, (mine, other) in pairs.items()}
        found.append({**apart, "dropped": float(stats.dropped)})
    return found


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return local(parameter.grad).detach()


def _assert_equal(found: list[list[dict[str, float]]]) -> None:
    # float32, in sums of up to 32 products of size 1, added up in another order
    apart = {
        (rank, str(sizes), name): value
        for rank, topologies in enumerate(found)
        for sizes, tensors in zip(SIZES, topologies, strict=True)
        for name, value in tensors.items()
        if name != "dropped" and not value < 2e-5
    }
    assert not apart


@pytest.mark.distributed
@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("k", [1, 2])
def test_deepspeed_order_equals_deepspeed_where_nothing_is_dropped(k: int) -> None:
    found = run_ranks(_both, 4, SIZES, k, E / k, timeout=120)
    assert all(tensors["dropped"] == 0 for topologies in found for tensors in topologies)
    _assert_equal(found)


@pytest.mark.distributed
@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_order_drops_what_deepspeed_drops() -> None:
    found = run_ranks(_both, 4, SIZES, 2, 1.0, timeout=120)
    assert all(any(topologies[each]["dropped"] > 0 for topologies in found) for each in range(len(SIZES)))
    _assert_equal(found)


def test_deepspeed_has_groups_only_where_experts_are_whole_or_cut_over_mp() -> None:
    def of(*sizes: int) -> MoETopology:
        return MoETopology(MoESizes(*sizes))

    assert deepspeed_can(of(2, 2, 2))
    assert deepspeed_can(of(4, 4, 1))
    assert not deepspeed_can(of(1, 2, 2))
    assert not deepspeed_can(of(4, 2, 2))
