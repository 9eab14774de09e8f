"""Adapters as a folder in PEFT's format: what PEFT, vLLM and others load, with or without PEFT installed.

The folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with the keys
``base_model.model.<layer>.lora_A.weight`` (R, K) and ``...lora_B.weight`` (N, R).
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_efficient.lora_fa.config import LoRAFAConfig
from lightning_efficient.lora_fa.inject import ADAPTER_NAME, LoRAFAReport, adapted_layers, apply_lora_fa, is_adapter_key

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_REFUSED = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "fan_in_fan_out": None,
    "layer_replication": None,
    "megatron_config": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
}
"""Settings of PEFT that an adapter here cannot have, and the values that are fine."""


def export_peft(module: nn.Module, folder: str | Path, *, adapter_name: str = ADAPTER_NAME) -> Path:
    """Write the adapters of ``module`` as a PEFT folder; the result is an ordinary LoRA.

    Trainable parameters outside of adapters (``modules_to_save``) go along.

    Args:
        module: the model that :func:`~lightning_efficient.lora_fa.apply_lora_fa` was called on.
        folder: made if need be; files of the same names are replaced.
        adapter_name: which adapters.

    Returns:
        The folder.

    Raises:
        ValueError: there are no such adapters, or they are sharded or not finite.
    """
    layers = {name: each for name, each in adapted_layers(module).items() if adapter_name in each.lora_A}
    if not layers:
        raise ValueError(f"The model has no adapter {adapter_name!r}: there is nothing to export.")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for half in ("lora_A", "lora_B"):
            tensors[f"{_PREFIX}{name}.{half}.weight"] = _plain(getattr(layer, half)[adapter_name].weight, name)
    kept = [(n, p) for n, p in module.named_parameters() if p.requires_grad and not is_adapter_key(n)]
    tensors |= {f"{_PREFIX}{name}": _plain(parameter, name) for name, parameter in kept}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_config(_settings(module, layers, adapter_name, sorted({n.rpartition(".")[0] for n, _ in kept})), folder)
    return folder


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
    ranks = {name: tensors[f"{_PREFIX}{name}.lora_A.weight"].shape[0] for name in names}
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
            "rank_pattern": {re.escape(name): rank for name, rank in ranks.items() if rank != settings["r"]},
            "alpha_pattern": {
                re.escape(name): alpha for name, alpha in alphas.items() if alpha != settings["lora_alpha"]
            },
            "modules_to_save": sorted({key.rpartition(".")[0] for key in saved}),
        }
    )
    _check_shapes(module, tensors, names, saved)
    report = apply_lora_fa(module, chosen, adapter_name=adapter_name)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name in names:
            for half in ("lora_A", "lora_B"):
                target = parameters[f"{name}.{half}.{adapter_name}.weight"]
                source = tensors[f"{_PREFIX}{name}.{half}.weight"]
                if target.shape != source.shape:
                    raise ValueError(
                        f"{name}.{half} is {tuple(target.shape)} here and {tuple(source.shape)} in {folder}: the model "
                        "has an adapter of another rank. Load it into the base model, or under another name."
                    )
                target.copy_(source)
        for key in saved:
            parameters[key].copy_(tensors[_PREFIX + key])
    return report


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"There is no {name} in {str(folder)!r}: it is no PEFT folder. Check the path.")
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is no JSON ({error}). Export the adapter anew.") from error
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} holds a {kind} adapter: only LORA can be read here.")
    for name, fine in _REFUSED.items():
        if settings.get(name, fine) not in (fine, None, False):
            raise ValueError(f"{folder} has {name}={settings[name]!r}, which an adapter here cannot have.")
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
    if strange := [key for key in tensors if not key.startswith(_PREFIX)]:
        raise ValueError(f"{folder} has the key {strange[0]!r}: names have to start with {_PREFIX!r}.")
    keys = [key.removeprefix(_PREFIX) for key in tensors]
    halves = {
        half: {k.removesuffix(f".{half}.weight") for k in keys if k.endswith(f".{half}.weight")}
        for half in ("lora_A", "lora_B")
    }
    if lonely := sorted(halves["lora_A"] ^ halves["lora_B"]):
        missing = "lora_B" if lonely[0] in halves["lora_A"] else "lora_A"
        raise ValueError(f"{folder} has no {missing} of {lonely[0]!r}: half an adapter cannot be used. Export it anew.")
    names = sorted(halves["lora_A"])
    saved = [key for key in keys if not is_adapter_key(f"{key}.")]
    modules = {name.replace(".base_layer", "") for name, _ in module.named_modules()}
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(f"{folder} adapts {unknown[0]!r}, which the model does not have: it is of another model.")
    parameters = {name for name, _ in module.named_parameters()}
    if unknown := [key for key in saved if key not in parameters]:
        raise ValueError(f"{folder} holds {unknown[0]!r}, which the model does not have: it is of another model.")
    if not names:
        raise ValueError(f"{folder} holds no lora_A and lora_B: there is nothing to load.")
    return names, saved


def _check_shapes(module: nn.Module, tensors: dict[str, Tensor], names: list[str], saved: list[str]) -> None:
    from lightning_efficient.lora_fa.frozen import is_linear, sizes

    for name in names:
        layer = module.get_submodule(name)
        linear = getattr(layer, "base_layer", layer)
        if not is_linear(linear):
            raise ValueError(f"{name!r} is a {type(linear).__name__} here: adapters can sit on linears only.")
        size_N, size_K = sizes(linear)
        A, B = (tuple(tensors[f"{_PREFIX}{name}.{half}.weight"].shape) for half in ("lora_A", "lora_B"))
        if len(A) != 2 or len(B) != 2 or A[1] != size_K or B[0] != size_N or A[0] != B[1]:
            raise ValueError(
                f"The adapter of {name!r} has A {A} and B {B}, but the layer has {size_K} inputs and {size_N} outputs: "
                "it is of another model."
            )
    parameters = dict(module.named_parameters())
    for key in saved:
        if parameters[key].shape != tensors[_PREFIX + key].shape:
            raise ValueError(
                f"{key!r} is {tuple(tensors[_PREFIX + key].shape)} in the folder and {tuple(parameters[key].shape)} in "
                "the model: it is of another model."
            )


def _alpha(settings: dict[str, Any], name: str) -> float:
    for pattern, value in settings.get("alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return float(settings["lora_alpha"])


def _settings(module: nn.Module, layers: dict[str, Any], adapter_name: str, to_save: list[str]) -> dict[str, Any]:
    ranks = {name: int(layer.r[adapter_name]) for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[adapter_name] for name, layer in layers.items()}
    first = next(iter(layers))
    scale = layers[first].scaling[adapter_name]
    rslora = not math.isclose(scale, alphas[first] / ranks[first]) and ranks[first] > 1
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    dropout = getattr(layers[first].lora_dropout[adapter_name], "p", 0.0)
    config = getattr(module, "config", None)
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "target_modules": list(layers),
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "rank_pattern": {re.escape(name): each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {re.escape(name): each for name, each in alphas.items() if each != alpha},
        "modules_to_save": to_save or None,
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "task_type": "CAUSAL_LM" if type(module).__name__.endswith("ForCausalLM") else None,
    }


def _write_config(settings: dict[str, Any], folder: Path) -> None:
    try:
        import peft
    except ModuleNotFoundError:
        written = {"peft_type": "LORA", "init_lora_weights": True, **settings}
        (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        peft.LoraConfig(**settings).save_pretrained(str(folder))


def _plain(parameter: Tensor, name: str) -> Tensor:
    if hasattr(parameter, "full_tensor"):
        raise ValueError(f"{name!r} is sharded over ranks: gather it first, or export from an unsharded model.")
    tensor = parameter.detach().cpu().contiguous()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"The parameter of {name!r} is not finite: nothing was exported. Train it anew.")
    return tensor.clone()
