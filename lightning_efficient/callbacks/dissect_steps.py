"""The optimizer steps of a fit, as `Dissect` counts them: whoever takes them, and whether there are enough."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

# In which no optimizer of a module that optimizes by itself took a step: then none will.
_MOST_BATCHES = 1000


class StepCounter:
    """Tells at the start of a batch whether an optimizer step has ended.

    A module that optimizes by itself may step torch's own optimizers, of which the Trainer's count knows nothing.

    Args:
        trainer: of the fit.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._by_itself = not trainer.lightning_module.automatic_optimization
        self._taken = self._batches = 0
        self._seen: tuple[int, int] | None = None
        watched = [each for each in trainer.optimizers if isinstance(each, Optimizer)] if self._by_itself else []
        self._hooks = [each.register_step_post_hook(self._count) for each in watched]

    @property
    def ended(self) -> bool:
        """Whether a step has ended since :meth:`go_on`; True before the first."""
        return self._seen != (self._trainer.global_step, self._taken)

    @property
    def stuck(self) -> str:
        """Why no step will ever end; empty as long as one may."""
        if not self._by_itself or self._batches <= _MOST_BATCHES:
            return ""
        return (
            f"in {_MOST_BATCHES} batches of {type(self._trainer.lightning_module).__name__}, which optimizes by "
            "itself, no optimizer of configure_optimizers took a step. Return those that do."
        )

    def start_batch(self) -> None:
        """Another batch begins."""
        self._batches += 1

    def go_on(self) -> None:
        """The next step begins."""
        self._seen, self._batches = (self._trainer.global_step, self._taken), 0

    def remove(self) -> None:
        """Take the hooks off."""
        while self._hooks:
            self._hooks.pop().remove()

    def _count(self, *step: Any) -> None:
        self._taken += 1


def require_steps(trainer: pl.Trainer, needed: int, of_what: str) -> None:
    """Refuse a fit that is too short.

    Args:
        trainer: of the fit.
        needed: optimizer steps.
        of_what: how they come about, in words.

    Raises:
        MisconfigurationException: it has fewer steps.
    """
    total = trainer.estimated_stepping_batches
    # A module that optimizes by itself may step several times a batch: its steps are batches.
    by_itself = not trainer.lightning_module.automatic_optimization
    steps = total - (trainer.fit_loop.total_batch_idx + 1 if by_itself else trainer.global_step)
    # Lightning says -1 for data of unknown length.
    if total >= 0 and math.isfinite(steps) and steps < needed:
        raise MisconfigurationException(
            f"The fit has {steps:.0f} optimizer steps, and Dissect needs {needed} ({of_what}): it could not finish. "
            "Train longer (max_steps, max_epochs, limit_train_batches), or ask for fewer."
        )
