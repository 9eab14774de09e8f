"""The sizes of a mixture-of-experts layer, and how many rows each schedule has in each place.

Dimension letters: S tokens of a rank, M model size, H hidden size of an expert, E experts, k choices per token, T slots
per expert (capacity), N rows.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.moe.layer import MoELayer
from lightning_efficient.moe.router import Capacity
from lightning_efficient.moe.schedule import Schedule
from lightning_efficient.moe.topology import MoESizes


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the cost of a layer depends on.

    Args:
        tokens: S, of a rank, before any split.
        dim: M.
        hidden: H, of the whole expert.
        num_experts: E.
        top_k: k.
        capacity_factor: f; None: nothing is dropped, and rows travel unpadded.
        min_capacity: the fewest slots of an expert.
        matrices: of size M x H before the activation: 2 for swiglu, 1 for gelu.
        dtype: of the rows that travel, as torch calls it: ``float32``.
        token_dtype: of the layer's input, where autocast makes the rows narrower; None: the same.

    Raises:
        ValueError: a size is below 1, or k above E.
    """

    tokens: int
    dim: int
    hidden: int
    num_experts: int
    top_k: int
    capacity_factor: float | None = 1.25
    min_capacity: int = 4
    matrices: int = 2
    dtype: str = "float32"
    token_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "dim", "hidden", "num_experts", "top_k", "matrices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a layer has 1 or more. Give a number above 0.")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k} of {self.num_experts} experts: a token goes to each at most once. Lower top_k."
            )
        for dtype in (self.dtype, self.token_dtype or self.dtype):
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ValueError(f"dtype is {dtype!r}: torch has none of that name. Give e.g. float32 or bfloat16.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element that travels."""
        return self.torch_dtype.itemsize

    @property
    def token_itemsize(self) -> int:
        """Bytes of an element of the layer's input."""
        return self.itemsize if self.token_dtype is None else int(getattr(torch, self.token_dtype).itemsize)

    @classmethod
    def of(cls, layer: MoELayer, x_SM: Tensor) -> LayerShape:
        """Return the shape of a layer that gets these tokens, in its mode and under autocast as they are.

        Args:
            layer: the layer.
            x_SM: its tokens.
        """
        device = x_SM.device.type
        tokens = str(x_SM.dtype).removeprefix("torch.")
        travel = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tokens
        limit, experts, router = layer.router.capacity, layer.experts, layer.router
        in_training = router.training or limit.eval_factor is None
        return cls(
            tokens=x_SM.shape[0],
            dim=experts.dim,
            hidden=experts.hidden,
            num_experts=experts.num_experts,
            top_k=router.top_k,
            capacity_factor=limit.factor if in_training else limit.eval_factor,
            min_capacity=limit.minimum,
            matrices=experts.matrices,
            dtype=travel.removeprefix("torch."),
            token_dtype=None if travel.removeprefix("torch.") == tokens else tokens,
        )

    @property
    def kind(self) -> LayerShape:
        """The same for every number of tokens and capacity: layers of a kind keep to one split for a whole run."""
        return replace(self, tokens=1, capacity_factor=None, min_capacity=1)

    def capacity(self, tokens: int) -> int:
        """Return T: the slots per expert of a gate that sees so many tokens.

        Raises:
            ValueError: the layer drops nothing, hence has no capacity.
        """
        if self.capacity_factor is None:
            raise ValueError("capacity_factor is None: a layer that drops nothing has no capacity. Ask for its rows.")
        limit = Capacity(self.capacity_factor, minimum=self.min_capacity)
        slots = limit.slots(tokens, num_experts=self.num_experts, top_k=self.top_k)
        assert slots is not None
        return slots

    @property
    def may_drop(self) -> bool:
        """Whether an expert may get more tokens than it has slots for."""
        return self.capacity_factor is not None and self.capacity(self.tokens) < self.tokens

    def as_dict(self) -> dict[str, Any]:
        """As plain values; ``LayerShape(**values)`` reads them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rows a rank has in each place of a schedule; without a capacity, or packed, with even routing.

    Attributes:
        gate: tokens its gate sees, padding included.
        slots: rows of all experts' slots behind the gate, padding included: (E, T).
        own: those it sends: 1/MP of them where the split comes after the gate.
        experts: rows that its experts compute.
        tokens: tokens of an MP group, padded so that they can be split before the gate.
    """

    gate: int
    slots: int
    own: int
    experts: int
    tokens: int


def rows(schedule: Schedule, shape: LayerShape, sizes: MoESizes, *, uneven: float = 1.0) -> Rows:
    """Return the rows of a schedule on one rank.

    Slots are padded so that chunks, and after the gate also the parts of the MP group, are equal.

    Args:
        schedule: with its chunks.
        shape: of the layer.
        sizes: of the groups.
        uneven: rows of the rank that has most, over the mean, where rows are as many as there are; 1: even routing.
    """
    mp, esp, E = sizes.model_parallel, sizes.expert_sharding, shape.num_experts
    part = -(-shape.tokens // mp)
    routed = part if schedule.split == "before" else shape.tokens
    inputs = esp if schedule.split == "gather" else 1  # each routed by itself
    parts = mp if schedule.split == "after" else 1
    if shape.capacity_factor is None or schedule.packed:
        filled = math.ceil(uneven * shape.top_k * routed)
        if shape.capacity_factor is not None:
            filled = min(filled, E * shape.capacity(routed))
        slots = _up_to(inputs * filled, parts * schedule.chunks)
    else:
        slots = inputs * E * _up_to(shape.capacity(routed), parts * schedule.chunks)
    own = slots // parts
    # A copy of each row for each shard, whichever way it travels; the baseline has gathered before its gate.
    copies = 1 if schedule.split == "gather" else esp
    return Rows(inputs * routed, slots, own, own * copies, mp * part)


def _up_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
