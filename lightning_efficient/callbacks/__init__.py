"""Lightning callbacks: thin plugins that decide when a technique is called."""

from lightning_efficient.callbacks.attach_optimizer import AttachOptimizer
from lightning_efficient.callbacks.compression_monitor import CompressionMonitor
from lightning_efficient.callbacks.dissect import Dissect
from lightning_efficient.callbacks.lora_fa import LoRAFA
from lightning_efficient.callbacks.lora_fa_checkpoint import load_lora_fa_checkpoint
from lightning_efficient.callbacks.moe_monitor import MoEMonitor
from lightning_efficient.callbacks.optimizer_guard import OptimizerGuard
from lightning_efficient.callbacks.peft_adapter import PEFTAdapter

__all__ = [
    "AttachOptimizer",
    "CompressionMonitor",
    "Dissect",
    "LoRAFA",
    "MoEMonitor",
    "OptimizerGuard",
    "PEFTAdapter",
    "load_lora_fa_checkpoint",
]
