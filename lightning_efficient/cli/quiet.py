"""Keeps Lightning's advertisements and known false alarms away from the user. Real warnings stay."""

from __future__ import annotations

import logging
import os
import warnings

_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")
_ADVERTISEMENTS = ("💡 Tip", "TPU available: False")
_FALSE_ALARMS = (
    # No tensorboard: the CSV logger is a fine default, not a problem.
    r".*`tensorboardX` has been removed as a dependency",
    # Lightning calls a torch function that torch has since deprecated: nothing the user could change.
    r".*isinstance\(treespec, LeafSpec\)` is deprecated",
)


def quiet_known_noise() -> None:
    """Silence the messages listed in this file, for this process. Calling it again changes nothing."""
    # LightningCLI calls functions that jsonargparse has since deprecated.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_news)
    for pattern in _FALSE_ALARMS:
        warnings.filterwarnings("ignore", message=pattern)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ADVERTISEMENTS)
