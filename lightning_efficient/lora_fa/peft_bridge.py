"""PEFT's own layers with our forward (extra ``peft``): its switching, merging and file format stay usable.

PEFT's attributes that the lean forward reads: ``base_layer``, ``lora_A``, ``lora_B``, ``lora_dropout``, ``scaling``,
``active_adapters``, ``disable_adapters``, ``merged``, ``lora_variant``.
"""

import warnings
from typing import Any

import torch
from torch import nn

from lightning_efficient.lora_fa.config import LoRAFAConfig, exactly
from lightning_efficient.lora_fa.frozen import stored_transposed
from lightning_efficient.lora_fa.inject import adapted_layers, base_of, initial_A, target_names
from lightning_efficient.lora_fa.layer import AdapterLinear, LoRAFALinear


def inject(module: nn.Module, config: LoRAFAConfig, adapter_name: str) -> None:
    """Put PEFT's LoRA layers into ``module``, or take over those that are there, and freeze and draw their A.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
    """
    peft = require_peft()
    existing = adapted_layers(module)
    if any(isinstance(layer, LoRAFALinear) for layer in existing.values()):
        raise ValueError("The model has adapters of backend='native' already, and backend is 'peft'. Use one of them.")
    if not any(adapter_name in layer.lora_A for layer in existing.values()):
        names = target_names(module, config)
        drawn = {name: initial_A(name, base_of(module.get_submodule(name)), config) for name in names}
        _tell_peft_of_quantisation(module)
        transposed = all(stored_transposed(base_of(module.get_submodule(name))) for name in names)
        wanted = lora_config(peft, config, names, transposed=transposed)
        with warnings.catch_warnings():  # a second adapter is what was asked for
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            peft.inject_adapter_in_model(wanted, module, adapter_name=adapter_name)
        for name, A_RK in drawn.items():
            layer: Any = module.get_submodule(name)
            with torch.no_grad():
                layer.lora_A[adapter_name].weight.data = A_RK
                layer.lora_B[adapter_name].to(A_RK.dtype)
                layer.lora_B[adapter_name].weight.zero_()
            layer.train(layer.base_layer.training)  # PEFT's layers start in training mode, and with them dropout
        for layer in adapted_layers(module).values():
            layer.set_adapter(adapter_name)
    for each in adapted_layers(module).values():
        for half in (each.lora_A, each.lora_B):
            for linear in half.values():
                if type(linear) is nn.Linear:
                    linear.__class__ = AdapterLinear


def lora_config(peft: Any, config: LoRAFAConfig, names: list[str], *, transposed: bool = False) -> Any:
    """Return PEFT's configuration of the same adapters on the linears called ``names``, and on no others.

    A list would match the ends of names, too, so the names become a regular expression.
    """
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=exactly(names),
        fan_in_fan_out=transposed,
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


def _tell_peft_of_quantisation(module: nn.Module) -> None:
    """PEFT looks for a mark on the model, not at its layers, and would take its ordinary linear otherwise."""
    kinds = {base.__name__ for each in module.modules() for base in type(each).__mro__}
    for kind, mark in (("Linear4bit", "is_loaded_in_4bit"), ("Linear8bitLt", "is_loaded_in_8bit")):
        if kind in kinds and not hasattr(module, mark):
            setattr(module, mark, True)
