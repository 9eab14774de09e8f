"""Every plugin of the package, one row each: the generic tests beside this file run all of them for every row.

A new technique adds one row, and a reference to `references.py` if its arithmetic is new.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD, Adam

from lightning_efficient.callbacks import (
    AttachOptimizer,
    CompressionMonitor,
    Dissect,
    LoRAFA,
    MoEMonitor,
    OptimizerGuard,
    PEFTAdapter,
)
from lightning_efficient.compression import ACPSGD, Compressor, HalfPrecision, PowerSGD, SignSGD, TopK
from lightning_efficient.optimizers import Eva, EvaP
from lightning_efficient.strategies import CompressedDDPStrategy, ParmStrategy
from tests.plugins import references
from tests.plugins.reference_eva import eva, eva_s
from tests.plugins.reference_eva_p import eva_p
from tests.plugins.reference_lora_fa import lora_fa
from tests.plugins.reference_peft import peft_by_hand
from tests.plugins.references import Reduce, Reference, exchanging
from tests.plugins.tiny import PLAIN_SGD, MakeOptimizer, TinyModule, TinyMoEModule, sgd

TrainerArgs = dict[str, Any]

EXACT = 1e-12
"""Sums of float64 terms in another order over a dozen steps give a few 1e-15; a wrong formula shows as 1e-3."""


SMALL_STEPS = sgd(0.02)
"""For updates that do not shrink with the gradient."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What trains: Trainer arguments and an optimizer.

    Attributes:
        trainer: Makes the Trainer arguments, with fresh objects.
        optimizer: Makes the optimizer of the tiny module.
    """

    trainer: Callable[[], TrainerArgs]
    optimizer: MakeOptimizer = PLAIN_SGD


@dataclass(frozen=True, kw_only=True)
class Oracle(Setting):
    """A setting and what training in it must equal.

    Attributes:
        reference: The same in one process.
    """

    reference: Reference


@dataclass(frozen=True, kw_only=True)
class Row(Setting):
    """One plugin, in a setting that puts it to work.

    Attributes:
        yaml: The setting as a recipe.
        plugin: Finds what the recipe describes in a Trainer, or makes it of the module; nothing has run yet.
        activity: Reads the counter that moves when it does something.
        oracles: Settings in which it must equal a reference, by name; one of them is exact or the identity.
        module: What trains.
    """

    yaml: dict[str, Any]
    plugin: Callable[[pl.Trainer, TinyModule], Any]
    activity: Callable[[pl.Trainer], float]
    oracles: dict[str, Oracle]
    module: type[TinyModule] = TinyModule


def compressing(make: Callable[[], Compressor | str], **kwargs: Any) -> Callable[[], TrainerArgs]:
    return lambda: {"strategy": CompressedDDPStrategy(make(), **kwargs)}


def compressed(
    make: Callable[[], Compressor], reduce: Callable[[], Reduce], *, optimizer: MakeOptimizer = PLAIN_SGD, **kwargs: Any
) -> Oracle:
    """Training with a compressor must equal the optimizer on what `reduce` makes of the gradients."""
    return Oracle(trainer=compressing(make, **kwargs), optimizer=optimizer, reference=exchanging(reduce, optimizer))


def compressor_row(
    make: Callable[[], Compressor],
    init_args: dict[str, Any],
    oracles: dict[str, Oracle],
    *,
    optimizer: MakeOptimizer = PLAIN_SGD,
) -> Row:
    """A row of a compressor, which `init_args` describe in YAML."""
    strategy = {
        "class_path": "lightning_efficient.strategies.CompressedDDPStrategy",
        "init_args": {
            "compressor": {
                "class_path": f"lightning_efficient.compression.{type(make()).__name__}",
                "init_args": init_args,
            }
        },
    }
    return Row(
        trainer=compressing(make),
        optimizer=optimizer,
        yaml={"trainer": {"strategy": strategy}},
        plugin=lambda trainer, _: trainer.strategy.compressor,  # type: ignore[attr-defined]
        activity=lambda trainer: trainer.strategy.compressor.stats.collectives,  # type: ignore[attr-defined]
        oracles=oracles,
    )


def callback_row(
    callback: type[Callback],
    init_args: dict[str, Any],
    activity: Callable[[Any], float],
    *,
    strategy: str,
    oracle: str,
    reference: Reference,
    optimizer: MakeOptimizer = PLAIN_SGD,
) -> Row:
    """A row of a callback, whose setting must equal `reference`."""

    def trainer() -> TrainerArgs:
        return {"strategy": strategy, "callbacks": [callback(**init_args)]}

    def plugin(trainer: pl.Trainer) -> Callback:
        return next(each for each in trainer.callbacks if isinstance(each, callback))  # type: ignore[attr-defined]

    by_yaml = {"class_path": f"lightning_efficient.callbacks.{callback.__name__}", "init_args": init_args}
    return Row(
        trainer=trainer,
        optimizer=optimizer,
        yaml={"trainer": {"strategy": strategy, "callbacks": [by_yaml]}},
        plugin=lambda trainer, _: plugin(trainer),
        activity=lambda trainer: activity(plugin(trainer)),
        oracles={oracle: Oracle(trainer=trainer, optimizer=optimizer, reference=reference)},
    )


def making_eva(**kwargs: Any) -> MakeOptimizer:
    return lambda parameters: Eva(parameters, **kwargs)


def attaching() -> TrainerArgs:
    return {"strategy": "ddp", "callbacks": [AttachOptimizer()]}


ATTACHING_YAML = {
    "strategy": "ddp",
    "callbacks": [{"class_path": "lightning_efficient.callbacks.AttachOptimizer"}],
}
EVA_P: dict[str, Any] = {"lr": 0.05, "rank": 2, "momentum": 0.8, "weight_decay": 0.0}


def eva_row(reference: Reference, **init_args: Any) -> Row:
    """A row of Eva: it must equal `reference`, and SGD where the damping leaves no curvature."""

    lr, damping = 0.1, 1e20
    # All but Eva-s divide by the damping, not what weight decay adds, so it is left out.
    scaled_lr = lr if init_args["variant"] == "eva_s" else lr * damping
    no_curvature = {**init_args, "lr": scaled_lr, "damping": damping, "kl_clip": None, "weight_decay": 0.0}
    return Row(
        trainer=attaching,
        optimizer=making_eva(**init_args),
        yaml={
            "trainer": ATTACHING_YAML,
            "model": {"optimizer": {"class_path": "lightning_efficient.optimizers.Eva", "init_args": init_args}},
        },
        plugin=lambda _, module: module.configure_optimizers(),
        activity=lambda trainer: sum(each.stats.counted_steps for each in trainer.optimizers),  # type: ignore[attr-defined]
        oracles={
            "written out": Oracle(trainer=attaching, optimizer=making_eva(**init_args), reference=reference),
            "no curvature": Oracle(
                trainer=attaching,
                optimizer=making_eva(**no_curvature),
                reference=exchanging(lambda: references.mean, partial(SGD, lr=lr, momentum=0.9)),
            ),
        },
    )


def parm_row(
    plugin: Callable[[pl.Trainer], Any],
    activity: Callable[[pl.Trainer], float],
    *callbacks: type[Callback],
    **by_name: Any,
) -> Row:
    """A row of what works on experts that are spread over ranks.

    Lightning allows no precision 64-true here; a float64 module under 32-true stays what it is.
    """

    def spread(*sizes: int, schedule: str) -> Callable[[], TrainerArgs]:
        return lambda: {
            "strategy": ParmStrategy(*sizes, schedule=schedule, save_distributed_checkpoint=False),
            "precision": "32-true",
            "callbacks": [each(**by_name) for each in callbacks],
        }

    def oracle(*sizes: int, schedule: str) -> Oracle:
        reference = exchanging(lambda: references.mean, ADAM)
        return Oracle(trainer=spread(*sizes, schedule=schedule), optimizer=ADAM, reference=reference)

    yaml = {
        "strategy": {
            "class_path": "lightning_efficient.strategies.ParmStrategy",
            "init_args": {"expert_parallel_size": 2, "schedule": "s1_hier/2", "save_distributed_checkpoint": False},
        },
        "precision": "32-true",
        "callbacks": [
            {"class_path": f"lightning_efficient.callbacks.{each.__name__}", "init_args": by_name} for each in callbacks
        ],
    }
    return Row(
        trainer=spread(1, 2, 1, schedule="s1_hier/2"),
        optimizer=ADAM,
        yaml={"trainer": yaml},
        plugin=lambda trainer, _: plugin(trainer),
        activity=activity,
        oracles={
            "experts apart": oracle(1, 2, 1, schedule="s1_hier/2"),
            "experts cut": oracle(1, 1, 2, schedule="s1/1"),
            "experts everywhere": oracle(1, 1, 1, schedule="s2/1"),
        },
        module=TinyMoEModule,
    )


def moe_monitor(trainer: pl.Trainer) -> MoEMonitor:
    return next(each for each in trainer.callbacks if isinstance(each, MoEMonitor))  # type: ignore[attr-defined]


def peft_row() -> Row:
    return callback_row(
        PEFTAdapter,
        {"model_attr": "net", "config": PEFT, "seed": 3},
        lambda callback: callback.stats.get("peft/trainable", 0.0),
        strategy="ddp",
        oracle="trained by hand",
        optimizer=ADAM,
        reference=peft_by_hand(PEFT, seed=3, optimizer=ADAM),
    )


ADAM: MakeOptimizer = partial(Adam, lr=0.03)
LORA_FA: dict[str, Any] = {"r": 4, "alpha": 8.0, "seed": 5}
LORA_FA_ARGS: dict[str, Any] = {"model_attr": "net", "adapter_dtype": "float64", **LORA_FA}
PEFT: dict[str, Any] = {"peft_type": "LORA", "r": 2, "target_modules": "0|2|4"}
EVERYTHING_SEEN: dict[str, Any] = {"kv_samples": None, "g_scale": "expectation", "rescale": "clip"}
"""Settings of Eva with which no way to deal a batch out to ranks and steps changes the vectors."""
# Momentum and weight decay are said because jsonargparse keeps those of SGD, the default, for a class in its place.
EVA: dict[str, Any] = {"lr": 0.1, "damping": 0.03, "kl_clip": 0.02, "momentum": 0.9, "weight_decay": 0.01}
EVA_S: dict[str, Any] = {"lr": 0.1, "damping": 1e-6, "momentum": 0.9, "weight_decay": 0.01}


DISSECT_OUT = str(Path(tempfile.gettempdir()) / "lightning_efficient_dissect")
"""Every test of the row writes its report there."""

ROWS: dict[str, Row] = {
    "acp_sgd": compressor_row(
        lambda: ACPSGD(rank=2),
        {"rank": 2},
        {
            "warming up": compressed(lambda: ACPSGD(rank=2, warmup_steps=1000), lambda: references.mean),
            "nothing worth it": compressed(lambda: ACPSGD(min_compression_rate=1e9), lambda: references.mean),
            "rank 2": compressed(lambda: ACPSGD(rank=2), references.acp(2)),
            "rank 2, many buckets": compressed(lambda: ACPSGD(rank=2), references.acp(2), bucket_cap_mb=0.0001),
        },
    ),
    "power_sgd": compressor_row(
        lambda: PowerSGD(rank=2),
        {"rank": 2},
        {
            # Every matrix of the tiny module has its smaller side up to 14: two full factors lose nothing.
            "full rank": compressed(lambda: PowerSGD(rank=16, min_compression_rate=0), lambda: references.mean),
            "rank 2": compressed(lambda: PowerSGD(rank=2), references.power(2)),
            "rank 2, many buckets": compressed(lambda: PowerSGD(rank=2), references.power(2), bucket_cap_mb=0.0001),
        },
    ),
    "top_k": compressor_row(
        lambda: TopK(density=0.2),
        {"density": 0.2},
        {
            "everything sent": compressed(lambda: TopK(density=1.0), lambda: references.mean),
            "a fifth sent": compressed(lambda: TopK(density=0.2), references.top_k(0.2)),
        },
    ),
    "sign_sgd": compressor_row(
        SignSGD,
        {},
        {
            "warming up": compressed(
                lambda: SignSGD(warmup_steps=1000), lambda: references.mean, optimizer=SMALL_STEPS
            ),
            "majority": compressed(SignSGD, lambda: references.majority, optimizer=SMALL_STEPS),
        },
        optimizer=SMALL_STEPS,
    ),
    "half": compressor_row(
        HalfPrecision,
        {"dtype": "bfloat16"},
        {
            "warming up": compressed(lambda: HalfPrecision(warmup_steps=1000), lambda: references.mean),
            "bfloat16": compressed(HalfPrecision, lambda: references.in_bfloat16),
        },
    ),
    "eva": eva_row(eva("eva", **EVA), variant="eva", **EVA, **EVERYTHING_SEEN),
    "eva_f": eva_row(eva("eva_f", **EVA), variant="eva_f", **EVA, **EVERYTHING_SEEN),
    "eva_s": eva_row(eva_s(**EVA_S), variant="eva_s", **EVA_S),
    "eva_p": Row(
        trainer=attaching,
        optimizer=lambda params: EvaP(params, **EVA_P),
        yaml={
            "trainer": ATTACHING_YAML,
            "model": {"optimizer": {"class_path": "lightning_efficient.optimizers.EvaP", "init_args": EVA_P}},
        },
        plugin=lambda _, module: module.configure_optimizers(),
        activity=lambda trainer: sum(each.stats.counted_steps for each in trainer.optimizers),  # type: ignore[attr-defined]
        oracles={
            "written out": Oracle(
                trainer=attaching, optimizer=lambda params: EvaP(params, **EVA_P), reference=eva_p(**EVA_P)
            ),
        },
    ),
    "OptimizerGuard": callback_row(
        OptimizerGuard,
        {},
        lambda guard: guard.stats.trainable,
        strategy="ddp",
        oracle="without it",
        reference=exchanging(lambda: references.mean),
    ),
    "CompressionMonitor": callback_row(
        CompressionMonitor,
        {"every_n_steps": 2},
        lambda monitor: monitor.stats.get("compression/bytes_per_step", 0.0),
        strategy="acp_sgd",
        oracle="without it",
        reference=exchanging(references.acp(4)),
    ),
    "Dissect": callback_row(
        Dissect,
        # As many steps as an epoch has.
        {"warmup": 0, "clean": 1, "dissect": 1, "memory": 1, "print_report": False, "out": DISSECT_OUT},
        lambda dissect: dissect.stats.get("dissect/forward_ms", 0.0),
        strategy="ddp",
        oracle="without it",
        reference=exchanging(lambda: references.mean),
    ),
    "AttachOptimizer": callback_row(
        AttachOptimizer,
        {"skip": ["net.4"], "log_every_n_steps": 2},
        lambda attach: attach.stats.get("eva/nu", 0.0),
        strategy="ddp",
        optimizer=making_eva(variant="eva_f", **EVA, **EVERYTHING_SEEN),
        oracle="SGD on the skipped layer",
        reference=eva("eva_f", **EVA, skipped=[2]),
    ),
    "LoRAFA": callback_row(
        LoRAFA,
        LORA_FA_ARGS,
        lambda callback: callback.stats.get("lora_fa/trainable", 0.0),
        strategy="ddp",
        oracle="written out",
        optimizer=ADAM,
        reference=lora_fa(**LORA_FA, optimizer=ADAM),
    ),
    "PEFTAdapter": peft_row(),
    "parm": parm_row(lambda trainer: trainer.strategy, lambda trainer: trainer.strategy.stats.bytes_sent),  # type: ignore[attr-defined]
    "MoEMonitor": parm_row(
        moe_monitor,
        lambda trainer: moe_monitor(trainer).stats.get("moe/bytes_per_step", 0.0),
        MoEMonitor,
        every_n_steps=2,
    ),
}
