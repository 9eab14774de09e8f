"""The frozen linears that an adapter can sit on, each read as a matrix W (N, K) that may be stored compressed.

Dimension letters: K inputs, N outputs.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class FrozenLinear(Protocol):
    """A linear whose weight is not an ordinary tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``, (..., N)."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return W, (N, K), made anew."""


class Dense(NamedTuple):
    """An ordinary weight (N, K), possibly a transposed view of how it is stored, and its bias (N,)."""

    weight: Tensor
    bias: Tensor | None


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can sit on the module: a linear of torch, transformers, bitsandbytes or torchao."""
    # What nn.MultiheadAttention ends in is never called: its weight is read.
    return stored_transposed(module) or (
        isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )


def sizes(module: nn.Module) -> tuple[int, int]:
    """Return (N, K) of a linear."""
    if stored_transposed(module):
        stored: Any = module.weight
        return int(stored.shape[1]), int(stored.shape[0])
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def dense(module: nn.Module) -> Dense | None:
    """Return the weight and bias of a module that is an ordinary linear and nothing else, None for others."""
    weight: Any = getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point() or _replaced(module):
        return None
    if stored_transposed(module):
        return Dense(weight.t(), bias)
    return Dense(weight, bias) if type(module).forward is nn.Linear.forward else None


def compressed(module: nn.Module) -> FrozenLinear | None:
    """Return the view of a quantised linear, None where it is of no kind known here."""
    if not isinstance(module, nn.Linear) or _replaced(module):
        return None
    kinds = {base.__module__.partition(".")[0] + "." + base.__name__ for base in type(module).__mro__}
    if "bitsandbytes.Linear4bit" in kinds:
        return _FourBit(module)
    if "bitsandbytes.Linear8bitLt" in kinds:
        return _EightBit(module)
    if type(module).forward is nn.Linear.forward and hasattr(module.weight, "dequantize") and not _plain(module):
        return _Dequantizable(module)
    return None


class _Compressed:
    """A linear that multiplies by itself; its kinds differ in how the weight comes back."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class _FourBit(_Compressed):
    """bitsandbytes' NF4 and FP4."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        stored: Any = self.layer.weight
        if stored.quant_state is None:  # it is quantised on its way to the device
            unquantised: Tensor = stored.data
            return unquantised.to(dtype)
        whole: Tensor = dequantize_4bit(stored.data, stored.quant_state)
        return whole.to(dtype)


class _EightBit(_Compressed):
    """bitsandbytes' LLM.int8()."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        stored: Any = self.layer.weight
        if stored.dtype != torch.int8:  # it is quantised on its way to the device
            unquantised: Tensor = stored.data
            return unquantised.to(dtype)
        # A forward moves both from the weight to the layer's state.
        holder: Any = stored if stored.CB is not None else self.layer.state
        whole: Tensor = int8_vectorwise_dequant(holder.CB, holder.SCB)
        return whole.to(dtype)


class _Dequantizable(_Compressed):
    """A linear whose weight is a tensor subclass with ``dequantize``, as torchao's are."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        whole: Tensor = self.layer.weight.dequantize()
        return whole.to(dtype)


def _replaced(module: nn.Module) -> bool:
    """Whether the module has another forward than its class, as accelerate gives it to load weights when needed."""
    return "forward" in vars(module)


def _plain(module: nn.Linear) -> bool:
    return type(module.weight) in (nn.Parameter, Tensor)


def stored_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear whose weight is (K, N); told without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
