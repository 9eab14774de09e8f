"""Strategies: how a Trainer spreads the work over processes, by the names recipes use.

Importing :mod:`lightning_efficient` registers the names; a name works in ``Trainer(strategy=...)`` from then on.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_efficient.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_efficient.strategies.fully_sharded import FullyShardedStrategy
from lightning_efficient.strategies.parm import ParmStrategy

__all__ = ["CompressedDDPStrategy", "FullyShardedStrategy", "ParmStrategy"]

_NAMES = {
    "acp_sgd": "DDP whose gradients travel as one low-rank factor per step (ACP-SGD)",
    "power_sgd": "DDP whose gradients travel as two low-rank factors per step (Power-SGD)",
    "top_k": "DDP whose gradients travel as their largest elements, with error feedback",
    "sign_sgd": "DDP whose gradients travel as signs, decided by majority vote",
}


def register() -> None:
    """Register the strategies' names with Lightning; calling it again changes nothing."""
    for name, description in _NAMES.items():
        StrategyRegistry.register(name, CompressedDDPStrategy, description=description, override=True, compressor=name)
    StrategyRegistry.register(
        "parm",
        ParmStrategy,
        description="mixtures of experts spread over ranks, by schedules chosen from measured links (Parm)",
        override=True,
    )
