"""Lightning precision plugins."""

from lightning_efficient.precision.lora_fa import LoRAFAHalfPrecision

__all__ = ["LoRAFAHalfPrecision"]
