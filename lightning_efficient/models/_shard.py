"""Sharding a model over ranks with FSDP2, where Lightning's `ModelParallelStrategy` asks the module to do it."""

from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from lightning_efficient.models.llama import Llama, SwiGLU
from lightning_efficient.strategies import ParmStrategy


def shard_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    mesh: DeviceMesh | None,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Shard parameters, gradients and optimizer state over the data-parallel ranks, block by block; once.

    Args:
        model: the root, whose own parameters are a unit of their own.
        blocks: parts that are gathered one at a time.
        mesh: of the ranks, with a dimension ``data_parallel``; ``None`` outside of ``ModelParallelStrategy``.
        reshard_after_forward: drop a block's gathered parameters after its forward, and gather them again in backward
            (ZeRO-3); or keep them until backward has passed (ZeRO-2 in what is held, and a third less communication).
        cpu_offload: keep parameters, gradients and optimizer state in the host's memory.

    Raises:
        ValueError: ``cpu_offload`` without a GPU, without a mesh, or with tensor-parallel ranks.
    """
    if mesh is None:
        if cpu_offload:
            raise ValueError(
                "cpu_offload is set, but the strategy does not shard: only FSDP2 moves parameters to the host here. "
                "Set trainer.strategy to ModelParallelStrategy, or cpu_offload to false."
            )
        return
    if cpu_offload and mesh.device_type != "cuda":
        raise ValueError(
            f"cpu_offload is set, but training runs on {mesh.device_type}: there is no device memory to free. Train on "
            "GPUs, or set cpu_offload to false."
        )
    if "tensor_parallel" in (mesh.mesh_dim_names or ()) and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"The mesh has {mesh['tensor_parallel'].size()} tensor-parallel ranks: this model is sharded by FSDP2 "
            "alone. Set the strategy's tensor_parallel_size to 1 and its data_parallel_size to the number of devices."
        )
    if isinstance(model, FSDPModule):
        return
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for block in blocks:
        fully_shard(
            block, mesh=mesh["data_parallel"], reshard_after_forward=reshard_after_forward, offload_policy=offload
        )
    # Of what is in no block; kept after forward anyway, as backward begins with it.
    fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=False, offload_policy=offload)


def parm_strategy(module: LightningModule) -> ParmStrategy | None:
    """Return the Trainer's strategy if it spreads experts and syncs all gradients itself."""
    try:
        strategy = module.trainer.strategy
    except RuntimeError:  # there is no Trainer
        return None
    return strategy if isinstance(strategy, ParmStrategy) else None


def shard_heads(model: Llama, mesh: DeviceMesh) -> None:
    """Spread the heads of attention, and the hidden units of plain feed-forward nets, over ranks; once.

    Each rank keeps the whole of what is between them: embedding, norms, residuals and head. All ranks must hold equal
    weights, and get equal token ids.

    Args:
        model: changed in place.
        mesh: of the ranks, of one dimension.

    Raises:
        ValueError: the ranks cannot get equally many heads or units; nothing is changed.
    """
    config, ranks = model.config, mesh.size()
    sizes = {"num_heads": config.num_heads, "num_kv_heads": config.kv_heads}
    if any(isinstance(layer.mlp, SwiGLU) for layer in model.model.layers):
        sizes["ffn_size"] = config.ffn_size
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(
                f"{name} is {size}, not divisible by the {ranks} model-parallel ranks: each gets an equal part of "
                f"the layer. Change {name} or model_parallel_size, or set the model's tensor_parallel to false."
            )
    if isinstance(model.model.layers[0].get_parameter("self_attn.q_proj.weight"), DTensor):
        return
    for layer in model.model.layers:
        first = [f"self_attn.{name}_proj" for name in "qkv"]
        last = ["self_attn.o_proj"]
        if isinstance(layer.mlp, SwiGLU):
            first += ["mlp.gate_proj", "mlp.up_proj"]
            last += ["mlp.down_proj"]
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in first}
        plan |= {name: RowwiseParallel() for name in last}
        parallelize_module(layer, mesh, plan)


def training_device(module: LightningModule) -> torch.device:
    """Return the device of the Trainer's strategy, or the default device of torch where there is no Trainer."""
    try:
        return module.trainer.strategy.root_device
    except RuntimeError:
        return torch.get_default_device()


def fill_on_device(model: Llama, device: torch.device) -> None:
    """Give a model that was built without memory its weights: on ``device``, in the type that is torch's default."""
    model.to(torch.get_default_dtype()).to_empty(device=device)
    with torch.device(device):
        model.reset_parameters()
