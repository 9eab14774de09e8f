"""A module whose cases end as they are told to: for real sweeps over real processes."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

MIB = 2**20


class Tokens(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((8,), index % 7)


class TokenData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Tokens(), batch_size=self.batch_size)


class Toy(pl.LightningModule):
    """Notes each run in `runs.txt` of the working folder, then does as ``kind`` says."""

    def __init__(self, kind: str = "ok", mib_per_row: int = 0) -> None:
        super().__init__()
        self.kind, self.mib_per_row = kind, mib_per_row
        self.layer = nn.Linear(8, 8)
        self.held: Tensor | None = None

    @override
    def on_train_start(self) -> None:
        with Path("runs.txt").open("a") as file:
            file.write(f"{os.getpid()} {self.kind}\n")
        if self.kind == "crash":
            raise RuntimeError("the toy fell off the table")
        if self.kind == "hang":
            child = subprocess.Popen(["sleep", "600"])
            Path("hanging.txt").write_text(f"{os.getpid()} {child.pid}")
        while self.kind == "hang" or (self.kind == "slow" and not Path("go.txt").exists()):
            time.sleep(0.05)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.held = None
        self.held = torch.empty(len(batch) * self.mib_per_row * MIB // 4)  # memory that grows with the batch
        loss: Tensor = self.layer(batch.float()).square().mean()
        return loss * float("nan") if self.kind == "nan" else loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)
