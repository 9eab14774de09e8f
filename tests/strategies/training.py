"""Trainings with a compressing strategy that the claims in this folder share; each runs inside a rank."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_efficient.compression import ACPSGD, Compressor
from lightning_efficient.strategies import CompressedDDPStrategy
from tests.plugins.tiny import TinyData, TinyModule
from tests.support.trainers import make_trainer

EPOCHS = 2
SMALL_BUCKETS_MB = 0.0001
"""Puts nearly every parameter of the tiny module into a bucket of its own."""


def fit(
    world_size: int,
    compressor: Compressor | None = None,
    *,
    module: pl.LightningModule | None = None,
    data: TinyData | None = None,
    ckpt_path: str | None = None,
    ddp: dict[str, Any] | None = None,
    **trainer_kwargs: Any,
) -> tuple[pl.LightningModule, pl.Trainer]:
    """Train the tiny module in float64, `EPOCHS` epochs unless told otherwise."""
    strategy = CompressedDDPStrategy(compressor or ACPSGD(rank=2), **(ddp or {}))
    module = TinyModule().double() if module is None else module
    trainer = make_trainer(world_size, strategy=strategy, **{"max_epochs": EPOCHS, **trainer_kwargs})
    trainer.fit(module, data or TinyData(), ckpt_path=ckpt_path)
    return module, trainer


def compressor_of(trainer: pl.Trainer) -> Compressor:
    assert isinstance(trainer.strategy, CompressedDDPStrategy)
    return trainer.strategy.compressor


def errors(trainer: pl.Trainer) -> dict[str, Tensor]:
    """This rank's own error buffers."""
    states = compressor_of(trainer).state_dict(sync=False)["parameters"]
    return {name: state["error"] for name, state in states.items()}


def message_of(*args: Any, **kwargs: Any) -> str:
    """Fit and return type and text of the error that it ends with."""
    try:
        fit(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class At(Callback):
    """Calls `act(trainer, module)` before given batches, counted over all epochs."""

    def __init__(self, batches: Sequence[int], act: Any) -> None:
        self.batches, self.act, self.seen = batches, act, 0

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.seen in self.batches:
            self.act(trainer, pl_module)
        self.seen += 1
