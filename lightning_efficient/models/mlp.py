"""Fully connected networks: a classifier and an autoencoder.

Dimension letters: B batch, N inputs per example, C classes, Z size of the code.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lightning_efficient.models._module import EpochMean, TrainableModule
from lightning_efficient.models.classifier import Classifier


class MLPClassifier(Classifier):
    """Flatten, hidden layers with ReLU, logits.

    Args:
        in_features: values per example, N, after flattening.
        num_classes: C.
        hidden: sizes of the hidden layers.
        optimizer: called with the parameters that train, in ``configure_optimizers``.
        lr_scheduler: called with the optimizer; advances once per step.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self,
        in_features: int = 64,
        num_classes: int = 10,
        *,
        hidden: Sequence[int] = (128, 128),
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(num_classes, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.model = nn.Sequential(nn.Flatten(), mlp([in_features, *hidden, num_classes]))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (B, C) of the inputs (B, ...)."""
        logits_BC: Tensor = self.model(inputs)
        return logits_BC


class AutoEncoder(TrainableModule):
    """Squeeze each example to a short code and rebuild it; the loss is the mean squared error.

    A batch is ``inputs`` or ``(inputs, labels)``; labels are not used. Logs ``train_loss`` per step, ``val_loss``
    (or ``test_loss``) over the epoch and all ranks.

    Args:
        in_features: values per example, N, after flattening.
        code_size: Z.
        hidden: sizes of the encoder's hidden layers; the decoder has them in reverse.
        optimizer: called with the parameters that train, in ``configure_optimizers``.
        lr_scheduler: called with the optimizer; advances once per step.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self,
        in_features: int = 64,
        code_size: int = 8,
        *,
        hidden: Sequence[int] = (128, 64),
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.val_loss, self.test_loss = EpochMean(), EpochMean()
        self.encoder = mlp([in_features, *hidden, code_size])
        self.decoder = mlp([code_size, *reversed(hidden), in_features])

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the rebuilt inputs, in the shape of ``inputs`` (B, ...)."""
        rebuilt_BN: Tensor = self.decoder(self.encoder(inputs.flatten(1)))
        return rebuilt_BN.view_as(inputs)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Return the mean squared error, a scalar."""
        inputs = _inputs(batch)
        loss = F.mse_loss(self(inputs), inputs)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(inputs))
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> None:
        """Log the loss."""
        self._evaluate(batch, "val", self.val_loss)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> None:
        """Log the loss."""
        self._evaluate(batch, "test", self.test_loss)

    @override
    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Return the codes, (B, Z)."""
        codes_BZ: Tensor = self.encoder(_inputs(batch).flatten(1))
        return codes_BZ

    def _evaluate(self, batch: tuple[Tensor, Tensor] | Tensor, stage: str, mean_loss: EpochMean) -> None:
        inputs = _inputs(batch)
        mean_loss.update(F.mse_loss(self(inputs), inputs), len(inputs))
        self.log(f"{stage}_loss", mean_loss, prog_bar=True, on_step=False, on_epoch=True)


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Return linear layers between ``sizes``, with ReLU between them and none after the last.

    Raises:
        ValueError: a size is below 1.
    """
    if min(sizes) < 1:
        raise ValueError(f"The layer sizes are {list(sizes)}: each must be at least 1. Correct the one below 1.")
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _inputs(batch: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]
