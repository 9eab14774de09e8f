"""What every LightningModule here shares: when its optimizer is built, over which parameters, and means over ranks."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric
from typing_extensions import override


class TrainableModule(LightningModule):
    """A module that builds its optimizer late, over exactly the parameters that train.

    Late means in ``configure_optimizers``: adapters that a callback put in, and modules of ``configure_model``, are in
    it. A schedule advances once per optimizer step.

    Args:
        optimizer: called with the list of parameters that require gradients.
        lr_scheduler: called with the optimizer; ``None`` keeps the learning rate.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler

    @override
    def configure_optimizers(self) -> Optimizer | OptimizerLRSchedulerConfig:
        """Build the optimizer and its schedule.

        Raises:
            ValueError: every parameter is frozen.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(
                f"{type(self).__name__} has no parameter to train: all of them are frozen. Set requires_grad on some, "
                "or add adapters before the optimizer is built (a callback's setup is early enough)."
            )
        optimizer = self._make_optimizer(parameters)
        if self._make_lr_scheduler is None:
            return optimizer
        scheduler = self._make_lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            # It needs a measured value: Lightning's own subclass names it, torch's does not.
            monitor = getattr(scheduler, "monitor", "val_loss")
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "epoch", "monitor": monitor},
            }
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class EpochMean(Metric):
    """A weighted mean over an epoch and all ranks, to be logged as an object.

    Two shorter ways are wrong: ``self.log(value, sync_dist=True)`` averages the ranks' counts as integers (lightning
    2.6.6), and torchmetrics' ``MeanMetric`` either looks for NaN, which stalls a GPU in every batch, or, told not to,
    leaves the weights out (torchmetrics 1.9).
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")

    @override
    def update(self, value: Tensor, weight: Tensor | int) -> None:
        """Add ``value``, a scalar mean over ``weight`` examples."""
        self.total += value.detach() * weight
        self.weight += weight

    @override
    def compute(self) -> Tensor:
        """Return the mean; NaN if there was nothing."""
        return self.total / self.weight
