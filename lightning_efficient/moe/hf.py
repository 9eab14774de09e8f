"""Mixture-of-experts models of transformers (extra ``hf``): their blocks replaced by ``MoELayer``, and back.

Transformers stacks a gate over an up matrix, (E, 2H, M). Cut in two along that dimension, one rank would get all
gates and the other all ups; here they lie side by side, (E, M, 2, H), and each rank gets a part of both.

Dimension letters: E experts, M model size, H hidden size of an expert, k experts of a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_efficient.moe.layer import MoELayer
from lightning_efficient.moe.router import DropPolicy, Normalize

BLOCKS = ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock")
"""Classes of transformers that can be replaced."""


def swap_moe_blocks(
    model: nn.Module,
    *,
    capacity_factor: float | None = None,
    eval_capacity_factor: float | None = None,
    min_capacity: int = 4,
    drop_policy: DropPolicy = "position",
    jitter: float = 0.0,
    aux_loss_coef: float | None = None,
    z_loss_coef: float = 0.0,
) -> list[str]:
    """Replace the mixture-of-experts blocks of a Mixtral, Qwen2-MoE or Qwen3-MoE, in place, by layers of equal weights.

    The model computes the same as before, as long as nothing is dropped. Its configuration's own auxiliary loss and
    jitter are no longer at work: add :func:`~lightning_efficient.moe.aux_loss` to the loss of training. Call it before
    the optimizer is built, as parameters are new. :func:`unswap_state_dict` gives them back in the names and shapes of
    transformers.

    Args:
        model: of transformers 5 or later.
        capacity_factor: as in ``MoELayer``; None: nothing is dropped.
        eval_capacity_factor: as in ``MoELayer``.
        min_capacity: as in ``MoELayer``.
        drop_policy: as in ``MoELayer``.
        jitter: as in ``MoELayer``.
        aux_loss_coef: as in ``MoELayer``; None: the ``router_aux_loss_coef`` of the model's configuration.
        z_loss_coef: as in ``MoELayer``.

    Returns:
        The names of the blocks.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: the model has none of these blocks, or has them in another form than is known; nothing is changed.
    """
    _require_transformers()
    blocks = {name: each for name, each in model.named_modules() if type(each).__name__ in BLOCKS}
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no block that can be swapped: known are {', '.join(BLOCKS)} of transformers. "
            "Leave the swap out, or take a Mixtral, Qwen2-MoE or Qwen3-MoE."
        )
    config: Any = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits is true in the model's configuration: swapped blocks return no logits, and the "
            "model's own auxiliary loss would be 0. Set it to false, and add lightning_efficient.moe.aux_loss(model)."
        )
    if aux_loss_coef is None:
        aux_loss_coef = float(getattr(config, "router_aux_loss_coef", 1e-2))

    shapes = {name: _Shape.of(name, block) for name, block in blocks.items()}
    for name, block in blocks.items():
        kind = _WithSharedExpert if hasattr(block, "shared_expert") else MoELayer
        with torch.device("meta"):  # the weights are there already
            layer = kind(
                **asdict(shapes[name]),
                capacity_factor=capacity_factor,
                eval_capacity_factor=eval_capacity_factor,
                min_capacity=min_capacity,
                drop_policy=drop_policy,
                jitter=jitter,
                aux_loss_coef=aux_loss_coef,
                z_loss_coef=z_loss_coef,
            )
        _take_weights(layer, block)
        model.set_submodule(name, layer.train(block.training))
    return list(blocks)


def unswap_state_dict(state: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in the names and shapes of transformers, those of ``MoELayer`` translated, all whole.

    ``model.save_pretrained(folder, state_dict=unswap_state_dict(model))`` writes a folder that the original class
    reads.

    Args:
        state: a model after :func:`swap_moe_blocks`, a :class:`~lightning_efficient.models.MoELlama`, or the state dict
            of one. Where experts are spread over ranks, all ranks must call: they gather them.

    Raises:
        ValueError: experts have biases, or no gate, or are chosen with a bias: transformers has no such model.
    """
    names = state.state_dict() if isinstance(state, nn.Module) else state
    return dict(_to_hf(name, _whole(tensor)) for name, tensor in names.items())


def swap_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of transformers in the names and shapes of ``MoELayer``: the way back.

    Args:
        state: of a Mixtral, Qwen2-MoE or Qwen3-MoE.
    """
    return dict(_translated(name, tensor, _FROM_HF) for name, tensor in state.items())


class _WithSharedExpert(MoELayer):
    """A layer of a Qwen2-MoE, which has an expert that all tokens go to."""

    shared_expert: nn.Module
    shared_expert_gate: nn.Module

    @override
    def forward(self, x: Tensor) -> Tensor:
        shared: Tensor = F.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        y: Tensor = super().forward(x)
        return y + shared


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a block of transformers computes, in the arguments of ``MoELayer``."""

    dim: int
    hidden: int
    num_experts: int
    top_k: int
    normalize: Normalize

    @classmethod
    def of(cls, name: str, block: Any) -> _Shape:
        """Read a block; refuse what a ``MoELayer`` does not compute."""
        gate_up_EFM = getattr(block.experts, "gate_up_proj", None)
        if not isinstance(gate_up_EFM, Tensor) or not isinstance(getattr(block.gate, "weight", None), Tensor):
            raise ValueError(
                f"The block {name!r} has no stacked weights of experts: transformers before 5 keeps them one by one. "
                "Install transformers 5 or later."
            )
        if not isinstance(block.experts.act_fn, nn.SiLU) and type(block.experts.act_fn).__name__ != "SiLUActivation":
            raise ValueError(
                f"The block {name!r} has experts with {type(block.experts.act_fn).__name__}: swapped ones compute "
                "SwiGLU, whose activation is SiLU. Leave the swap out."
            )
        normalize: Normalize = "before_drop" if getattr(block.gate, "norm_topk_prob", True) else "never"
        if block.gate.top_k == 1 and normalize != "never":
            raise ValueError(
                f"The block {name!r} sends a token to one expert and weighs it by 1: its gate learns nothing from the "
                "task, and a swapped layer weighs by the probability. Leave the swap out, or set norm_topk_prob to "
                "false."
            )
        E, F2, M = gate_up_EFM.shape
        return cls(M, F2 // 2, E, block.gate.top_k, normalize)


def _take_weights(layer: MoELayer, block: Any) -> None:
    """Give a layer the weights of a block."""
    layer.router.weight = block.gate.weight
    for name, weight, change in (
        ("w_in", block.experts.gate_up_proj, _from_gate_up),
        ("w_out", block.experts.down_proj, _transposed),
    ):
        setattr(layer.experts, name, nn.Parameter(change(weight.detach()), requires_grad=weight.requires_grad))
    if isinstance(layer, _WithSharedExpert):
        layer.shared_expert, layer.shared_expert_gate = block.shared_expert, block.shared_expert_gate


def _from_gate_up(gate_up_EFM: Tensor) -> Tensor:
    """(E, 2H, M) -> (E, M, 2, H)."""
    gate_up_EGHM: Tensor = gate_up_EFM.unflatten(1, (2, -1))
    return gate_up_EGHM.permute(0, 3, 1, 2).contiguous()


def _to_gate_up(w_in_EMGH: Tensor) -> Tensor:
    """(E, M, 2, H) -> (E, 2H, M)."""
    return w_in_EMGH.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _transposed(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2).contiguous()


def _same(weight: Tensor) -> Tensor:
    return weight


_Table: TypeAlias = "dict[str, tuple[str, Callable[[Tensor], Tensor]]]"
"""Endings of names, what stands in their place, and what becomes of the tensor."""

_TO_HF: _Table = {
    "router.weight": ("gate.weight", _same),
    "experts.w_in": ("experts.gate_up_proj", _to_gate_up),
    "experts.w_out": ("experts.down_proj", _transposed),
}
_FROM_HF: _Table = {
    "gate.weight": ("router.weight", _same),
    "experts.gate_up_proj": ("experts.w_in", _from_gate_up),
    "experts.down_proj": ("experts.w_out", _transposed),
}


def _to_hf(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if re.search(r"(^|\.)experts\.b_(in|out)$", name) or (name.endswith("experts.w_in") and tensor.shape[2] != 2):
        raise ValueError(
            f"{name!r} has no counterpart in transformers: experts there are SwiGLU without biases. Make the model "
            "with activation='swiglu' and bias=False."
        )
    if name.endswith("router.balance.bias"):
        raise ValueError(
            f"{name!r} has no counterpart in transformers: experts there are chosen without a bias. Make the model "
            "with balance_rate=0."
        )
    return _translated(name, tensor, _TO_HF)


def _translated(name: str, tensor: Tensor, table: _Table) -> tuple[str, Tensor]:
    for ending, (other, change) in table.items():
        if name == ending or name.endswith(f".{ending}"):
            return name.removesuffix(ending) + other, change(tensor)
    return name, tensor


def _whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "swap_moe_blocks needs transformers, but it is not installed. Install it with: pip install "
            "'lightning-efficient[hf]'"
        ) from error
