"""Optimizers: usable wherever torch's own are, in a Trainer or a plain loop."""

from lightning_efficient.optimizers.eva import Eva
from lightning_efficient.optimizers.eva_p import EvaP

__all__ = ["Eva", "EvaP"]
