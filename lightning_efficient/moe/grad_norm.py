"""The norm of all gradients, of which ranks hold different parts, and clipping by it and by value."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lightning_efficient.moe.experts import local
from lightning_efficient.moe.topology import MoETopology


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor], topology: MoETopology) -> Tensor:
    r"""Return the 2-norm of all gradients, the same on all ranks.

    .. math:: \|g\|^2 = \sum_p \sum_r \frac{n_p}{P} \|g_p^{(r)}\|^2

    where parameter p is cut into :math:`n_p` parts, each of which :math:`P / n_p` of the P ranks hold: one all-reduce
    of one number. An infinity or NaN on one rank is one on all.

    Args:
        parameters: whose ``.grad`` counts, after they were synced.
        topology: the groups.

    Returns:
        A scalar, float32 or wider.
    """
    parameters = list(parameters)
    grads = [(each.grad, _parts(each)) for each in parameters if each.grad is not None]
    device = local(parameters[0]).device if parameters else torch.device("cpu")
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for parts in sorted({parts for _, parts in grads}):
        norms = torch.nn.utils.get_total_norm([local(grad) for grad, of in grads if of == parts])
        squares += norms.double().square() * (parts / topology.world_size)
    if topology.world.size > 1:
        dist.all_reduce(squares, group=topology.world.process_group)
    return squares.sqrt()


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, topology: MoETopology) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``, alike on all ranks.

    Args:
        parameters: whose ``.grad`` is scaled.
        max_norm: above 0.
        topology: the groups.

    Returns:
        The norm before.
    """
    parameters = list(parameters)
    norm = grad_norm(parameters, topology)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for each in parameters:
        if each.grad is not None:
            grad = local(each.grad)
            grad.mul_(scale.to(grad.device, grad.dtype))
    return norm


@torch.no_grad()
def clip_grad_value(parameters: Iterable[Tensor], max_value: float) -> None:
    """Bring all elements of the gradients to between ``-max_value`` and ``max_value``.

    As ``torch.nn.utils.clip_grad_value_``, which refuses experts and other parameters together.

    Args:
        parameters: whose ``.grad`` is changed.
        max_value: above 0.
    """
    for each in parameters:
        if each.grad is not None:
            local(each.grad).clamp_(-max_value, max_value)


def _parts(parameter: Tensor) -> int:
    """Return into how many parts a parameter is cut."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(
        mesh.size(dim) for dim, placement in enumerate(parameter.placements) if isinstance(placement, Shard)
    )
