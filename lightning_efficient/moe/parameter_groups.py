"""Groups of parameters for optimizers that step over many tensors at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def parameter_groups(
    parameters: nn.Module | Iterable[Tensor] | Iterable[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return parameters in groups in which all are of one kind: experts of MoE layers apart from the rest.

    Once experts are spread, their weights are DTensors. Optimizers with ``foreach=True`` or ``fused=True`` take no
    group in which DTensors and plain tensors are mixed.

    Args:
        parameters: a module, its parameters, or groups of them with options, as optimizers take them.

    Returns:
        Groups with the options of those that they come from, in their order.
    """
    given: list[Any] = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
    split: list[dict[str, Any]] = []
    for group in groups:
        options = {name: value for name, value in group.items() if name != "params"}
        kinds: dict[Any, list[Tensor]] = {}
        params = group["params"]
        for each in [params] if isinstance(params, Tensor) else params:
            kinds.setdefault(kind_of(each), []).append(each)
        split.extend({**options, "params": each} for each in kinds.values())
    return split


def kind_of(parameter: Tensor) -> Any:
    """Return what the parameters of a group must have in common: the mesh of DTensors, None for plain tensors."""
    return parameter.device_mesh if isinstance(parameter, DTensor) else None
