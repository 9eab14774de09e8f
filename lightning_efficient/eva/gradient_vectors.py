"""Eva-s: the vectors of a tensor are means of its gradient, one for each axis.

Dimension letters: O outputs (the first axis); D entries per output, in the order of the remaining axes.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class AxisMeans(NamedTuple):
    """Means of a tensor over all axes but one.

    Attributes:
        first_O: over all axes but the first.
        others: the same for each other axis, one after another, (sum of their sizes,).
    """

    first_O: Tensor
    others: Tensor


def axis_means(grad: Tensor, dtype: torch.dtype) -> AxisMeans:
    """Return the means of ``grad``, of two axes or more, over all axes but one, for each axis.

    Args:
        grad: of any order from 2 on.
        dtype: of the means.
    """
    first_O = grad.mean(dim=tuple(range(1, grad.ndim)), dtype=dtype)
    slice_mean = grad.mean(dim=0, dtype=dtype)
    axes = range(slice_mean.ndim)
    others = [
        slice_mean.mean(dim=[other for other in axes if other != axis]) if len(axes) > 1 else slice_mean
        for axis in axes
    ]
    return AxisMeans(first_O, torch.cat(others))


def outer_of_axes(others: Tensor, shape: torch.Size) -> Tensor:
    """Return the outer product of the vectors of all axes but the first, flat: the input-side vector, (D,).

    Args:
        others: of :class:`AxisMeans`.
        shape: of the tensor that the means belong to.
    """
    first, *rest = others.split(list(shape[1:]))
    product: Tensor = first
    for vector in rest:
        product = torch.outer(product, vector).flatten()
    return product
