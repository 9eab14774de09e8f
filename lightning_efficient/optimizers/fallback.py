"""The update of parameters without Kronecker vectors: torch's own SGD or AdamW, inside the same optimizer."""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from lightning_efficient.eva.matrices import new_buffer

State = MutableMapping[Any, Any]


def sgd_step(
    params: Sequence[nn.Parameter], grads: Sequence[Tensor], state: State, group: dict[str, Any], *, lr: float
) -> None:
    """Apply torch's SGD with the settings of ``group``.

    Args:
        params: to update.
        grads: what stands for their gradients.
        state: the optimizer's; holds ``momentum_buffer``.
        group: a parameter group with momentum, nesterov, weight_decay and decoupled_weight_decay.
        lr: learning rate.
    """
    if not params:
        return
    decay = group["weight_decay"]
    if decay and group["decoupled_weight_decay"]:
        for p in params:
            p.mul_(1 - lr * decay)
        decay = 0.0
    buffers = [momentum_buffer(p, state) if group["momentum"] else None for p in params]
    fused = _can_be_fused(params, grads)
    sgd(
        list(params),
        list(grads),
        list(buffers),
        fused=fused,
        foreach=None if fused else False,
        weight_decay=decay,
        momentum=group["momentum"],
        lr=lr,
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
    )


def adamw_step(params: Sequence[nn.Parameter], state: State, group: dict[str, Any], *, lr: float) -> None:
    """Apply torch's AdamW with the settings of ``group``.

    Args:
        params: to update, each with a gradient.
        state: the optimizer's; holds ``exp_avg``, ``exp_avg_sq`` and ``step``.
        group: a parameter group with betas, eps and weight_decay.
        lr: learning rate.
    """
    if not params:
        return
    for p in params:
        if "step" not in state[p]:
            state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state[p]["exp_avg"], state[p]["exp_avg_sq"] = new_buffer(p), new_buffer(p)
        else:
            # A checkpoint is loaded on the host, and neither torch nor Lightning moves the step to the device.
            state[p]["step"] = state[p]["step"].to(p.device, torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[p][name] = _in_order_of(p, state[p][name])
    grads = [p.grad for p in params if p.grad is not None]
    fused = _can_be_fused(params, grads)
    adamw(
        list(params),
        grads,
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        [state[p]["step"] for p in params],
        fused=fused,
        foreach=None if fused else False,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def momentum_buffer(p: nn.Parameter, state: State) -> Tensor:
    """Return the parameter's momentum, made of zeros where there is none, in the memory order of the parameter."""
    buffer: Tensor | None = state[p].get("momentum_buffer")
    if buffer is None:
        buffer = state[p]["momentum_buffer"] = new_buffer(p)
    elif buffer.stride() != p.stride():
        buffer = state[p]["momentum_buffer"] = _in_order_of(p, buffer)
    return buffer


def _in_order_of(p: nn.Parameter, buffer: Tensor) -> Tensor:
    """The buffer in the memory order of the parameter: a model may have become channels-last since it was made."""
    return buffer if buffer.stride() == p.stride() else new_buffer(p).copy_(buffer)


def _can_be_fused(params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    # torch's fused kernels read a gradient in the memory order of its parameter, whatever its own is (torch 2.13).
    return all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point() and p.stride() == grad.stride()
        for p, grad in zip(params, grads, strict=True)
    )
