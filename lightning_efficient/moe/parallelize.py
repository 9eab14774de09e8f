"""Spreading the MoE layers of a model over the ranks."""

from __future__ import annotations

from torch import nn

from lightning_efficient.moe.inputs import InputCheck
from lightning_efficient.moe.layer import FixedSchedule, Scheduler, moe_layers
from lightning_efficient.moe.schedule import SCHEDULES
from lightning_efficient.moe.topology import MoETopology


def parallelize(
    module: nn.Module,
    topology: MoETopology,
    *,
    scheduler: Scheduler | None = None,
    check_counts: bool = True,
    verify_inputs: bool = False,
) -> list[str]:
    """Spread the experts of all MoE layers in a module, which must be equal on all ranks.

    Args:
        module: with :class:`MoELayer` in it, or one itself; changed in place.
        topology: the groups.
        scheduler: decides how the layers communicate; default: ``s1_hier``.
        check_counts: compare the numbers of tokens of all ranks at the first layer, in each forward.
        verify_inputs: compare the tokens of each MP group at every layer, in each forward: for debugging.

    Returns:
        The names of the layers.

    Raises:
        ValueError: the sizes do not divide the experts of a layer; no layer has been changed.
    """
    layers = list(moe_layers(module))
    for name, layer in layers:
        topology.sizes.check_experts(layer.experts.num_experts, layer.experts.hidden, where=_called(name))
    for number, (name, layer) in enumerate(layers):
        layer.experts.shard(topology)
        layer.topology = topology
        layer.scheduler = scheduler or FixedSchedule(SCHEDULES["s1_hier"])
        if verify_inputs or (check_counts and number == 0):
            layer.check = InputCheck(_called(name), topology, values=verify_inputs)
    return [name for name, _ in layers]


def _called(name: str) -> str:
    return f"MoE layer {name!r}" if name else "the MoE layer"
