"""Optimizers of the convergence benchmark that no package has: FOOF, and two controls without any curvature.

Dimension letters: R rows (samples, and positions or tokens); D inputs, the bias's 1 included; O outputs.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


def hidden_layers(net: nn.Module, *, head: bool) -> list[nn.Module]:
    """Return all linear and convolution layers; without ``head``, not the one named ``lm_head``."""
    return [
        module
        for name, module in net.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and (head or not name.endswith("lm_head"))
    ]


def split_parameters(net: nn.Module, layers: Iterable[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters of ``layers`` and all others."""
    inside = [p for layer in layers for p in layer.parameters(recurse=False)]
    ids = {id(p) for p in inside}
    return inside, [p for p in net.parameters() if id(p) not in ids]


class ScaledSGD(Optimizer):
    r"""The control: the step size rules of Eva with V = G, one factor for all parameters, then SGD with momentum.

    ``kl_clip=None`` normalises, :math:`\nu = 1/|G|`; a number clips as Eva does,
    :math:`\nu = \min(1, \sqrt{\kappa/(\eta^2 |G|^2)})`. Eva's division by its damping is a change of both settings.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, *, kl_clip: float | None, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "kl_clip": kl_clip, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            norm_sq = torch.stack(torch._foreach_norm(grads)).square().sum()
            if group["kl_clip"] is None:
                nu = torch.where(norm_sq > 0, norm_sq.rsqrt(), 1)
            else:
                bound = (group["kl_clip"] / (group["lr"] ** 2 * norm_sq)).sqrt().clamp(max=1)
                nu = torch.where(norm_sq > 0, bound, 1)
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, torch._foreach_mul(grads, nu))
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


class FOOF(Optimizer):
    r"""Gradient descent on neurons: :math:`V = G (E[a a^\top] + \gamma I)^{-1}`, KL clip, SGD with momentum.

    The second moment of each layer's inputs, of all samples, is averaged with weight 0.95 on the newest and decomposed
    every ``every`` steps, the first included. Parameters outside ``layers`` follow SGD.
    """

    def __init__(
        self, net: nn.Module, lr: float, *, damping: float, kl_clip: float, every: int, momentum: float = 0.9
    ) -> None:
        self.layers = hidden_layers(net, head=True)
        self.every, self.damping, self.kl_clip = every, damping, kl_clip
        self.steps = 0
        self.inputs: dict[nn.Module, Tensor] = {}
        self.moments: dict[nn.Module, Tensor] = {}
        self.eigen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            layer.register_forward_pre_hook(self._see)
        super().__init__(net.parameters(), {"lr": lr, "momentum": momentum})

    def _see(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if layer.training and self.steps % self.every == 0:
            self.inputs[layer] = args[0].detach()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.steps % self.every == 0:
            for layer in self.layers:
                self._refresh(layer)
        self.steps += 1
        group = self.param_groups[0]
        directions: dict[Tensor, Tensor] = {}
        inner = torch.zeros(())
        for layer in self.layers:
            V_OD, inner_layer = self._precondition(layer)
            inner += inner_layer
            if layer.bias is not None:
                directions[layer.bias] = V_OD[:, -1]
                V_OD = V_OD[:, :-1]
            directions[layer.weight] = V_OD.reshape(layer.weight.shape)
        nu = (self.kl_clip / (group["lr"] ** 2 * inner)).sqrt().clamp(max=1)
        for p in group["params"]:
            update = nu * directions[p] if p in directions else p.grad
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            p.add_(buffer.mul_(group["momentum"]).add_(update), alpha=-group["lr"])

    def _refresh(self, layer: nn.Module) -> None:
        x = self.inputs.pop(layer)
        if isinstance(layer, nn.Conv2d):
            x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
        rows_RD = x.flatten(0, -2)
        if layer.bias is not None:
            rows_RD = F.pad(rows_RD, (0, 1), value=1.0)
        moment_DD = rows_RD.T @ rows_RD / len(rows_RD)
        if layer in self.moments:
            moment_DD = torch.lerp(self.moments[layer], moment_DD, 0.95)
        self.moments[layer] = moment_DD
        self.eigen[layer] = torch.linalg.eigh(moment_DD)

    def _precondition(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        G_OD = layer.weight.grad.flatten(1)
        if layer.bias is not None:
            G_OD = torch.cat((G_OD, layer.bias.grad[:, None]), dim=1)
        values_D, vectors_DD = self.eigen[layer]
        V_OD = (G_OD @ vectors_DD) / (values_D.clamp(min=0) + self.damping) @ vectors_DD.T
        return V_OD, (V_OD * G_OD).sum()
