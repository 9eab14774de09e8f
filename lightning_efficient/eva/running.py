"""Running averages of Kronecker vectors that need no look at the device: NaN marks what has no value yet.

Dimension letters: A entries of all vectors, one after another.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_efficient.eva.layers import Layer


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
    """Where the averages of many layers live: in the optimizer's state, one entry for each layer and kind.

    The entries are views of one flat tensor, which the next step finds again, unless a checkpoint or a move to another
    device has replaced them.

    Args:
        layers: of the states that the methods are given, in their order.
        kinds: of the averages, in the flat order: the key in a state, and the number of entries of each layer.
        dtype: of the averages.
        device: of the averages.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        kinds: Mapping[str, Sequence[int]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._layers, self._kinds = layers, kinds
        self._sizes = [size for sizes in kinds.values() for size in sizes]
        self._dtype, self._device = dtype, device
        self._flat = torch.empty(0)
        self._views: Sequence[Tensor] = ()

    def gather(self, states: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return all averages, flat; NaN where there is none.

        Raises:
            ValueError: an entry belongs to a layer of another size.
        """
        found = [state.get(kind) for kind in self._kinds for state in states]
        if len(self._views) == len(found) and all(map(operator.is_, found, self._views)):
            return self._flat
        self._check(states)
        missing = [torch.full((size,), torch.nan, dtype=self._dtype, device=self._device) for size in self._sizes]
        return torch.cat(
            [
                none if value is None else value.to(self._device, self._dtype).view(-1)
                for value, none in zip(found, missing, strict=True)
            ]
        )

    def scatter(self, states: Sequence[dict[str, Any]], flat: Tensor) -> None:
        """Make ``flat`` the averages."""
        self._flat, self._views = flat, flat.split(self._sizes)
        views = iter(self._views)
        for kind in self._kinds:
            for state in states:
                state[kind] = next(views)

    def _check(self, states: Sequence[Mapping[str, Any]]) -> None:
        for index, (layer, state) in enumerate(zip(self._layers, states, strict=True)):
            for kind, sizes in self._kinds.items():
                if kind in state and state[kind].numel() != sizes[index]:
                    raise ValueError(
                        f"The state of layer {layer.name!r} has {kind} of {state[kind].numel()} entries, but its "
                        f"weight of shape {tuple(layer.weight.shape)} needs {sizes[index]}: the checkpoint is of "
                        "another model. Load the one of this model."
                    )
