"""A model and a data module for the tests of the command line, importable by the ranks it launches."""

import os
import time

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class ToyModel(pl.LightningModule):
    """A linear map; can leave a parameter out of the optimizer, and can make rank 1 die in the middle of training."""

    def __init__(
        self,
        size: int = 4,
        optimizer: OptimizerCallable = torch.optim.SGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        forget_bias: bool = False,
        rank_1_dies_at_step: int = -1,
        step_seconds: float = 0.0,
        has_a_bug: bool = False,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}.")
        self.optimizer, self.forget_bias = optimizer, forget_bias
        self.rank_1_dies_at_step, self.step_seconds = rank_1_dies_at_step, step_seconds
        self.has_a_bug = has_a_bug
        self.net = nn.Linear(4, size)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        if self.global_rank == 1 and self.global_step == self.rank_1_dies_at_step:
            os._exit(7)
        if self.has_a_bug:
            raise ValueError("a bug of the user")
        time.sleep(self.step_seconds)
        if self.step_seconds and self.global_rank == 0 and self.global_step == 1:
            print("training has started", flush=True)
        loss = self.net(batch[0]).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([self.net.weight] if self.forget_bias else self.net.parameters())


class ScheduledModel(ToyModel):
    """Its learning rates depend on how long the training is, and on validation."""

    def configure_optimizers(self) -> dict[str, object]:  # type: ignore[override]
        optimizer = self.optimizer(self.net.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        schedules = [
            {"scheduler": one_cycle, "interval": "step"},
            {"scheduler": plateau, "monitor": "val_loss"},
        ]
        return [optimizer], schedules  # type: ignore[return-value]


class RawModel(ToyModel):
    """Steps torch's own optimizer, of which the Trainer's step count knows nothing."""

    def __init__(self, **kwargs: int) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()  # type: ignore[union-attr]
        loss = self.net(batch[0]).square().mean()
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        return loss


class ToyData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4, num_batches: int = 4) -> None:
        super().__init__()
        self.batch_size, self.num_batches = batch_size, num_batches

    def train_dataloader(self) -> DataLoader:
        x = torch.ones(self.batch_size * self.num_batches, 4)
        return DataLoader(TensorDataset(x), batch_size=self.batch_size)

    val_dataloader = train_dataloader
