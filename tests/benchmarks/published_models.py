"""The four models of the ACP-SGD paper as parameter shapes and FLOPs, generated from their architectures.

ResNet-50 and -152 (He et al. 2016, bottleneck, stride in the 3x3 convolution, 224 x 224 images) and BERT-Base and
-Large with both pre-training heads (Devlin et al. 2019; the decoder is tied to the word embedding). Parameters stand in
registration order; `flops` is the cost of a parameter's forward for one sample, at two operations per multiply-add.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PublishedModel:
    """Shapes, their forward FLOPs per sample, and the paper's setting (batch per GPU, compression rank)."""

    name: str
    shapes: tuple[Shape, ...]
    flops: tuple[float, ...]
    batch_size: int
    rank: int

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def resnet(name: str, blocks: tuple[int, int, int, int], *, batch_size: int) -> PublishedModel:
    shapes: list[Shape] = []
    flops: list[float] = []

    def conv(out: int, channels: int, kernel: int, side: int) -> None:
        weight = (out, channels, kernel, kernel)
        shapes.extend([weight, (out,), (out,)])  # the convolution and its batch norm
        flops.extend([2.0 * math.prod(weight) * side**2, 0.0, 0.0])

    conv(64, 3, 7, 112)
    channels = 64
    for stage, depth in enumerate(blocks):
        width, side = 64 * 2**stage, 56 // 2**stage
        for block in range(depth):
            # The first block of a later stage halves the image in its 3x3, after the 1x1.
            conv(width, channels, 1, 2 * side if stage and not block else side)
            conv(width, width, 3, side)
            conv(4 * width, width, 1, side)
            if not block:
                conv(4 * width, channels, 1, side)
            channels = 4 * width
    shapes.extend([(1000, channels), (1000,)])
    flops.extend([2.0 * 1000 * channels, 0.0])
    return PublishedModel(name, tuple(shapes), tuple(flops), batch_size, rank=4)


def bert(name: str, *, layers: int, width: int, batch_size: int, tokens: int = 64) -> PublishedModel:
    vocabulary = 30522
    shapes: list[Shape] = [(vocabulary, width), (512, width), (2, width), (width,), (width,)]
    flops = [0.0] * 5

    def linear(out: int, features: int, positions: int, extra: float = 0.0) -> None:
        shapes.extend([(out, features), (out,)])
        flops.extend([2.0 * out * features * positions + extra, 0.0])

    def norm() -> None:
        shapes.extend([(width,), (width,)])
        flops.extend([0.0, 0.0])

    for _ in range(layers):
        for _ in range(3):
            linear(width, width, tokens)
        linear(width, width, tokens, extra=4.0 * tokens**2 * width)  # and the scores and mix of attention
        norm()
        linear(4 * width, width, tokens)
        linear(width, 4 * width, tokens)
        norm()
    linear(width, width, 1)  # pooler
    linear(width, width, tokens)  # transform before the decoder
    norm()
    shapes.append((vocabulary,))  # the decoder's bias; its weight is the word embedding, complete only at the very end
    flops.append(2.0 * vocabulary * width * tokens)
    linear(2, width, 1)  # next sentence
    return PublishedModel(name, tuple(shapes), tuple(flops), batch_size, rank=32)


PUBLISHED: dict[str, Callable[[], PublishedModel]] = {
    "ResNet-50": lambda: resnet("ResNet-50", (3, 4, 6, 3), batch_size=64),
    "ResNet-152": lambda: resnet("ResNet-152", (3, 8, 36, 3), batch_size=32),
    "BERT-Base": lambda: bert("BERT-Base", layers=12, width=768, batch_size=32),
    "BERT-Large": lambda: bert("BERT-Large", layers=24, width=1024, batch_size=8),
}
