"""How the vectors and scalars of many layers lie in flat tensors, so that a step needs a handful of small operations.

Dimension letters: L layers; S segments, one for each layer and group; A entries of all layers' inputs (sum of K*D);
R outputs of all layers (sum of O).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lightning_efficient.eva.layers import Layer


@dataclass(frozen=True)
class Layout:
    """Offsets and index tensors of a list of layers.

    Attributes:
        input_sizes: K*D of each layer.
        output_sizes: O of each layer.
        input_offsets_S: where each segment's inputs start, (S + 1,) int64.
        output_offsets_S: where each segment's outputs start, (S + 1,) int64.
        segment_of_row_R: the segment of each output, (R,) int64.
        layer_of_segment_S: the layer of each segment, (S,) int64.
        segment_offsets_L: where each layer's segments start, (L + 1,) int64.
        layer_of_input_A: the layer of each input entry, (A,) int64.
        layer_of_row_R: the layer of each output, (R,) int64.
        one_segment_each: whether no layer has groups, so that segments are layers.
    """

    input_sizes: list[int]
    output_sizes: list[int]
    input_offsets_S: Tensor
    output_offsets_S: Tensor
    segment_of_row_R: Tensor
    layer_of_segment_S: Tensor
    segment_offsets_L: Tensor
    layer_of_input_A: Tensor
    layer_of_row_R: Tensor
    one_segment_each: bool

    @classmethod
    def of(cls, layers: Sequence[Layer], device: torch.device) -> "Layout":
        """Lay out ``layers`` in their order."""
        groups = torch.tensor([layer.groups for layer in layers])
        inputs = torch.tensor([layer.fan_in for layer in layers]).repeat_interleave(groups)
        outputs = torch.tensor([layer.outputs // layer.groups for layer in layers]).repeat_interleave(groups)
        layer_of_segment = torch.arange(len(layers)).repeat_interleave(groups)
        segment_of_row = torch.arange(len(outputs)).repeat_interleave(outputs)
        return cls(
            input_sizes=[layer.groups * layer.fan_in for layer in layers],
            output_sizes=[layer.outputs for layer in layers],
            input_offsets_S=_offsets(inputs).to(device),
            output_offsets_S=_offsets(outputs).to(device),
            segment_of_row_R=segment_of_row.to(device),
            layer_of_segment_S=layer_of_segment.to(device),
            segment_offsets_L=_offsets(groups).to(device),
            layer_of_input_A=layer_of_segment.repeat_interleave(inputs).to(device),
            layer_of_row_R=layer_of_segment[segment_of_row].to(device),
            one_segment_each=len(outputs) == len(layers),
        )

    def sum_inputs(self, x_A: Tensor) -> Tensor:
        """Sum each segment's input entries, (A,) to (S,), in a fixed order."""
        return torch.segment_reduce(x_A, "sum", offsets=self.input_offsets_S, unsafe=True)

    def sum_outputs(self, x_R: Tensor) -> Tensor:
        """Sum each segment's outputs, (R,) to (S,), in a fixed order."""
        return torch.segment_reduce(x_R, "sum", offsets=self.output_offsets_S, unsafe=True)

    def sum_segments(self, x_S: Tensor) -> Tensor:
        """Sum each layer's segments, (S,) to (L,)."""
        if self.one_segment_each:
            return x_S
        return torch.segment_reduce(x_S, "sum", offsets=self.segment_offsets_L, unsafe=True)


def _offsets(sizes: Tensor) -> Tensor:
    return torch.tensor([0, *accumulate(sizes.tolist())])


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor of the host to the device without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
