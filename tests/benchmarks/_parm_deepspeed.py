"""DeepSpeed's own mixture-of-experts layer, run over gloo as its users run it: the peer of our layers.

Experts are Megatron's: a column-parallel linear, an activation, a row-parallel linear, each expert with an all-reduce
of its own forward and, overlapped with the weight's gradient, backward. To install it:
`pip install -c constraints.txt -e '.[deepspeed]'`.

Two things keep DeepSpeed 0.19.8 from running like this on CPUs; both are set aside here, and neither costs it time:

- Its backend compiles a C++ operator when it starts, which only inference uses (an all-reduce in shared memory). The
  build needs a compiler, and hangs on the lock that a killed build left behind.
- `gather_tokens` all-gathers an N-dimensional tensor into a flat one. NCCL takes that, gloo refuses it.

Dimension letters: S tokens, M model size, E experts, H hidden size of an expert.
"""

import importlib
import importlib.metadata
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_efficient.moe.topology import Group, MoETopology

VERSION = "0.19.8"


def why_no_deepspeed() -> str | None:
    """Return why the peer cannot run, or None."""
    install = "pip install -c constraints.txt -e '.[deepspeed]'"
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return f"DeepSpeed is not installed: {install}"
    return None if found == VERSION else f"DeepSpeed {found} is not {VERSION}, which the patches are for: {install}"


def deepspeed_can(topology: MoETopology) -> bool:
    """Whether DeepSpeed has such groups: it cuts experts among the ranks of an MP group, or not at all."""
    sizes = topology.sizes
    return sizes.expert_sharding in (1, sizes.model_parallel)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of a whole layer, not of a rank.

    Attributes:
        gate: of the router, (E, M).
        up: into the hidden size, (E, M, H).
        down: back, (E, H, M).
    """

    gate: Tensor
    up: Tensor
    down: Tensor


class DeepSpeedMoE:
    """DeepSpeed's layer on the ranks of a topology; one topology at a time in a process.

    Args:
        topology: its groups; see `deepspeed_can`.
        weights: of the whole layer.
        top_k: experts per token.
        capacity_factor: f.
    """

    def __init__(self, topology: MoETopology, weights: LayerWeights, *, top_k: int, capacity_factor: float) -> None:
        _start(topology)
        from deepspeed.moe.layer import MoE

        E, M, H = weights.up.shape
        cut = topology.esp.size > 1
        self.module = MoE(
            M,
            _Expert(M, H, topology.esp),
            num_experts=E,
            ep_size=topology.ep.size,
            k=top_k,
            capacity_factor=capacity_factor,
            drop_tokens=True,
            use_rts=False,  # it drops tokens at random
            use_tutel=False,
            enable_expert_tensor_parallelism=cut,
            top2_2nd_expert_sampling=False,  # it chooses the second expert at random
        )
        self.module.set_deepspeed_parallelism()
        self._load(weights, topology)

    def __call__(self, x_SM: Tensor) -> Tensor:
        """Return the layer's output, (S, M)."""
        out: Tensor = self.module(x_SM)[0]
        return out

    @torch.no_grad()
    def _load(self, weights: LayerWeights, topology: MoETopology) -> None:
        inner = self.module.deepspeed_moe
        inner.gate.wg.weight.copy_(weights.gate)
        experts = inner.experts.deepspeed_experts
        up_EMH = weights.up.chunk(topology.esp.size, dim=2)[topology.esp.rank]
        down_EHM = weights.down.chunk(topology.esp.size, dim=1)[topology.esp.rank]
        first = topology.ep.rank * len(experts)
        for expert, up_MH, down_HM in zip(experts, up_EMH[first:], down_EHM[first:], strict=False):
            expert.up_HM.copy_(up_MH.T)
            expert.down_MH.copy_(down_HM.T)


class _Expert(nn.Module):
    """Two linears, the hidden size cut over a group."""

    def __init__(self, M: int, H: int, group: Group) -> None:
        super().__init__()
        self.group = group
        self.up_HM = nn.Parameter(torch.empty(H // group.size, M))
        self.down_MH = nn.Parameter(torch.empty(M, H // group.size))

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.group.size == 1:
            return F.linear(F.gelu(F.linear(x, self.up_HM)), self.down_MH)
        hidden: Tensor = _ColumnParallel.apply(x, self.up_HM, self.group)  # type: ignore[no-untyped-call]
        out: Tensor = _Reduce.apply(F.linear(F.gelu(hidden), self.down_MH), self.group)  # type: ignore[no-untyped-call]
        return out

    def __deepcopy__(self, memo: Any) -> "_Expert":
        M, H = self.down_MH.shape  # DeepSpeed copies the expert, and groups of ranks cannot be copied
        return _Expert(M, H * self.group.size, self.group)


class _ColumnParallel(torch.autograd.Function):
    """Linear whose input is replicated: its gradient is summed while the weight's is computed, as in Megatron."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Group) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return F.linear(x, weight)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        d_x = grad @ weight
        work = dist.all_reduce(d_x, group=ctx.group.process_group, async_op=True)
        d_weight = grad.T @ x.reshape(-1, weight.shape[1])
        work.wait()
        return d_x.view(x.shape), d_weight, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        x = x.contiguous()
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group.process_group)
        return x

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


@dataclass(frozen=True, slots=True)
class _ModelParallel:
    """What DeepSpeed calls an mpu: the MP and data-parallel groups of its user."""

    mp: Group
    dp: Group

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.mp.size

    def get_tensor_model_parallel_rank(self) -> int:
        return self.mp.rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.mp.process_group

    def get_data_parallel_world_size(self) -> int:
        return self.dp.size

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


def _start(topology: MoETopology) -> None:
    """Let DeepSpeed use the process group that there is, and the topology's groups."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    if comm.cdb is None:
        # Imported by name: the attribute `torch` of `deepspeed.comm` is torch itself.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
        deepspeed.init_distributed("gloo", verbose=False)
        comm.cdb.all_gather_function = _all_gather_flat
    mpu = _ModelParallel(topology.mp, topology.dp) if topology.mp.size > 1 else None
    if mpu != groups.mpu:
        # Groups are kept by their size alone, so those of another topology must go.
        groups._release_process_group_references()
        groups.mpu = mpu


def _all_gather_flat(
    output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup | None, async_op: bool
) -> Any:
    return dist.all_gather_single(output_tensor, input_tensor.view(-1), group=group, async_op=async_op)
