"""Elementwise activations as functions that keep one tensor: the input, or a mask for ReLU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from lightning_efficient.lora_fa.projection import row_blocks


def recomputed(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``function(x)``, keeping only x: backward runs the elementwise function again, block by block.

    The compiler decides itself what to run again, and cannot trace a derivative inside of a backward.
    """
    if torch.compiler.is_compiling():
        return function(x)
    y: Tensor = _Recomputed.apply(x, function)  # type: ignore[no-untyped-call]
    return y


def relu(x: Tensor) -> Tensor:
    """Return ``max(x, 0)``, keeping a byte per entry: torch's own keeps its result, which nothing else needs here."""
    y: Tensor = _ReLU.apply(x)  # type: ignore[no-untyped-call]
    return y


class _Recomputed(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        return function(x)

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx = torch.empty_like(rows)
        for start, stop in row_blocks(rows):
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                block = rows[start:stop].detach().requires_grad_()
                y = ctx.function(block)
            (dx[start:stop],) = torch.autograd.grad(y, block, dy_rows[start:stop])
        return dx.view(x.shape), None


class _ReLU(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu()
        ctx.save_for_backward(y > 0)
        return y

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, dy: Tensor) -> Any:
        (positive,) = ctx.saved_tensors
        return dy * positive
