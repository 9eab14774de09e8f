"""What a step needs to know of the layers that have gradients, made once and used until others have.

Dimension letters: L layers; S segments, one for each layer and group; A entries of all layers' inputs; R outputs of all
layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.eva.layers import Layer
from lightning_efficient.eva.layout import Layout, send
from lightning_efficient.eva.matrices import as_matrices, in_memory_order, is_channels_last
from lightning_efficient.eva.step import Group, LayerTensors


class Plan:
    """The active layers of a step.

    Args:
        layers: those with a gradient, ordered by parameter group.
        group_indices: the parameter group of each.
        biased: whether the bias of each has a gradient too.
        dtype: of vectors and scalars.
        device: of the layers.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        group_indices: Sequence[int],
        biased: Sequence[bool],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = list(layers)
        self.layout = Layout.of(layers, device)
        self.group_indices = list(group_indices)
        self.sizes = [self.group_indices.count(index) for index in range(max(group_indices) + 1)]
        self.biases: list[nn.Parameter | None] = [
            layer.bias if has else None for layer, has in zip(layers, biased, strict=True)
        ]
        has_bias_L = torch.tensor([float(has) for has in biased], dtype=dtype, device=device)
        self.has_bias_S = has_bias_L[self.layout.layer_of_segment_S]
        self._no_bias = [torch.zeros(layer.outputs, dtype=dtype, device=device) for layer in layers]
        self._dtype, self._device = dtype, device
        self._damping: tuple[tuple[float, ...], Tensor] | None = None

    def groups(self, param_groups: Sequence[dict[str, Any]], *, as_tensors: bool) -> list[Group]:
        """Return the settings of each group; as scalar tensors for a compiled step."""
        rows: list[Any] = [(g["lr"], g["momentum"], g["weight_decay"]) for g in param_groups]
        if as_tensors:
            rows = [row.unbind() for row in send(torch.tensor(rows, dtype=self._dtype), self._device)]
        return [
            Group(
                size=size,
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                has_momentum=group["momentum"] > 0,
                nesterov=group["nesterov"],
                decoupled_weight_decay=group["decoupled_weight_decay"],
            )
            for size, (lr, momentum, weight_decay), group in zip(self.sizes, rows, param_groups, strict=False)
        ]

    def damping(self, param_groups: Sequence[dict[str, Any]]) -> Tensor:
        """Return the damping of each layer, sent to the device only where it has changed."""
        values = tuple(float(group["damping"]) for group in param_groups)
        if self._damping is None or self._damping[0] != values:
            by_layer = [value for size, value in zip(self.sizes, values, strict=False) for _ in range(size)]
            self._damping = values, send(torch.tensor(by_layer, dtype=self._dtype), self._device)
        return self._damping[1]

    def bias_grads(self) -> Tensor | None:
        """Return the gradients of the biases, 0 where a layer has none; None where no layer has one."""
        if not any(bias is not None for bias in self.biases):
            return None
        grads = [
            none if b is None or b.grad is None else b.grad for b, none in zip(self.biases, self._no_bias, strict=True)
        ]
        return torch.cat([grad.to(self._dtype) for grad in grads])

    def tensors(self, a_A: Tensor, momenta: Sequence[Tensor | None]) -> LayerTensors:
        """Return weights, momenta (unused ones: the weights again), gradients and input vectors as matrices."""
        weights: list[Tensor] = []
        buffers, grads, inputs = [], [], []
        vectors = a_A.split(self.layout.input_sizes)
        for layer, a, momentum in zip(self.layers, vectors, momenta, strict=True):
            weight, grad = layer.weight, layer.weight.grad
            assert grad is not None
            buffer = weight if momentum is None else momentum
            if weight.ndim > 2:
                order, groups = is_channels_last(weight), layer.groups
                a = in_memory_order(a, weight, groups, channels_last=order)
                weight, buffer, grad = (  # type: ignore[assignment]
                    as_matrices(each, groups, channels_last=order) for each in (weight, buffer, grad)
                )
            weights.append(weight)
            buffers.append(buffer)
            grads.append(grad)
            inputs.append(a)
        return LayerTensors(weights, buffers, grads, inputs)
