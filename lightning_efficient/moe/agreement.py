"""What ranks must have in common before they start: weights, buffers, and random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_efficient.moe.experts import local
from lightning_efficient.moe.topology import Axis, Group, MoETopology

T = TypeVar("T")


@torch.no_grad()
def broadcast_weights(module: nn.Module, topology: MoETopology) -> int:
    """Give all ranks the weights and buffers of the first that holds the same part, on all ranks together.

    Those that are equal already are not sent. Experts follow the first of their EDP group, other tensors rank 0, and
    those that tensor parallelism has cut the first of their DP group. What has no memory yet is left out.

    Args:
        module: built alike on all ranks.
        topology: the groups.

    Returns:
        How many tensors this rank took part in sending.
    """
    by_group: dict[tuple[Axis, int], tuple[Group, list[Tensor]]] = {}
    for each in (*module.parameters(), *module.buffers()):
        for order, group in enumerate(_groups_with_same_part(each, topology)):
            if group.size > 1 and not each.is_meta:
                # What is whole on an ESP group is agreed on there first.
                by_group.setdefault((group.axis, order), (group, []))[1].append(local(each.detach()))
    return sum(_broadcast(tensors, group, topology) for group, tensors in by_group.values())


def _groups_with_same_part(tensor: Tensor, topology: MoETopology) -> list[Group]:
    if not isinstance(tensor, DTensor):
        return [topology.world]
    names = tensor.device_mesh.mesh_dim_names or ()
    if "edp" in names:
        whole_on_esp = isinstance(tensor.placements[names.index("esp")], Replicate)
        return [topology.esp, topology.edp] if whole_on_esp else [topology.edp]
    if "data_parallel" in names:
        return []  # FSDP2 has cut it from one weight
    cut = any(isinstance(placement, Shard) for placement in tensor.placements)
    return [topology.dp if cut else topology.world]


def _broadcast(tensors: list[Tensor], group: Group, topology: MoETopology) -> int:
    device = torch.device("cpu" if topology.mesh is None else topology.mesh.device_type)
    sums = torch.stack([_checksum(each) for each in tensors]).to(device)
    extremes = torch.cat((sums, -sums))
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group.process_group)
    most, negative_least = extremes.cpu().chunk(2)
    differ = [each for each, same in zip(tensors, most == -negative_least, strict=True) if not same.all()]
    for each in differ:
        sent = each.to(device).contiguous()  # NCCL cannot send what is still on the CPU
        dist.broadcast(sent, src=_first(group), group=group.process_group)
        each.copy_(sent)
    return len(differ)


def _checksum(tensor: Tensor) -> Tensor:
    """Two sums; different draws and orders give different ones, and NaN is never equal."""
    flat = tensor.flatten()
    wide = torch.complex128 if flat.is_complex() else torch.float64
    sums = torch.stack((flat.sum(dtype=wide), flat[::3].sum(dtype=wide)))
    return torch.view_as_real(sums).flatten() if sums.is_complex() else torch.cat((sums, torch.zeros_like(sums)))


def every_rank_has(number: int, group: Group) -> list[int]:
    """Return what each rank of a group has, on all of them together."""
    if group.size == 1:
        return [number]
    numbers: list[Any] = [None] * group.size
    dist.all_gather_object(numbers, number, group=group.process_group)
    return numbers


def from_first(value: T, group: Group) -> T:
    """Return what the first rank of a group has.

    Args:
        value: of this rank; it can be pickled.
        group: whose ranks all call it.
    """
    if group.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=_first(group), group=group.process_group)
    return values[0]


def share_random_state(group: Group) -> None:
    """Give all ranks of a group the state of torch's global generators, CPU and current GPU, of its first.

    Args:
        group: whose ranks all call it.
    """
    if group.size == 1:
        return
    devices = _gpu()
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    dist.broadcast_object_list(states, src=_first(group), group=group.process_group)
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def random_state_of_first(group: Group) -> Iterator[None]:
    """Draw the numbers that the first rank of a group draws, and afterwards go on with the own.

    Args:
        group: whose ranks all enter it.
    """
    with torch.random.fork_rng(devices=_gpu(), enabled=group.rank > 0):
        share_random_state(group)
        yield


def _gpu() -> list[int]:
    """The GPU of this rank, if it works on one."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def _first(group: Group) -> int:
    assert group.process_group is not None
    return dist.get_global_rank(group.process_group, 0)
