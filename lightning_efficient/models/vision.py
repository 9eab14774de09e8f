"""A small residual network for images from 8x8 digits to 32x32 photographs.

Dimension letters: B batch, C classes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lightning_efficient.models.classifier import Classifier

Norm = Literal["batch", "group"]


class ResNetClassifier(Classifier):
    """A stem, stages of basic residual blocks, global average pooling, logits (He et al., 2015, sections 3.3 and 4.2).

    Each stage after the first halves the image and doubles the channels. ReLU works in place.

    Args:
        in_channels: channels of the images.
        num_classes: C.
        width: channels of the first stage.
        blocks: residual blocks of each stage; ``[3, 3, 3]`` with width 16 is the paper's ResNet-20.
        norm: ``"batch"`` (statistics of each rank's batch), or ``"group"``, which does not depend on the batch.
        optimizer: called with the parameters that train, in ``configure_optimizers``.
        lr_scheduler: called with the optimizer; advances once per step.

    Raises:
        ValueError: a size is below 1, or ``norm`` is unknown.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        *,
        width: int = 16,
        blocks: Sequence[int] = (1, 1, 1),
        norm: Norm = "batch",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(num_classes, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if min(in_channels, width, *blocks) < 1:
            raise ValueError(
                f"in_channels {in_channels}, width {width} and blocks {list(blocks)} must all be at least 1. "
                "Correct the one below 1; a stage you do not want is left out of blocks."
            )
        stages: list[nn.Module] = [nn.Sequential(_conv3x3(in_channels, width), _norm(norm, width), nn.ReLU(True))]
        channels = width
        for stage, num_blocks in enumerate(blocks):
            for block in range(num_blocks):
                shrink = stage > 0 and block == 0
                out_channels = width * 2**stage
                stages.append(_BasicBlock(channels, out_channels, stride=2 if shrink else 1, norm=norm))
                channels = out_channels
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        self.model = nn.Sequential(*stages, head)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C) of the images (B, channels, height, width).

        Raises:
            ValueError: the input is not a batch of images.
        """
        if images.ndim != 4:
            raise ValueError(
                f"The images have shape {tuple(images.shape)}: the ResNet takes (batch, channels, height, width). "
                "DigitsData gives it with flat=False."
            )
        logits_BC: Tensor = self.model(images)
        return logits_BC


class _BasicBlock(nn.Module):
    """``relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))``; the shortcut is 1x1 where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride=stride)
        self.norm1 = _norm(norm, out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.norm2 = _norm(norm, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), _norm(norm, out_channels)
            )

    @override
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x), inplace=True)


def _conv3x3(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        # About eight channels to a group, and one group where that does not divide.
        return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)
    raise ValueError(f"norm is {norm!r}: the ResNet has batch and group normalisation. Use 'batch' or 'group'.")
