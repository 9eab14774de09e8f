"""Every plugin of the package, one row each: the generic tests beside this file run all of them for every row.

A new technique adds one row, and a reference to `references.py` if its arithmetic is new.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_efficient.callbacks import CompressionMonitor, OptimizerGuard
from lightning_efficient.compression import ACPSGD, Compressor, HalfPrecision, PowerSGD, SignSGD, TopK
from lightning_efficient.strategies import CompressedDDPStrategy
from tests.plugins import references
from tests.plugins.references import Reduce

TrainerArgs = dict[str, Any]

EXACT = 1e-12
"""Sums of float64 terms in another order over a dozen steps give a few 1e-15; a wrong formula shows as 1e-3."""


@dataclass(frozen=True)
class Oracle:
    """A setting and what training in it must equal.

    Attributes:
        trainer: Makes the Trainer arguments of the setting, with fresh objects.
        reference: Makes what turns all ranks' gradients into the one that is applied.
    """

    trainer: Callable[[], TrainerArgs]
    reference: Callable[[], Reduce]


@dataclass(frozen=True)
class Row:
    """One plugin.

    Attributes:
        trainer: Makes the Trainer arguments that put it to work, with fresh objects.
        yaml: The same as the `trainer:` section of a recipe.
        plugin: Finds it in a Trainer.
        activity: Reads the counter that moves when it does something.
        oracles: Settings in which it must equal a reference, by name; one of them is exact or the identity.
        lr: Learning rate at which the tiny module learns.
    """

    trainer: Callable[[], TrainerArgs]
    yaml: TrainerArgs
    plugin: Callable[[pl.Trainer], Any]
    activity: Callable[[Any], float]
    oracles: dict[str, Oracle]
    lr: float = 0.5


def compressing(make: Callable[[], Compressor | str], **kwargs: Any) -> Callable[[], TrainerArgs]:
    return lambda: {"strategy": CompressedDDPStrategy(make(), **kwargs)}


def compressor_row(
    make: Callable[[], Compressor], init_args: dict[str, Any], oracles: dict[str, Oracle], **kwargs: Any
) -> Row:
    """A row of a compressor, which `init_args` describe in YAML."""
    return Row(
        trainer=compressing(make),
        yaml={
            "strategy": {
                "class_path": "lightning_efficient.strategies.CompressedDDPStrategy",
                "init_args": {
                    "compressor": {
                        "class_path": f"lightning_efficient.compression.{type(make()).__name__}",
                        "init_args": init_args,
                    }
                },
            }
        },
        plugin=lambda trainer: trainer.strategy.compressor,  # type: ignore[attr-defined]
        activity=lambda compressor: compressor.stats.collectives,
        oracles=oracles,
        **kwargs,
    )


def callback_row(
    callback: type[Callback],
    init_args: dict[str, Any],
    activity: Callable[[Any], float],
    *,
    strategy: str,
    like: Callable[[], Reduce],
) -> Row:
    """A row of a callback that only watches: training with it must equal training without."""

    def trainer() -> TrainerArgs:
        return {"strategy": strategy, "callbacks": [callback(**init_args)]}

    def plugin(trainer: pl.Trainer) -> Callback:
        return next(each for each in trainer.callbacks if isinstance(each, callback))  # type: ignore[attr-defined]

    return Row(
        trainer=trainer,
        yaml={
            "strategy": strategy,
            "callbacks": [{"class_path": f"lightning_efficient.callbacks.{callback.__name__}", "init_args": init_args}],
        },
        plugin=plugin,
        activity=activity,
        oracles={"without it": Oracle(trainer, like)},
    )


ROWS: dict[str, Row] = {
    "acp_sgd": compressor_row(
        lambda: ACPSGD(rank=2),
        {"rank": 2},
        {
            "warming up": Oracle(compressing(lambda: ACPSGD(rank=2, warmup_steps=1000)), lambda: references.mean),
            "nothing worth it": Oracle(compressing(lambda: ACPSGD(min_compression_rate=1e9)), lambda: references.mean),
            "rank 2": Oracle(compressing(lambda: ACPSGD(rank=2)), references.acp(2)),
            "rank 2, many buckets": Oracle(
                compressing(lambda: ACPSGD(rank=2), bucket_cap_mb=0.0001), references.acp(2)
            ),
        },
    ),
    "power_sgd": compressor_row(
        lambda: PowerSGD(rank=2),
        {"rank": 2},
        {
            # Every matrix of the tiny module has its smaller side up to 14: two full factors lose nothing.
            "full rank": Oracle(
                compressing(lambda: PowerSGD(rank=16, min_compression_rate=0)), lambda: references.mean
            ),
            "rank 2": Oracle(compressing(lambda: PowerSGD(rank=2)), references.power(2)),
            "rank 2, many buckets": Oracle(
                compressing(lambda: PowerSGD(rank=2), bucket_cap_mb=0.0001), references.power(2)
            ),
        },
    ),
    "top_k": compressor_row(
        lambda: TopK(density=0.2),
        {"density": 0.2},
        {
            "everything sent": Oracle(compressing(lambda: TopK(density=1.0)), lambda: references.mean),
            "a fifth sent": Oracle(compressing(lambda: TopK(density=0.2)), references.top_k(0.2)),
        },
    ),
    "sign_sgd": compressor_row(
        SignSGD,
        {},
        {
            "warming up": Oracle(compressing(lambda: SignSGD(warmup_steps=1000)), lambda: references.mean),
            "majority": Oracle(compressing(SignSGD), lambda: references.majority),
        },
        lr=0.02,
    ),
    "half": compressor_row(
        HalfPrecision,
        {"dtype": "bfloat16"},
        {
            "warming up": Oracle(compressing(lambda: HalfPrecision(warmup_steps=1000)), lambda: references.mean),
            "bfloat16": Oracle(compressing(HalfPrecision), lambda: references.in_bfloat16),
        },
    ),
    "OptimizerGuard": callback_row(
        OptimizerGuard, {}, lambda guard: guard.stats.trainable, strategy="ddp", like=lambda: references.mean
    ),
    "CompressionMonitor": callback_row(
        CompressionMonitor,
        {"every_n_steps": 2},
        lambda monitor: monitor.stats.get("compression/bytes_per_step", 0.0),
        strategy="acp_sgd",
        like=references.acp(4),
    ),
}
