"""The adapted linear: a base that stays as it is, one or more named adapters, and the lean forward.

Attributes and parameters have PEFT's names (``base_layer``, ``lora_A.default.weight``, ``scaling``, ...), so the lean
forward serves PEFT's layers too, and checkpoints of the two can be exchanged.

Dimension letters: K inputs, N outputs, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_efficient.lora_fa.frozen import compressed, dense, sizes
from lightning_efficient.lora_fa.functional import DropoutMode, Setting, adapted_linear
from lightning_efficient.lora_fa.gated_mlp import Operand


class AdapterLinear(nn.Linear):
    """A or B: a linear without bias that keeps its dtype when the module around it is cast.

    A model cast to bfloat16 would otherwise train bfloat16 adapters, whose small updates round to nothing.
    """

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before, gradient = self.weight.detach(), self.weight.grad
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.dtype != before.dtype:
            self.weight.grad = None
            self.weight.data = before.to(self.weight.device)
            self.weight.grad = None if gradient is None else gradient.to(self.weight)
        return self


class LeanLinear:
    """The lean forward of a layer with the attributes of :class:`LoRAFALinear`; a base of :func:`swap`.

    Where the lean function does not hold (no or several active adapters, a merged or disabled one, a trainable base,
    hooks on A, B or the base, a variant such as DoRA), the layer's own forward runs.
    """

    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]
    training: bool
    active_adapters: Sequence[str]
    disable_adapters: bool
    merged: bool
    lora_fa_dropout_mode: DropoutMode = "recompute"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of base and adapter, (..., N), for ``x`` (..., K)."""
        operand = None if args or any(value is not None for value in kwargs.values()) else self.operand()
        if operand is None:
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        return adapted_linear(x, *operand)

    def operand(self) -> Operand | None:
        """Return what the lean function takes; None where the layer's own forward has to run.

        Raises:
            RuntimeError: A and B are sharded by themselves.
        """
        if self.why_plain() is not None:
            return None
        name = self.active_adapters[0]
        dropout, base = self.lora_dropout[name], dense(self.base_layer)
        p = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
        other = compressed(self.base_layer) if base is None else None
        A_RK, B_NR = self.lora_A[name].weight, self.lora_B[name].weight
        assert isinstance(A_RK, Tensor)
        assert isinstance(B_NR, Tensor)
        setting = Setting(self.scaling[name], p, self.lora_fa_dropout_mode, other)
        return Operand(A_RK, B_NR, setting, base)

    def why_plain(self) -> str | None:
        """Return why the lean function does not hold now, None where it does.

        Raises:
            RuntimeError: A and B are sharded by themselves.
        """
        if self.disable_adapters or self.merged:
            return "adapters are disabled or merged"
        active = self.active_adapters
        if len(active) != 1:
            return f"{len(active)} adapters are active"
        if active[0] not in self.lora_A:
            return f"it has no adapter {active[0]!r}"
        down, up = self.lora_A[active[0]], self.lora_B[active[0]]
        if hasattr(down.weight, "full_tensor"):
            raise RuntimeError(
                "fully_shard was called on a linear inside an adapted layer: its forward reads A and B directly, and "
                "finds them sharded. Call fully_shard on the blocks that hold whole layers instead."
            )
        if active[0] in getattr(self, "lora_variant", ()):
            return "a variant such as DoRA is active"
        if down.weight.requires_grad:
            return "A is trainable"
        if up.bias is not None:
            return "B has a bias"
        if any(p.requires_grad for p in self.base_layer.parameters()):
            return "the base is trainable"
        if watched(down) or watched(up) or watched(self.base_layer):
            return "hooks watch A, B or the base"
        if dense(self.base_layer) is None and compressed(self.base_layer) is None:
            return f"the base, {type(self.base_layer).__name__}, is not known"
        return None

    def freeze_A(self) -> None:
        """Freeze every A, which PEFT makes trainable again whenever adapters are switched."""
        for down in self.lora_A.values():
            down.weight.requires_grad_(False)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Make other adapters active; their A stays frozen."""
        super().set_adapter(*args, **kwargs)  # type: ignore[misc]
        self.freeze_A()

    def enable_adapters(self, *args: Any, **kwargs: Any) -> None:
        """Switch the adapters on or off; their A stays frozen."""
        super().enable_adapters(*args, **kwargs)  # type: ignore[misc]
        self.freeze_A()


class LoRAFALinear(nn.Module):
    """A linear with named adapters, in plain operations: the layer of the native backend, before it is made lean.

    Args:
        base_layer: the linear to adapt; its parameters are frozen.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.out_features, self.in_features = sizes(base_layer)
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.active_adapters: list[str] = []
        self.disable_adapters = False
        self.merged_adapters: list[str] = []
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base's weight: code around a linear may read its dtype or device."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return bias

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds an adapter's product."""
        return bool(self.merged_adapters)

    def add_adapter(self, name: str, A_RK: Tensor, *, scale: float, alpha: float, dropout: float) -> None:
        """Add an adapter with the given A and B = 0, and make it the active one.

        Args:
            name: the adapter's.
            A_RK: the frozen down-projection; its dtype is the adapter's.
            scale: s.
            alpha: what s was made of.
            dropout: probability.
        """
        rank = A_RK.shape[0]
        options: dict[str, Any] = {"bias": False, "device": A_RK.device, "dtype": A_RK.dtype}
        down = nn.utils.skip_init(AdapterLinear, self.in_features, rank, **options)
        up = nn.utils.skip_init(AdapterLinear, rank, self.out_features, **options)
        with torch.no_grad():
            down.weight.copy_(A_RK)
            up.weight.zero_()
        dropped = nn.Dropout(dropout) if dropout else nn.Identity()
        for parts, each in ((self.lora_A, down), (self.lora_B, up), (self.lora_dropout, dropped)):
            parts[name] = each.train(self.training)
        self.scaling[name], self.r[name], self.lora_alpha[name] = scale, rank, alpha
        self.set_adapter(name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones: their B trains, the others' does not.

        Names that this layer does not have count as adapters of other layers, as in PEFT.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.active_adapters = names
        for name in self.lora_A:
            self.lora_A[name].requires_grad_(False)
            self.lora_B[name].requires_grad_(name in names and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on, or off, which leaves the base alone."""
        self.disable_adapters = not enabled

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b + s D(x) A^T B^T`` over the active adapters, (..., N)."""
        y: Tensor = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return y
        dtype = y.dtype
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            wide = x if torch.is_autocast_enabled(x.device.type) else x.to(next(self.lora_A[name].parameters()).dtype)
            y = y + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](wide))) * self.scaling[name]
        return y.to(dtype)

    @override
    def extra_repr(self) -> str:
        return ", ".join(f"{name}: r={rank}, scale={self.scaling[name]:g}" for name, rank in self.r.items())


def watched(module: nn.Module) -> bool:
    """Whether someone wants to see the module called, as Eva's capture does."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)
