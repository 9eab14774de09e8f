"""Are the model's replicas the same? Asked once before training, and from time to time while it runs."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def check_same_parameters(
    named_parameters: Sequence[tuple[str, Tensor]], process_group: dist.ProcessGroup | None = None
) -> None:
    """Check that every rank has the same trainable parameters, in the same order. A collective.

    Raises:
        RuntimeError: on every rank, naming the first parameter that differs and the ranks.
    """
    mine = [f"{name}: {str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}" for name, p in named_parameters]
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size(process_group))]
    dist.all_gather_object(everyone, mine, group=process_group)
    for rank, theirs in enumerate(everyone):
        if theirs == everyone[0]:
            continue
        pairs = zip(_padded(everyone[0], len(theirs)), _padded(theirs, len(everyone[0])), strict=True)
        ours, other = next((a, b) for a, b in pairs if a != b)
        raise RuntimeError(
            f"the trainable parameters differ across ranks: rank 0 has [{ours}] where rank {rank} has [{other}]. "
            "Build and freeze the model in the same way on every rank."
        )


def check_replicas(
    named_parameters: Iterable[tuple[str, Tensor]], process_group: dist.ProcessGroup | None = None, *, step: int
) -> None:
    """Check that every rank holds bit-identical parameters. A collective of two small all-reduces.

    Args:
        named_parameters: the same parameters in the same order on every rank.
        process_group: the ranks to compare; None means all.
        step: named in the error.

    Raises:
        RuntimeError: on every rank, naming the first parameter that differs and the largest difference.
    """
    named = list(named_parameters)
    if not named:
        return
    sums = torch.stack([_checksum(p) for _, p in named])
    extremes = torch.stack((sums, -sums))
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=process_group)
    differs = (extremes[0] != -extremes[1]).nonzero()
    if differs.numel():
        name, parameter = named[int(differs[0])]
        reference = parameter.detach().clone()
        dist.broadcast(reference, group_src=0, group=process_group)
        gap = (parameter.detach().double() - reference.double()).abs().max()
        dist.all_reduce(gap, op=dist.ReduceOp.MAX, group=process_group)
        raise RuntimeError(
            f"the replicas have drifted apart at step {step}: {name} differs by up to {float(gap):.3g} between ranks "
            f"({len(differs)} of {len(named)} parameters differ). Look for rank-dependent randomness, parameters "
            "changed outside the optimizer, or ranks on different hardware."
        )


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksum(parameter: Tensor) -> Tensor:
    """Sum of the parameter's bit patterns read as integers: exact, in any order, without a copy."""
    if parameter.is_complex():
        parameter = torch.view_as_real(parameter)
    return parameter.detach().view(_INTEGERS[parameter.element_size()]).sum(dtype=torch.int64)


def _padded(items: list[str], length: int) -> list[str]:
    return items + ["nothing"] * (length - len(items))
