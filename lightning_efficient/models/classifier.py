"""What an image or vector classifier does with a batch.

Dimension letters: B batch, C classes.
"""

import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_efficient.models._module import EpochMean, TrainableModule


class Classifier(TrainableModule):
    """Training, validation and prediction for a model that maps inputs (B, ...) to logits (B, C).

    A batch is ``(inputs, labels)`` with labels (B,) int64. Logs ``train_loss`` per step; ``val_loss`` and
    ``val_accuracy`` (or ``test_...``) over the epoch and all ranks.

    Args:
        num_classes: C.
        optimizer: called with the parameters that train, in ``configure_optimizers``.
        lr_scheduler: called with the optimizer; advances once per step.
    """

    def __init__(
        self, num_classes: int, *, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}: there is nothing to tell apart. Set it to 2 or more.")
        self.val_loss, self.test_loss = EpochMean(), EpochMean()
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy, a scalar."""
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(labels))
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate(batch, "val", self.val_loss, self.val_accuracy)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate(batch, "test", self.test_loss, self.test_accuracy)

    @override
    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Return the most likely class of each input, (B,) int64. A batch may come without labels."""
        logits_BC: Tensor = self(batch if isinstance(batch, Tensor) else batch[0])
        return logits_BC.argmax(-1)

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], stage: str, mean_loss: EpochMean, accuracy: MulticlassAccuracy
    ) -> None:
        inputs, labels = batch
        logits_BC = self(inputs)
        mean_loss.update(F.cross_entropy(logits_BC, labels), len(labels))
        accuracy.update(logits_BC, labels)
        metrics = {f"{stage}_loss": mean_loss, f"{stage}_accuracy": accuracy}
        self.log_dict(metrics, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(labels))
