"""LoRA-FA: adapters that stop storing activations (arXiv 2308.03303), in plain torch."""

from lightning_efficient._saved_bytes import SavedBytes, saved_bytes
from lightning_efficient.lora_fa.adapters import disable_adapter, merge, orthonormalize, set_adapter, unmerge
from lightning_efficient.lora_fa.calibrate import calibrate
from lightning_efficient.lora_fa.compare import SavedBytesTable, compare_saved_bytes
from lightning_efficient.lora_fa.config import LoRAFAConfig
from lightning_efficient.lora_fa.functional import lora_fa_linear
from lightning_efficient.lora_fa.inject import LoRAFAReport, apply_lora_fa
from lightning_efficient.lora_fa.layer import LoRAFALinear
from lightning_efficient.lora_fa.peft_format import export_peft
from lightning_efficient.lora_fa.peft_load import load_peft
from lightning_efficient.lora_fa.state import keep_adapters_only

__all__ = [
    "LoRAFAConfig",
    "LoRAFALinear",
    "LoRAFAReport",
    "SavedBytes",
    "SavedBytesTable",
    "apply_lora_fa",
    "calibrate",
    "compare_saved_bytes",
    "disable_adapter",
    "export_peft",
    "keep_adapters_only",
    "load_peft",
    "lora_fa_linear",
    "merge",
    "orthonormalize",
    "saved_bytes",
    "set_adapter",
    "unmerge",
]
