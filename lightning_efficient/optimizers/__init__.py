"""Optimizers: usable wherever torch's own are, in a Trainer or a plain loop."""

from lightning_efficient.optimizers.eva import Eva

__all__ = ["Eva"]
