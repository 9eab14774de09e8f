"""A recipe trained for as long as one callback wants, and nothing saved: for commands that measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from lightning_efficient.cli.efficient_cli import EfficientCLI

# These save, or end training early. All others stay: they may change the model.
_LEFT_OUT = (Checkpoint, EarlyStopping, ProgressBar)
# As many times more than are needed; finite, as schedules of learning rates ask how many there will be.
_AMPLE = 10


class _NoPlateaus(Callback):
    """Takes off the schedules that wait for a metric of validation, which a short run has not."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        configs = trainer.strategy.lr_scheduler_configs
        trainer.strategy.lr_scheduler_configs = [each for each in configs if not each.reduce_on_plateau]


class ShortRunCLI(EfficientCLI):
    """`fit` with a callback that ends the run: parses, overrides and launches as the user's own run does.

    Args:
        recipe_args: the recipe and its overrides, as words of the command line.
        callback: measures, and ends the run.
        steps: that it needs.
        left_out: classes of callbacks that would be in its way.
    """

    def __init__(
        self, recipe_args: Sequence[str], callback: Callback, *, steps: int, left_out: tuple[type, ...] = ()
    ) -> None:
        self.callback = callback
        self._steps = steps
        self._left_out = (*_LEFT_OUT, *left_out)
        super().__init__(["fit", *recipe_args], save_config_callback=None)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        init = self.config_init["fit"]["trainer"]
        given = init.get("callbacks") or []
        callbacks: list[Callback] = given if isinstance(given, list) else [given]
        kept = [each for each in callbacks if not isinstance(each, self._left_out)]
        # The one that measures last, so that its steps begin when those of the others have.
        init["callbacks"] = [*kept, _NoPlateaus(), self.callback]
        return super().instantiate_trainer(
            **kwargs,
            logger=DummyLogger(),  # callbacks that insist on a logger keep working
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            fast_dev_run=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            # An epoch has one step at least.
            max_epochs=max(_AMPLE * self._steps, init.get("max_epochs") or 0),
            max_steps=max(_AMPLE * self._steps, init.get("max_steps") or 0),
            max_time=None,
            min_epochs=None,
            min_steps=None,
        )
