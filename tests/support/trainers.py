"""Trainers for tests: on the CPU, quiet, in float64, and with nothing that reorders or saves unasked.

Inside `tests.support.ranks.run_ranks` a Trainer finds the environment of an external launcher and a process group that
already exists, and takes part as that rank.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "precision": "64-true",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    # Lightning's own sampler shuffles training data whatever the loader says.
    "use_distributed_sampler": False,
}


def make_trainer(world_size: int, **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer for this rank; `kwargs` go over the defaults."""
    return pl.Trainer(**{**QUIET, "devices": world_size, **kwargs})


@contextmanager
def logged_lines() -> Iterator[list[str]]:
    """The lines that Lightning's `rank_zero_info` logs inside the block, on this rank."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("lightning.pytorch"), Keep()
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
