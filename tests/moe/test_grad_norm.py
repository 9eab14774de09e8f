"""The norm over parts on many ranks is the norm of one process, on every rank; clipping scales all alike."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_efficient.moe import MoELayer, MoETopology, clip_grad_norm, grad_norm, parallelize
from lightning_efficient.moe.experts import local
from tests.moe._grid import SOME_SPLITS, splits
from tests.support.ranks import run_ranks


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), MoELayer(4, 8, 8, bias=True), nn.Linear(4, 4))


def give_gradients(module: nn.Module) -> None:
    """The same whole gradients however the experts are spread: functions of the weights."""
    for parameter in module.parameters():
        own = local(parameter.detach())
        grad = own * 3 + own.square() + 0.1
        if isinstance(parameter, DTensor):
            grad = DTensor.from_local(grad, parameter.device_mesh, parameter.placements, run_check=False)
        parameter.grad = grad


def _norms(rank: int, world: int) -> list[dict[str, Any]]:
    found = []
    for sizes in SOME_SPLITS if world == 4 else splits(world):
        topology = MoETopology.create(sizes)
        module = model_of()
        parallelize(module, topology)
        give_gradients(module)
        found.append({"sizes": sizes, "norm": float(grad_norm(module.parameters(), topology))})
        before = [local(each.grad).clone() for each in module.parameters() if each.grad is not None]
        found[-1]["returned"] = float(clip_grad_norm(module.parameters(), 0.5, topology))
        found[-1]["clipped"] = float(grad_norm(module.parameters(), topology))
        ratios = [
            (local(each.grad) / old).flatten()
            for each, old in zip(module.parameters(), before, strict=True)
            if each.grad is not None
        ]
        found[-1]["ratio"] = (float(torch.cat(ratios).min()), float(torch.cat(ratios).max()))
        found[-1]["kept"] = _small_stays(module, topology)
        found[-1]["bad"] = [_with_one(module, topology, rank, value) for value in (torch.inf, torch.nan)]
    return found


def _small_stays(module: nn.Module, topology: MoETopology) -> bool:
    before = [local(each.grad).clone() for each in module.parameters() if each.grad is not None]
    clip_grad_norm(module.parameters(), 100.0, topology)
    after = [local(each.grad) for each in module.parameters() if each.grad is not None]
    return all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def _with_one(module: nn.Module, topology: MoETopology, rank: int, value: float) -> float:
    """The norm when one element of one shard, on one rank, is not finite."""
    experts = next(each for each in module.modules() if isinstance(each, MoELayer)).experts
    assert experts.w_in.grad is not None
    if rank == topology.world_size - 1:
        local(experts.w_in.grad).view(-1)[0] = value
    norm = float(grad_norm(module.parameters(), topology))
    local(experts.w_in.grad).nan_to_num_(0, 0, 0)
    return norm


@pytest.mark.distributed
def test_norm_and_clipping_are_those_of_one_process_on_every_rank() -> None:
    module = model_of()
    give_gradients(module)
    expected = float(nn.utils.get_total_norm([each.grad for each in module.parameters() if each.grad is not None]))
    ranks = run_ranks(_norms, 4, timeout=120)
    assert len(ranks[0]) == len(SOME_SPLITS)
    for found in ranks:
        for each in found:
            # float32: sums of squares, in another order
            assert each["norm"] == pytest.approx(expected, rel=1e-6), each
            assert each["returned"] == each["norm"]
            assert each["clipped"] == pytest.approx(0.5, rel=1e-5), each
            assert each["ratio"] == pytest.approx((0.5 / expected, 0.5 / expected), rel=1e-5), each
            assert each["kept"]
    for each in zip(*ranks, strict=True):
        assert len({found["norm"] for found in each}) == 1  # to the bit: all ranks scale alike


@pytest.mark.distributed
def test_all_ranks_see_what_is_not_finite_on_one() -> None:
    for found in run_ranks(_norms, 2, timeout=120):
        for each in found:
            infinite, not_a_number = each["bad"]
            assert infinite == torch.inf
            assert not_a_number != not_a_number


def test_one_process_clips_as_torch_does() -> None:
    ours, theirs = model_of(), model_of()
    give_gradients(ours)
    give_gradients(theirs)
    norm = clip_grad_norm(ours.parameters(), 0.3, MoETopology())
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
    torch.testing.assert_close(norm.float(), expected)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_parameters_without_gradients_count_nothing() -> None:
    module = model_of()
    assert float(grad_norm(module.parameters(), MoETopology())) == 0
    assert float(clip_grad_norm(module.parameters(), 1.0, MoETopology())) == 0


def test_norm_of_narrow_gradients_is_wide() -> None:
    parameter: Tensor = nn.Parameter(torch.zeros(300, dtype=torch.bfloat16))
    parameter.grad = torch.full((300,), 3.0, dtype=torch.bfloat16)
    assert not isinstance(parameter, DTensor)
    norm = grad_norm([parameter], MoETopology())
    assert norm.dtype in (torch.float32, torch.float64)
    assert float(norm) == pytest.approx(
        300**0.5 * 3, rel=4e-3
    )  # torch rounds the norm of a bfloat16 tensor to bfloat16
