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


class ShortRunCLI(EfficientCLI):
    """`fit` with a callback that ends the run: parses, overrides and launches as the user's own run does.

    Args:
        recipe_args: the recipe and its overrides, as words of the command line.
        callback: measures, and ends the run.
        left_out: classes of callbacks that would be in its way.
    """

    def __init__(self, recipe_args: Sequence[str], callback: Callback, *, left_out: tuple[type, ...] = ()) -> None:
        self.callback = callback
        self._left_out = (*_LEFT_OUT, *left_out)
        super().__init__(["fit", *recipe_args], save_config_callback=None)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        init = self.config_init["fit"]["trainer"]
        given = init.get("callbacks") or []
        callbacks: list[Callback] = given if isinstance(given, list) else [given]
        # Last, so that its steps begin when those of the others have.
        init["callbacks"] = [*(each for each in callbacks if not isinstance(each, self._left_out)), self.callback]
        return super().instantiate_trainer(
            **kwargs,
            logger=DummyLogger(),  # callbacks that insist on a logger keep working
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            fast_dev_run=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            max_epochs=-1,
            max_steps=-1,
            max_time=None,
            min_epochs=None,
            min_steps=None,
        )
