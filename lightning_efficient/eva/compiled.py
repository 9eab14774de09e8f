"""The step compiled by inductor: each pass one loop over the weights, fused.

Dimension letters: R outputs of all layers; L layers; S segments; O outputs and D inputs of one layer; K groups.
"""

import types
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_efficient.eva.step import Group, LayerTensors, group_of_layers, row_sizes

T = TypeVar("T")


class FusablePasses:
    """The passes as plain expressions, for a compiler: run eagerly they would need several temporaries."""

    def project(self, tensors: LayerTensors) -> tuple[Tensor, Tensor]:
        """See :class:`~lightning_efficient.eva.step.Passes`."""
        u, squares = [], []
        for grad, a in zip(tensors.grads, tensors.inputs, strict=True):
            wide = grad.to(a.dtype)
            u.append((wide * a.unsqueeze(-2)).sum(-1).flatten())
            # By row first: both sums then run in one loop over G.
            squares.append(wide.square().sum(-1).sum(-1).view(-1))
        return torch.cat(u), torch.cat(squares)

    def update(self, tensors: LayerTensors, left_R: Tensor, scale_L: Tensor, groups: Sequence[Group]) -> None:
        """See :class:`~lightning_efficient.eva.step.Passes`."""
        lefts = left_R.split(row_sizes(tensors))
        for i, group in enumerate(group_of_layers(groups)):
            weight, a = tensors.weights[i], tensors.inputs[i].unsqueeze(-2)
            old = weight.to(a.dtype)
            step = scale_L[i] * tensors.grads[i].to(a.dtype) - lefts[i].view(*weight.shape[:-1], 1) * a
            if group.decoupled_weight_decay:
                old = old * (1 - group.lr * group.weight_decay)
            else:
                step = step + group.weight_decay * old
            if group.has_momentum:
                momentum = group.momentum * tensors.momenta[i].to(a.dtype) + step
                tensors.momenta[i].copy_(momentum)
                step = step + group.momentum * momentum if group.nesterov else momentum
            weight.copy_(old - group.lr * step)


def compile_alone(function: Callable[..., T]) -> Callable[..., T]:
    """Return the function compiled by inductor when it is first called, for one optimizer.

    Dynamo keeps compiled code by code object and gives up after a few: each optimizer gets a code object of its own.
    Settings that a schedule changes must be scalar tensors: a number would be compiled in, and anew for each value.
    """
    assert isinstance(function, types.FunctionType)
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False)
