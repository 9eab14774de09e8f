"""One optimizer step of the layers that have vectors: two passes over the weights, and small vectors in between.

The first pass reads each gradient once, the second writes momentum and weight. What the passes run on (`Passes`) is
chosen by name; what lies between them is the same for all.

Dimension letters: L layers; S segments, one for each layer and group; R outputs of all layers; A entries of all layers'
inputs; O outputs and D inputs of one layer; K groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_efficient.eva.layout import Layout
from lightning_efficient.eva.precondition import DampingMode, Rescale, curvature, step_size


@dataclass(frozen=True)
class Rule:
    """What is the same for every layer and step."""

    damping_mode: DampingMode
    divide_by_damping: bool
    rescale: Rescale
    kl_clip: float | None


@dataclass(frozen=True)
class Group:
    """The settings of one parameter group and how many layers, in order, it has.

    In a compiled step ``lr``, ``momentum`` and ``weight_decay`` are scalar tensors, which behave as numbers do.
    """

    size: int
    lr: float
    momentum: float
    weight_decay: float
    has_momentum: bool
    nesterov: bool
    decoupled_weight_decay: bool


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of the layers in a step, as matrices (O, D), or (K, O, D) with groups.

    Attributes:
        weights: are updated in place.
        momenta: are updated in place where the layer's group has momentum.
        grads: are read.
        inputs: the input-side vectors, (D,) or (K, D), in the order of the matrices' columns.
    """

    weights: list[Tensor]
    momenta: list[Tensor]
    grads: list[Tensor]
    inputs: list[Tensor]


class Passes(Protocol):
    """The two passes over the weights."""

    def project(self, tensors: LayerTensors) -> tuple[Tensor, Tensor]:
        """Return :math:`G a` of each row, (R,), and the squared norm of each segment of G, (S,)."""

    def update(self, tensors: LayerTensors, left_R: Tensor, scale_L: Tensor, groups: Sequence[Group]) -> None:
        r"""Apply :math:`D = c\,G - l a^T` as torch's SGD applies a gradient.

        Args:
            tensors: of the layers.
            left_R: :math:`l`, scaled by c already.
            scale_L: :math:`c` of each layer.
            groups: settings, in the order of the layers.
        """


def rank_one_step(
    passes: Passes,
    tensors: LayerTensors,
    groups: Sequence[Group],
    *,
    a_A: Tensor,
    g_R: Tensor | None,
    bias_grad_R: Tensor | None,
    has_bias_S: Tensor,
    damping_L: Tensor,
    layout: Layout,
    rule: Rule,
) -> tuple[Tensor, Tensor | None]:
    """Update weights and momenta in place.

    Args:
        passes: what the two passes run on.
        tensors: the layers' tensors.
        groups: settings, in the order of the layers.
        a_A: input-side vectors in the columns' order of each layer.
        g_R: output-side vectors; None for Eva-f.
        bias_grad_R: gradients of the biases, 0 where there is none; None where no layer has one.
        has_bias_S: 1 where the segment has a bias, else 0.
        damping_L: of each layer.
        layout: of the layers.
        rule: the rest.

    Returns:
        The step size factor nu, a scalar, and what takes the place of the biases' gradients, (R,) or None.
    """
    u_R, grad_sq_S = passes.project(tensors)
    if bias_grad_R is not None:
        u_R = u_R + bias_grad_R
        grad_sq_S = grad_sq_S + layout.sum_outputs(bias_grad_R.square())
    curv = curvature(
        a_A,
        g_R,
        u_R,
        grad_sq_S,
        layout=layout,
        has_bias_S=has_bias_S,
        damping_S=damping_L[layout.layer_of_segment_S],
        damping_mode=rule.damping_mode,
    )
    size = step_size(
        curv,
        layout=layout,
        gamma_L=damping_L if rule.divide_by_damping else None,
        rescale=rule.rescale,
        kl_clip=rule.kl_clip,
        lrs=[group.lr for group in groups],
        group_sizes=[group.size for group in groups],
    )
    scale_R = size.scale_L[layout.layer_of_row_R]
    left_R = curv.left_R * scale_R
    passes.update(tensors, left_R, size.scale_L, groups)
    return size.nu, None if bias_grad_R is None else scale_R * bias_grad_R - left_R


def group_of_layers(groups: Sequence[Group]) -> list[Group]:
    """Return the group of each layer."""
    return [group for group in groups for _ in range(group.size)]


def row_sizes(tensors: LayerTensors) -> list[int]:
    """Return the outputs of each layer."""
    return [w.shape[0] if w.ndim == 2 else w.shape[0] * w.shape[1] for w in tensors.weights]


class EagerPasses:
    """The passes as operations of torch, none of which allocates anything as large as a weight."""

    def project(self, tensors: LayerTensors) -> tuple[Tensor, Tensor]:
        """See :class:`Passes`."""
        u, norms = [], []
        for grad, a in zip(tensors.grads, tensors.inputs, strict=True):
            wide = grad if grad.dtype == a.dtype else grad.to(a.dtype)
            if wide.ndim == 2:
                u.append(torch.mv(wide, a))
                norms.append(torch.linalg.vector_norm(wide).view(1))
            else:
                u.append(torch.bmm(wide, a.unsqueeze(-1)).flatten())
                norms.append(torch.linalg.vector_norm(wide, dim=(1, 2)))
        return torch.cat(u), torch.cat(norms).square()

    def update(self, tensors: LayerTensors, left_R: Tensor, scale_L: Tensor, groups: Sequence[Group]) -> None:
        """See :class:`Passes`."""
        lefts, scales, inputs = left_R.split(row_sizes(tensors)), scale_L.unbind(), tensors.inputs
        if any(weight.dtype != left_R.dtype for weight in tensors.weights):
            lefts = [left.to(weight.dtype) for left, weight in zip(lefts, tensors.weights, strict=True)]
            inputs = [a.to(weight.dtype) for a, weight in zip(inputs, tensors.weights, strict=True)]
        for i, group in enumerate(group_of_layers(groups)):
            weight, grad = tensors.weights[i], tensors.grads[i]
            left, a = lefts[i], inputs[i]
            decay, lr = group.weight_decay, group.lr
            if decay and group.decoupled_weight_decay:
                weight.mul_(1 - lr * decay)
                decay = 0.0
            if group.has_momentum:
                momentum = tensors.momenta[i]
                _add_outer(momentum, left, a, beta=group.momentum, alpha=-1).addcmul_(grad, scales[i])
                if decay:
                    momentum.add_(weight, alpha=decay)
            if group.has_momentum and not group.nesterov:
                weight.add_(momentum, alpha=-lr)
            else:
                # Without a buffer, or beside it: W -= lr (D + decay W), in the order that needs no copy of W.
                if decay:
                    weight.mul_(1 - lr * decay)
                _add_outer(weight, left, a, beta=1, alpha=lr).addcmul_(grad, scales[i], value=-lr)
                if group.has_momentum:
                    weight.add_(momentum, alpha=-lr * group.momentum)


def _add_outer(out: Tensor, left: Tensor, a: Tensor, *, beta: float, alpha: float) -> Tensor:
    """``out = beta * out + alpha * left a^T`` in place, for each group."""
    if out.ndim == 2:
        return out.addr_(left, a, beta=beta, alpha=alpha)
    return out.baddbmm_(left.view(out.shape[0], -1, 1), a.unsqueeze(1), beta=beta, alpha=alpha)
