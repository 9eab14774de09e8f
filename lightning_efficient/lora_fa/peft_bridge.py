"""PEFT's own layers with our forward (extra ``peft``): its switching, merging and file format stay usable.

PEFT's attributes that the lean forward reads: ``base_layer``, ``lora_A``, ``lora_B``, ``lora_dropout``, ``scaling``,
``active_adapters``, ``disable_adapters``, ``merged``, ``lora_variant``.
"""

from typing import Any

import torch
from torch import nn

from lightning_efficient.lora_fa.config import LoRAFAConfig
from lightning_efficient.lora_fa.inject import adapted_layers, initial_A, target_names
from lightning_efficient.lora_fa.layer import AdapterLinear


def inject(module: nn.Module, config: LoRAFAConfig, adapter_name: str) -> None:
    """Put PEFT's LoRA layers into ``module``, or take over those that are there, and freeze and draw their A.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
    """
    peft = require_peft()
    there = {name: layer for name, layer in adapted_layers(module).items() if adapter_name in layer.lora_A}
    if not there:
        names = target_names(module, config)
        drawn = {name: initial_A(name, _base(module, name), config) for name in names}
        _tell_peft_of_quantisation(module)
        peft.inject_adapter_in_model(lora_config(peft, config, names), module, adapter_name=adapter_name)
        for name, A_RK in drawn.items():
            layer: Any = module.get_submodule(name)
            with torch.no_grad():
                layer.lora_A[adapter_name].weight.data = A_RK
                layer.lora_B[adapter_name].to(A_RK.dtype)
                layer.lora_B[adapter_name].weight.zero_()
    for each in adapted_layers(module).values():
        for half in (each.lora_A, each.lora_B):
            for linear in half.values():
                if type(linear) is nn.Linear:
                    linear.__class__ = AdapterLinear


def lora_config(peft: Any, config: LoRAFAConfig, names: list[str]) -> Any:
    """Return PEFT's configuration of the same adapters on the linears called ``names``."""
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=names,
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        bias="none",
    )


def require_peft() -> Any:
    """Return the package.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "backend='peft' needs the package peft, which is not installed. Install it with "
            "pip install 'lightning-efficient[peft]', or use backend='native'."
        ) from error
    return peft


def _base(module: nn.Module, name: str) -> nn.Module:
    linear = module.get_submodule(name)
    return getattr(linear, "base_layer", linear)


def _tell_peft_of_quantisation(module: nn.Module) -> None:
    """PEFT looks for a mark on the model, not at its layers, and would take its ordinary linear otherwise."""
    kinds = {base.__name__ for each in module.modules() for base in type(each).__mro__}
    for kind, mark in (("Linear4bit", "is_loaded_in_4bit"), ("Linear8bitLt", "is_loaded_in_8bit")):
        if kind in kinds and not hasattr(module, mark):
            setattr(module, mark, True)
