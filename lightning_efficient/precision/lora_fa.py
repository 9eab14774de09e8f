"""`LoRAFAHalfPrecision`: a frozen base in half precision, adapters in float32."""

from typing import Literal

import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import nn
from typing_extensions import override

from lightning_efficient.lora_fa.inject import is_adapter_key


class LoRAFAHalfPrecision(HalfPrecision):
    """``bf16-true`` (or ``16-true``) for everything but adapters, which stay as they are.

    Lightning's own casts all parameters. An Adam step of 1e-4 is under half a bfloat16 spacing once an entry of B is
    above about 0.05: training would stop silently. Adapters of :class:`~lightning_efficient.callbacks.LoRAFA` refuse
    that cast by themselves; with this plugin those of PEFT do too.

    Args:
        precision: ``"bf16-true"`` or ``"16-true"``.
        keep: parts of parameter names that stay as they are, besides adapters; such as a head that casts its input.
    """

    def __init__(self, precision: Literal["bf16-true", "16-true"] = "bf16-true", keep: list[str] | None = None) -> None:
        if precision not in ("bf16-true", "16-true"):
            raise ValueError(f"precision is {precision!r}: there are 'bf16-true' and '16-true'. Use one of them.")
        if isinstance(keep, str):
            raise ValueError(f"keep is the string {keep!r}: it is a list of parts of names. Write [{keep!r}].")
        super().__init__(precision)
        self.keep = list(keep or [])

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast in place what is floating, without a detour of the kept ones through half precision."""
        dtype = torch.bfloat16 if self.precision == "bf16-true" else torch.float16
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            kept = is_adapter_key(name) or any(part in name for part in self.keep)
            if tensor.is_floating_point() and not kept:
                tensor.data = tensor.data.to(dtype)
        return module
