"""Read adapters from a folder in PEFT's format, and refuse what is damaged or no plain LoRA."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_efficient.lora_fa.config import LoRAFAConfig
from lightning_efficient.lora_fa.frozen import is_linear, sizes
from lightning_efficient.lora_fa.inject import (
    ADAPTER_NAME,
    LoRAFAReport,
    adapted_layers,
    apply_lora_fa,
    base_of,
    is_adapter_key,
)
from lightning_efficient.lora_fa.peft_format import CONFIG_FILE, PREFIX, WEIGHTS_FILE, only, state_of

_REFUSED = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "layer_replication": None,
    "megatron_config": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "velora_config": None,
    "monteclora_config": None,
    "arrow_config": None,
    "kasa_config": None,
}
"""Settings of PEFT that an adapter here cannot have, and the values that are fine."""

_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` with which PEFT trains relative to a base that it has changed."""


def load_peft(
    module: nn.Module, folder: str | Path, *, adapter_name: str = ADAPTER_NAME, config: LoRAFAConfig | None = None
) -> LoRAFAReport:
    """Put the adapters of a PEFT folder into ``module``; A is frozen, even if it was trained before, and B trains on.

    Args:
        module: the base model, with or without adapters of this shape.
        folder: with safetensors; nothing in it is executed.
        adapter_name: of the adapters in ``module``.
        config: of what the folder does not say (dropout mode, lean, backend ...); its targets, ranks, scales and
            dropout are taken from the folder.

    Returns:
        The report of :func:`~lightning_efficient.lora_fa.apply_lora_fa`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is no plain LoRA, keys are missing or unknown, shapes do not fit, or a value is not finite.
    """
    folder = Path(folder)
    settings, tensors = _read(folder)
    names, saved = _check_keys(module, tensors, folder)
    ranks = {name: tensors[f"{PREFIX}{name}.lora_A.weight"].shape[0] for name in names}
    alphas = {name: _alpha(settings, name) for name in names}
    base = config if config is not None else LoRAFAConfig()
    chosen = LoRAFAConfig(
        **{
            **base.to_dict(),
            "target_modules": names,
            "exclude_modules": None,
            "init": "kaiming",  # replaced at once, and the cheapest to draw
            "r": int(settings["r"]),
            "alpha": float(settings["lora_alpha"]),
            "dropout": float(settings.get("lora_dropout", 0.0)),
            "use_rslora": bool(settings.get("use_rslora", False)),
            "rank_pattern": {only(name): rank for name, rank in ranks.items() if rank != settings["r"]},
            "alpha_pattern": {only(name): alpha for name, alpha in alphas.items() if alpha != settings["lora_alpha"]},
            "modules_to_save": sorted({key.rpartition(".")[0] for key in saved}),
        }
    )
    _check_shapes(module, tensors, names, saved)
    _check_existing(module, tensors, names, adapter_name)
    report = apply_lora_fa(module, chosen, adapter_name=adapter_name)
    state = state_of(module)
    with torch.no_grad():
        for name in names:
            for half in ("lora_A", "lora_B"):
                state[f"{name}.{half}.{adapter_name}.weight"].copy_(tensors[f"{PREFIX}{name}.{half}.weight"])
            _set_scale(module.get_submodule(name), adapter_name, chosen, name)
        for key in saved:
            state[key].copy_(tensors[PREFIX + key])
    return report


def _set_scale(layer: Any, adapter_name: str, config: LoRAFAConfig, name: str) -> None:
    """An adapter that was there before may have had another scale and dropout."""
    layer.scaling[adapter_name], layer.lora_alpha[adapter_name] = config.scale_of(name), config.alpha_of(name)
    dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
    layer.lora_dropout[adapter_name] = dropout.train(layer.training)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"There is no {name} in {str(folder)!r}: it is no PEFT folder. Check the path.")
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is no JSON ({error}). Export the adapter anew.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / CONFIG_FILE} holds no settings. Export the adapter anew.")
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} holds a {kind} adapter: only LORA can be read here.")
    for name, fine in _REFUSED.items():
        if settings.get(name, fine) not in (fine, None, False):
            raise ValueError(f"{folder} has {name}={settings[name]!r}, which an adapter here cannot have.")
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{folder / CONFIG_FILE} has {name}={value!r}: it is a number. Export the adapter anew.")
    init = str(settings.get("init_lora_weights", True))
    if init.startswith(_OTHER_BASE):
        raise ValueError(
            f"{folder} has init_lora_weights={init!r}: it belongs to a base that PEFT has changed. Save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes an ordinary adapter of it."
        )
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except Exception as error:  # safetensors raises its own kind
        raise ValueError(f"{folder / WEIGHTS_FILE} cannot be read ({error}). Export the adapter anew.") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} in {folder} is not finite: the adapter is broken. Export it anew.")
    return settings, tensors


def _check_keys(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the layers and of the whole parameters in the file."""
    if strange := [key for key in tensors if not key.startswith(PREFIX)]:
        raise ValueError(f"{folder} has the key {strange[0]!r}: names have to start with {PREFIX!r}.")
    keys = [key.removeprefix(PREFIX) for key in tensors]
    halves = {
        half: {k.removesuffix(f".{half}.weight") for k in keys if k.endswith(f".{half}.weight")}
        for half in ("lora_A", "lora_B")
    }
    if lonely := sorted(halves["lora_A"] ^ halves["lora_B"]):
        missing = "lora_B" if lonely[0] in halves["lora_A"] else "lora_A"
        raise ValueError(f"{folder} has no {missing} of {lonely[0]!r}: half an adapter cannot be used. Export it anew.")
    names = sorted(halves["lora_A"])
    saved = [key for key in keys if not is_adapter_key(f"{key}.")]
    known = {f"{name}.{half}.weight" for half in halves for name in halves[half]} | set(saved)
    if strange := [key for key in keys if key not in known]:
        raise ValueError(f"{folder} has the key {strange[0]!r}, which no adapter here has. Export it anew.")
    modules = {name.replace(".base_layer", "") for name, _ in module.named_modules()}
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(f"{folder} adapts {unknown[0]!r}, which the model does not have: it is of another model.")
    state = state_of(module)
    if unknown := [key for key in saved if key not in state]:
        raise ValueError(f"{folder} holds {unknown[0]!r}, which the model does not have: it is of another model.")
    if not names:
        raise ValueError(f"{folder} holds no lora_A and lora_B: there is nothing to load.")
    return names, saved


def _check_shapes(module: nn.Module, tensors: dict[str, Tensor], names: list[str], saved: list[str]) -> None:
    for name in names:
        linear = base_of(module.get_submodule(name))
        if not is_linear(linear):
            raise ValueError(f"{name!r} is a {type(linear).__name__} here: adapters can sit on linears only.")
        size_N, size_K = sizes(linear)
        A, B = (tuple(tensors[f"{PREFIX}{name}.{half}.weight"].shape) for half in ("lora_A", "lora_B"))
        if len(A) != 2 or len(B) != 2 or A[1] != size_K or B[0] != size_N or A[0] != B[1]:
            raise ValueError(
                f"The adapter of {name!r} has A {A} and B {B}, but the layer has {size_K} inputs and {size_N} outputs: "
                "it is of another model."
            )
    state = state_of(module)
    for key in saved:
        if state[key].shape != tensors[PREFIX + key].shape:
            raise ValueError(
                f"{key!r} is {tuple(tensors[PREFIX + key].shape)} in the folder and {tuple(state[key].shape)} in "
                "the model: it is of another model."
            )


def _check_existing(module: nn.Module, tensors: dict[str, Tensor], names: list[str], adapter_name: str) -> None:
    """Adapters of this name that are there already have to be those of the folder, of the same ranks."""
    existing = {name: each for name, each in adapted_layers(module).items() if adapter_name in each.lora_A}
    if any(layer.merged for layer in existing.values()):
        raise ValueError("Adapters are merged: what is loaded would have no effect. Call unmerge first.")
    if existing and (others := sorted(set(existing) ^ set(names))):
        raise ValueError(
            f"The model's adapters {adapter_name!r} and the folder's sit on other layers ({others[0]!r} is in one of "
            "them alone). Load it into the base model, or under another name."
        )
    for name, layer in existing.items():
        here, there = layer.lora_A[adapter_name].weight.shape, tensors[f"{PREFIX}{name}.lora_A.weight"].shape
        if here != there:
            raise ValueError(
                f"{name}.lora_A is {tuple(here)} here and {tuple(there)} in the folder: the model has an adapter of "
                "another rank. Load it into the base model, or under another name."
            )


def _alpha(settings: dict[str, Any], name: str) -> float:
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return float(settings["lora_alpha"])
