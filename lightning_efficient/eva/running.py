"""Running averages of Kronecker vectors that need no look at the device: NaN marks what has no value yet.

Dimension letters: A entries of all vectors, one after another.
"""

import operator
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn


def running_average(old_A: Tensor, new_A: Tensor, *, new_weight: float | Literal["sum"], accept: Tensor) -> Tensor:
    """Average ``new_A`` into ``old_A``.

    The first value of an entry is taken as it is. A NaN in ``new_A`` (a layer without use) leaves its entry alone.

    Args:
        old_A: averages; NaN where there was no value yet.
        new_A: new values.
        new_weight: weight of the new value, in (0, 1]; ``"sum"``: values are added up.
        accept: whether the new values count at all, a bool scalar.

    Returns:
        The new averages, (A,).
    """
    mixed_A = old_A + new_A if new_weight == "sum" else torch.lerp(old_A, new_A, new_weight)
    mixed_A = torch.where(old_A.isnan(), new_A, mixed_A)
    return torch.where(accept & ~new_A.isnan(), mixed_A, old_A)


class RunningVectors:
    """Where the averages of many weights live: in the optimizer's state, one entry for each weight and kind.

    The entries are views of one flat tensor, which the next step finds again, unless a checkpoint or a move to another
    device has replaced them.

    Args:
        entries: the weight, the key in its state, the number of entries and the layer's name, in the flat order.
        dtype: of the averages.
        device: of the averages.
    """

    def __init__(
        self, entries: Sequence[tuple[nn.Parameter, str, int, str]], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._entries = list(entries)
        self._sizes = [size for _, _, size, _ in entries]
        self._dtype, self._device = dtype, device
        self._flat = torch.empty(0)
        self._views: Sequence[Tensor] = ()

    def gather(self, state: Mapping[Tensor, dict[str, Any]]) -> Tensor:
        """Return all averages, flat; NaN where there is none.

        Raises:
            ValueError: an entry belongs to a layer of another size.
        """
        found = [state[weight].get(key) if weight in state else None for weight, key, _, _ in self._entries]
        if len(self._views) == len(found) and all(map(operator.is_, found, self._views)):
            return self._flat
        for value, (weight, key, size, name) in zip(found, self._entries, strict=True):
            if value is not None and value.numel() != size:
                raise ValueError(
                    f"The state of layer {name!r} has {key} of {value.numel()} entries, but its weight of shape "
                    f"{tuple(weight.shape)} needs {size}: the checkpoint is of another model. Load the one of this."
                )
        missing = [torch.full((size,), torch.nan, dtype=self._dtype, device=self._device) for size in self._sizes]
        return torch.cat(
            [
                none if value is None else value.to(self._device, self._dtype).view(-1)
                for value, none in zip(found, missing, strict=True)
            ]
        )

    def scatter(self, state: MutableMapping[Tensor, dict[str, Any]], flat: Tensor) -> None:
        """Make ``flat`` the averages."""
        self._flat, self._views = flat, flat.split(self._sizes)
        for view, (weight, key, _, _) in zip(self._views, self._entries, strict=True):
            state[weight][key] = view
