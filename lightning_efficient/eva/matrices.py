"""Weights, gradients and momentum buffers seen as matrices, without a copy where their memory allows it.

Dimension letters: K groups, O outputs of a group, D inputs of an output.
"""

import torch
from torch import Tensor


def is_channels_last(weight: Tensor) -> bool:
    """Whether the memory runs over the channels (dimension 1) first, and no plainer order fits."""
    return weight.ndim > 2 and not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()


def as_matrices(tensor: Tensor, groups: int, *, channels_last: bool) -> Tensor:
    """View a weight-shaped tensor as (O, D), or (K, O, D) with groups; a copy where its memory is laid out otherwise.

    Args:
        tensor: (K * O, ...).
        groups: K.
        channels_last: the order of D, which must be one for all tensors of a layer.
    """
    ordered = tensor.movedim(1, -1) if channels_last else tensor
    return ordered.flatten(1) if groups == 1 else ordered.reshape(groups, tensor.shape[0] // groups, -1)


def in_memory_order(a: Tensor, weight: Tensor, groups: int, *, channels_last: bool) -> Tensor:
    """Bring an input vector, flat in the order of ``weight[0]``, into the order of :func:`as_matrices`.

    Returns:
        (D,), or (K, D) with groups.
    """
    if channels_last:
        a = a.view(groups, *weight.shape[1:]).movedim(1, -1).reshape(-1)
    return a if groups == 1 else a.view(groups, -1)


def rows_in_memory_order(rows: Tensor, weight: Tensor, *, channels_last: bool) -> Tensor:
    """Bring rows (R, D), each in the order of ``weight[0]``, into the order of :func:`as_matrices` without groups."""
    if not channels_last:
        return rows
    return rows.view(-1, *weight.shape[1:]).movedim(1, -1).reshape(rows.shape)


def rows_in_weight_order(rows: Tensor, weight: Tensor, *, channels_last: bool) -> Tensor:
    """Undo :func:`rows_in_memory_order`."""
    if not channels_last:
        return rows
    return rows.view(-1, *weight.shape[2:], weight.shape[1]).movedim(-1, 1).reshape(rows.shape)


def has_matrix_view(weight: Tensor) -> bool:
    """Whether :func:`as_matrices` is a view of this weight, so that it can be updated in place."""
    return weight.ndim == 2 or weight.is_contiguous() or is_channels_last(weight)


def new_buffer(weight: Tensor) -> Tensor:
    """Zeros in the shape, type and memory order of ``weight``."""
    return torch.zeros_like(weight, memory_format=torch.preserve_format)
