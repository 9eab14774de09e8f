r"""A gated feed-forward block, ``down(act(gate(x)) * up(x))``, as one function that keeps two wide tensors, not four.

Kept for backward are the outputs of gate and up, e and g (both (T, F)), and the three h (T, R). Backward walks over
blocks of rows: it makes act(e) and g act'(e) again, and no gradient of width F exists for more than a block.

Dimension letters: T tokens, D width of the model, F width of the block, R rank.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from lightning_efficient.lora_fa.frozen import Dense
from lightning_efficient.lora_fa.functional import (
    Setting,
    Tensors,
    autocast_off,
    draw_dropout,
    forward_linear,
    input_gradient,
    weight_of,
)
from lightning_efficient.lora_fa.projection import row_blocks, runs_on_triton, up_gradients


class Gate(NamedTuple):
    """An activation in front of a gate: the product, and its gradients with respect to both factors."""

    product: Callable[[Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _gate(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]) -> Gate:
    def product(e: Tensor, g: Tensor) -> Tensor:
        return forward(e).mul_(g)

    def gradients(da: Tensor, e: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        dg = forward(e).mul_(da)
        return backward(da.mul_(g), e), dg

    return Gate(product, gradients)


def _gelu(approximate: str) -> Gate:
    return _gate(
        lambda e: F.gelu(e, approximate=approximate),
        lambda de, e: torch.ops.aten.gelu_backward(de, e, approximate=approximate),
    )


GATES = {
    "silu": _gate(F.silu, torch.ops.aten.silu_backward),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}
"""Activations that the function knows, by name."""


def _chosen(activation: str, like: Tensor) -> Gate:
    if activation == "silu" and runs_on_triton(like):
        from lightning_efficient.lora_fa.triton_ops import swiglu, swiglu_gradients

        return Gate(swiglu, swiglu_gradients)
    return GATES[activation]


class Operand(NamedTuple):
    """One adapted linear: its adapter, how it is set, and an ordinary base."""

    A_RK: Tensor
    B_NR: Tensor
    setting: Setting
    base: Dense | None


def adapted_gated_mlp(x: Tensor, gate: Operand, up: Operand, down: Operand, activation: str) -> Tensor:
    """Return ``down(act(gate(x)) * up(x))``, (..., D).

    Args:
        x: the input, (..., D).
        gate: (F, D).
        up: (F, D).
        down: (D, F).
        activation: a key of :data:`GATES`.
    """
    settings = (gate.setting, up.setting, down.setting)
    flat: list[Tensor | None] = []
    for operand in (gate, up, down):
        weight, bias = operand.base if operand.base is not None else (None, None)
        seed, noise = None, None
        if operand.setting.p > 0:
            like = x if operand is not down else x.new_empty(()).expand(*x.shape[:-1], operand.A_RK.shape[1])
            seed, noise = draw_dropout(like, operand.A_RK, operand.setting)
        flat += [operand.A_RK, operand.B_NR, weight, bias, seed, noise]
    y: Tensor = _GatedMLP.apply(x, activation, settings, *flat)  # type: ignore[no-untyped-call]
    return y


_WIDTH = len(Tensors._fields)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, x: Tensor, activation: str, settings: tuple[Setting, Setting, Setting], *flat: Tensor | None
    ) -> Tensor:
        gate, up, down = _unflatten(flat)
        e, h_gate_TR = forward_linear(x, gate, settings[0])
        g, h_up_TR = forward_linear(x, up, settings[1])
        a = _chosen(activation, e).product(e, g)
        y, h_down_TR = forward_linear(a, down, settings[2])
        ctx.save_for_backward(e, g, h_gate_TR, h_up_TR, h_down_TR, *flat)
        ctx.activation, ctx.settings, ctx.x_dtype, ctx.x_shape = activation, settings, x.dtype, x.shape
        return y

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, dy: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing refuses to unpack a tensor again
        (e, g, *hidden), operands = saved[:5], _unflatten(saved[5:])
        with autocast_off(dy.device.type):
            dx, gradients = _backward(ctx, dy, e, g, hidden, operands)
        flat: list[Tensor | None] = []
        for dB_NR in gradients:
            flat += [None, dB_NR, *[None] * (_WIDTH - 2)]
        return dx, None, None, *flat


def _backward(
    ctx: Any, dy: Tensor, e: Tensor, g: Tensor, hidden: list[Tensor], operands: list[Tensors]
) -> tuple[Tensor | None, list[Tensor | None]]:
    wants_x = ctx.needs_input_grad[0]
    wants = [ctx.needs_input_grad[3 + _WIDTH * index + 1] for index in range(3)]
    settings, act = ctx.settings, _chosen(ctx.activation, e)
    B = [each.B_NR.to(h_TR.dtype) for each, h_TR in zip(operands, hidden, strict=True)]
    dy_TD, e_TF, g_TF = (each.reshape(-1, each.shape[-1]) for each in (dy, e, g))
    inner = e.dtype
    down_weight = weight_of(operands[2], settings[2], dy.dtype)
    first_weights = [weight_of(operands[i], settings[i], inner) for i in (0, 1)] if wants_x else []

    u_down_TR, dB_down = up_gradients(dy_TD, hidden[2], B[2], settings[2].scale, dB=wants[2])
    assert u_down_TR is not None
    # Sums over blocks are wide: rounding each partial sum to bfloat16 would lose more with every block.
    wide = torch.promote_types(B[0].dtype, torch.float32)
    gradients: list[Tensor | None] = [torch.zeros_like(B[i], dtype=wide) if wants[i] else None for i in (0, 1)]
    rows = dy_TD.shape[0]
    dx_TD = torch.empty(rows, ctx.x_shape[-1], dtype=ctx.x_dtype, device=dy.device) if wants_x else None
    for start, stop in row_blocks(e_TF, 1 << 18):  # large enough for the products to run at full speed
        part = slice(start, stop)
        da = input_gradient(dy_TD[part], u_down_TR[part], down_weight, operands[2], settings[2], start).to(inner)
        wide_parts = list(act.gradients(da, e_TF[part], g_TF[part]))
        del da  # wide tensors go as soon as they can: the next block's would come on top of them
        dx_parts = []
        for i in (0, 1):
            d = wide_parts.pop(0)
            u, dB = up_gradients(d, hidden[i][part], B[i], settings[i].scale, u=wants_x, dB=wants[i])
            if dB is not None:
                gradients[i] += dB  # type: ignore[operator]
            if u is not None:
                dx_parts.append(input_gradient(d, u, first_weights[i], operands[i], settings[i], start))
            del d
        if dx_TD is not None:
            torch.add(*dx_parts, out=dx_TD[part]) if inner == dx_TD.dtype else dx_TD[part].copy_(
                dx_parts[0].to(dx_TD.dtype).add_(dx_parts[1])
            )
    gradients.append(dB_down)
    cast = [
        None if dB is None else dB.to(each.B_NR.dtype).mul_(setting.scale)
        for dB, each, setting in zip(gradients, operands, settings, strict=True)
    ]
    return None if dx_TD is None else dx_TD.view(ctx.x_shape), cast


def _unflatten(flat: Any) -> list[Tensors]:
    return [Tensors(*flat[start : start + _WIDTH]) for start in range(0, len(flat), _WIDTH)]
