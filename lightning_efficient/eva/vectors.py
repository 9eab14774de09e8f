"""The Kronecker vectors of one layer: the sum of its inputs and the sum of its output gradients, over rows.

A row is what one application of the weight matrix sees: for ``Linear`` each vector of the leading dimensions, for a
convolution each output position of each sample, whose input is the patch under the kernel.

Dimension letters: N samples, T rows of a sample, D weight entries per output (of one group), K groups, C channels,
O outputs.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose vectors are known, with their subclasses."""

ConvAxis = tuple[int, int, int, int, int, int, str]
"""Size, kernel, stride, padding before, padding after, dilation and padding mode along one axis of a convolution."""

Taps = Callable[[tuple[ConvAxis, ...], torch.device, torch.dtype], Tensor]

_LARGEST_TAPS = 2**20


def groups_of(module: nn.Module) -> int:
    """Return the number of independent weight blocks, K: the groups of a convolution, 1 for ``Linear``."""
    return module.groups if isinstance(module, nn.modules.conv._ConvNd) else 1


def input_sum(module: nn.Module, x: Tensor, *, samples: int | None, dtype: torch.dtype, taps: Taps) -> Tensor:
    """Sum the layer's inputs over the rows of the first samples.

    Args:
        module: a layer of :data:`SUPPORTED`.
        x: its input; a missing batch dimension is one sample.
        samples: how many samples count; ``None``: all.
        dtype: of the sum.
        taps: :func:`conv_taps`, or a cached form of it.

    Returns:
        (K, D), laid out as ``weight[0]`` of each group. Autocast must be off: it would round the products.
    """
    if isinstance(module, nn.Linear):
        return _rows(x, samples).sum(0, dtype=dtype).unsqueeze(0)
    assert isinstance(module, nn.modules.conv._ConvNd)
    if not _is_batched(module, x):
        x = x.unsqueeze(0)
    image = _sum_samples(x if samples is None else x[:samples], dtype)
    axes = [conv_axis(module, axis, size) for axis, size in enumerate(image.shape[1:])]
    return _sum_patches(image, axes, taps).reshape(module.groups, -1)


def _sum_patches(image: Tensor, axes: Sequence[ConvAxis], taps: Taps) -> Tensor:
    """Sum the patches of an image, (C, ...), over all positions of the kernel: (C, kernel entries).

    That is linear in the image: one matrix product where the matrix is small, else one along each axis.
    """
    if prod([axis[0] * axis[1] for axis in axes]) <= _LARGEST_TAPS:
        return (taps(tuple(axes), image.device, image.dtype) @ image.flatten(1).T).T
    for dim, axis in enumerate(axes, start=1):
        image = (image.movedim(dim, -1) @ taps((axis,), image.device, image.dtype).T).movedim(-1, dim)
    return image.flatten(1)


def _sum_samples(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype and x.is_contiguous():
        return (x.new_ones(len(x)) @ x.flatten(1)).view(x.shape[1:])  # up to three times as fast as sum(0)
    return x.sum(0, dtype=dtype)


def output_sum(module: nn.Module, dy: Tensor, *, samples: int | None, dtype: torch.dtype) -> Tensor:
    """Sum the gradients that arrive at the layer's output over the rows of the first samples.

    Over all samples of a mean loss this is the gradient of the bias.

    Args:
        module: a layer of :data:`SUPPORTED`.
        dy: the gradient, in the shape of the output.
        samples: how many samples count; ``None``: all.
        dtype: of the sum.

    Returns:
        (O,).
    """
    if isinstance(module, nn.Linear):
        return _rows(dy, samples).sum(0, dtype=dtype)
    batched = dy[:samples] if _is_batched(module, dy) else dy.unsqueeze(0)
    return batched.sum([0, *range(2, batched.ndim)], dtype=dtype)


def count_rows(module: nn.Module, output: Tensor, *, samples: int | None) -> tuple[int, float]:
    """Return the rows among the first samples, and all samples over those that count.

    Args:
        module: a layer of :data:`SUPPORTED`.
        output: what it returned.
        samples: how many samples count; ``None``: all.
    """
    spatial = 1 if isinstance(module, nn.Linear) else len(module.kernel_size)  # type: ignore[arg-type]
    channel = -1 if isinstance(module, nn.Linear) else -1 - spatial
    rows = output.numel() // output.shape[channel]
    all_samples = output.shape[0] if output.ndim > (1 if isinstance(module, nn.Linear) else 1 + spatial) else 1
    counted = all_samples if samples is None else min(samples, all_samples)
    if counted == 0:
        return 0, 1.0
    return rows * counted // all_samples, all_samples / counted


def _rows(x: Tensor, samples: int | None) -> Tensor:
    if x.ndim == 1:
        return x.unsqueeze(0)
    return (x if samples is None else x[:samples]).flatten(0, -2)


def _is_batched(module: nn.Module, x: Tensor) -> bool:
    return x.ndim == 2 + len(module.kernel_size)  # type: ignore[arg-type]


def conv_axis(module: nn.modules.conv._ConvNd, axis: int, size: int) -> ConvAxis:
    """Describe one axis of a convolution over an input of ``size`` along it."""
    kernel, dilation = module.kernel_size[axis], module.dilation[axis]
    if module.padding == "same":
        total = dilation * (kernel - 1)
        before, after = total // 2, total - total // 2
    elif module.padding == "valid":
        before = after = 0
    else:
        before = after = int(module.padding[axis])
    return size, kernel, module.stride[axis], before, after, dilation, module.padding_mode


def conv_taps(axes: Sequence[ConvAxis], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Count how often each input position lies under each tap of the kernel.

    Returns:
        (taps, positions): entry (i, h) is the number of output positions whose tap i reads input position h, both in
        row-major order of ``axes``. Times a flat image it is the sum, over output positions, of what each tap reads.
    """
    matrix = _axis_taps(axes[0], device, dtype)
    for axis in axes[1:]:
        matrix = torch.kron(matrix, _axis_taps(axis, device, dtype))
    return matrix


def _axis_taps(axis: ConvAxis, device: torch.device, dtype: torch.dtype) -> Tensor:
    size, kernel, stride, before, after, dilation, mode = axis
    positions = torch.arange(size, device=device)
    if mode == "zeros":
        padded = F.pad(positions, (before, after), value=-1)
    else:
        as_image = positions.to(torch.float64).view(1, 1, size)
        padded = F.pad(as_image, (before, after), mode=mode).flatten().to(torch.int64)
    starts = torch.arange(0, padded.numel() - dilation * (kernel - 1), stride, device=device)
    reads = padded[starts + dilation * torch.arange(kernel, device=device)[:, None]]
    return (reads[:, :, None] == positions).sum(1).to(dtype)
