"""What a model's forward pass keeps for backward under each way to fine-tune it: the table of one's own model."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_efficient._saved_bytes import saved_bytes
from lightning_efficient.lora_fa import blocks
from lightning_efficient.lora_fa.config import LoRAFAConfig
from lightning_efficient.lora_fa.inject import adapted_layers, apply_lora_fa
from lightning_efficient.lora_fa.layer import LeanLinear
from lightning_efficient.lora_fa.swap import swap


@dataclass(frozen=True)
class SavedBytesTable:
    """Bytes kept for backward, by the way to fine-tune.

    Attributes:
        rows: the bytes of ``"full fine-tuning"``, ``"LoRA"``, ``"LoRA, A frozen"``, ``"LoRA-FA"`` and ``"LoRA-FA, lean
            blocks"``.
    """

    rows: dict[str, int]

    def ratio(self, name: str) -> float:
        """Return how many times less than LoRA the way called ``name`` keeps."""
        return self.rows["LoRA"] / self.rows[name]

    def __str__(self) -> str:
        lines = [f"{'':<22} {'kept':>12} {'LoRA / it':>10}"]
        lines += [f"{name:<22} {size / 2**20:>8.2f} MiB {self.ratio(name):>10.2f}" for name, size in self.rows.items()]
        return "\n".join(lines)


def compare_saved_bytes(
    module: nn.Module, run: Callable[[nn.Module], Any], config: LoRAFAConfig | None = None
) -> SavedBytesTable:
    """Measure, on a copy of ``module`` in training mode, what ``run`` keeps for backward in each way to fine-tune it.

    Args:
        module: the base model, without adapters.
        run: runs the forward pass of the model that it is given, up to the loss; called five times.
        config: of the adapters. Those of "LoRA" are the same, with A trained too, in plain operations.

    Returns:
        The table; print it.

    Raises:
        ValueError: the module has adapters already, or nothing matches.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        >>> table = compare_saved_bytes(model, lambda m: m(torch.randn(32, 64)).sum(), LoRAFAConfig(r=4))
        >>> table.ratio("LoRA-FA") > 1
        True
    """
    if adapted_layers(module):
        raise ValueError("The model has adapters already: give the base model, without them.")
    config = config if config is not None else LoRAFAConfig()
    model = copy.deepcopy(module).train()
    rows: dict[str, int] = {}

    def measure(name: str) -> None:
        with saved_bytes(module=model) as kept:
            run(model)
        rows[name] = kept.total

    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    measure("full fine-tuning")
    apply_lora_fa(model, replace(config, lean=False, backend="native"))
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.lora_A.requires_grad_(True)
    measure("LoRA")
    for layer in layers:
        layer.lora_A.requires_grad_(False)
    measure("LoRA, A frozen")
    for layer in layers:
        swap(layer, LeanLinear)
    measure("LoRA-FA")
    blocks.make_mlps_lean(model)
    blocks.make_norms_lean(model)
    measure("LoRA-FA, lean blocks")
    return SavedBytesTable(rows)
