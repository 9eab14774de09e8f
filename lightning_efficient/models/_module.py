"""What every LightningModule here shares: when its optimizer is built, over which parameters, and means over ranks."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
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


def load_weights(module: nn.Module, path: str, *, prefix: str) -> None:
    """Load the weights of a Lightning checkpoint into a part of a LightningModule; every one has to be there.

    Args:
        module: the part.
        path: of the checkpoint.
        prefix: of its names in the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names or shapes are not those of ``module``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no checkpoint {path!r} (looked from {Path.cwd()}): pretrained needs one. Make it first (the "
            "recipe lora_fa/pretrain does), or correct the path."
        )
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: tensor for name, tensor in stored["state_dict"].items() if name.startswith(prefix)}
        module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    except (RuntimeError, KeyError, UnpicklingError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"The weights in {path!r} do not fit the model ({' '.join(line.strip() for line in lines)[:300]}). Give "
            "the sizes that it was trained with, and a checkpoint of the whole model."
        ) from error


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
