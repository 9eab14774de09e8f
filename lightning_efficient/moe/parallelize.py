"""Spreading the MoE layers of a model over the ranks."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from lightning_efficient.moe.agreement import broadcast_weights
from lightning_efficient.moe.inputs import InputCheck
from lightning_efficient.moe.layer import FixedSchedule, MoELayer, Scheduler, moe_layers
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
    """Spread the experts of all MoE layers in a module, on all ranks together.

    Experts are those of rank 0, whatever others have drawn. On the meta device they stay without memory; draw them
    later, with random numbers that all ranks have in common. A module that was spread before, in groups of the same
    sizes, joins the new groups as it is; layers that are in these groups already are left alone.

    Args:
        module: with :class:`MoELayer` in it, or one itself; changed in place.
        topology: the groups.
        scheduler: decides how the layers communicate; default: ``s1_hier``.
        check_counts: compare the numbers of tokens of all ranks at the first layer, in each forward.
        verify_inputs: compare the tokens of each MP group at every layer, in each forward: for debugging.

    Returns:
        The names of the layers.

    Raises:
        ValueError: the sizes do not divide the experts of a layer, or it was spread in groups of other sizes; no layer
            has been changed.
    """
    layers = list(moe_layers(module))
    for name, layer in layers:
        topology.sizes.check_experts(layer.experts.num_experts, layer.experts.hidden, where=_called(name))
        if _is_spread(layer) and layer.topology.sizes != topology.sizes:
            raise ValueError(
                f"{_called(name)} was spread over ranks by {layer.topology.sizes}, and is to be by {topology.sizes}: "
                "a part of an expert cannot become another part. Build the module anew, and load a checkpoint."
            )
    for number, (name, layer) in enumerate(layers):
        if layer.topology is topology:
            continue
        if not _is_spread(layer):
            broadcast_weights(layer.experts, topology)
            layer.experts.shard(topology)
        layer.topology = topology
        layer.scheduler = scheduler or FixedSchedule(SCHEDULES["s1_hier"])
        checked = verify_inputs or (check_counts and number == 0)
        layer.check = InputCheck(_called(name), topology, values=verify_inputs) if checked else None
    return [name for name, _ in layers]


def _is_spread(layer: MoELayer) -> bool:
    return isinstance(layer.experts.w_in, DTensor)


def _called(name: str) -> str:
    return f"MoE layer {name!r}" if name else "the MoE layer"
