"""Efficient training as drop-in parts for `lightning.pytorch.Trainer`.

Importing the package registers the strategy names, so that `Trainer(strategy="acp_sgd")` works. The parts themselves
are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_efficient._compat import require_lightning

require_lightning()

import lightning_efficient.strategies as _strategies  # noqa: E402  (only once lightning is known to be there)

if TYPE_CHECKING:
    from lightning_efficient.callbacks import (
        AttachOptimizer,
        CompressionMonitor,
        Dissect,
        LoRAFA,
        MoEMonitor,
        OptimizerGuard,
        PEFTAdapter,
        load_lora_fa_checkpoint,
    )
    from lightning_efficient.cli import EfficientCLI
    from lightning_efficient.compression import (
        ACPSGD,
        Compressor,
        HalfPrecision,
        PowerSGD,
        SignSGD,
        TopK,
        register_compressor,
    )
    from lightning_efficient.lora_fa import (
        LoRAFAConfig,
        LoRAFAReport,
        apply_lora_fa,
        export_peft,
        load_peft,
        lora_fa_linear,
        merge,
        saved_bytes,
        unmerge,
    )
    from lightning_efficient.models import MoELlamaLM
    from lightning_efficient.moe import MoELayer, aux_loss
    from lightning_efficient.optimizers import Eva, EvaP
    from lightning_efficient.precision import LoRAFAHalfPrecision
    from lightning_efficient.strategies import CompressedDDPStrategy, FullyShardedStrategy, ParmStrategy

__version__ = "0.1.0.dev0"

__all__ = [
    "ACPSGD",
    "AttachOptimizer",
    "CompressedDDPStrategy",
    "CompressionMonitor",
    "Compressor",
    "Dissect",
    "EfficientCLI",
    "Eva",
    "EvaP",
    "FullyShardedStrategy",
    "HalfPrecision",
    "LoRAFA",
    "LoRAFAConfig",
    "LoRAFAHalfPrecision",
    "LoRAFAReport",
    "MoELayer",
    "MoELlamaLM",
    "MoEMonitor",
    "OptimizerGuard",
    "PEFTAdapter",
    "ParmStrategy",
    "PowerSGD",
    "SignSGD",
    "TopK",
    "__version__",
    "apply_lora_fa",
    "aux_loss",
    "export_peft",
    "load_lora_fa_checkpoint",
    "load_peft",
    "lora_fa_linear",
    "merge",
    "register_compressor",
    "saved_bytes",
    "unmerge",
]

_HOMES = {
    "ACPSGD": "compression",
    "AttachOptimizer": "callbacks",
    "CompressedDDPStrategy": "strategies",
    "CompressionMonitor": "callbacks",
    "Compressor": "compression",
    "Dissect": "callbacks",
    "EfficientCLI": "cli",
    "Eva": "optimizers",
    "EvaP": "optimizers",
    "FullyShardedStrategy": "strategies",
    "HalfPrecision": "compression",
    "LoRAFA": "callbacks",
    "LoRAFAConfig": "lora_fa",
    "LoRAFAHalfPrecision": "precision",
    "LoRAFAReport": "lora_fa",
    "MoELayer": "moe",
    "MoELlamaLM": "models",
    "MoEMonitor": "callbacks",
    "OptimizerGuard": "callbacks",
    "PEFTAdapter": "callbacks",
    "ParmStrategy": "strategies",
    "PowerSGD": "compression",
    "SignSGD": "compression",
    "TopK": "compression",
    "apply_lora_fa": "lora_fa",
    "aux_loss": "moe",
    "export_peft": "lora_fa",
    "load_lora_fa_checkpoint": "callbacks",
    "load_peft": "lora_fa",
    "lora_fa_linear": "lora_fa",
    "merge": "lora_fa",
    "register_compressor": "compression",
    "saved_bytes": "lora_fa",
    "unmerge": "lora_fa",
}

_strategies.register()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
