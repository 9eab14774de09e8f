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
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_efficient.lora_fa.config import exactly
from lightning_efficient.lora_fa.frozen import is_linear, stored_transposed
from lightning_efficient.lora_fa.inject import ADAPTER_NAME, adapted_layers, base_of, is_adapter_key

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


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
        ValueError: there are no such adapters, or they are sharded or not finite; or something trains that PEFT has
            no place for.
    """
    layers = {name: each for name, each in adapted_layers(module).items() if adapter_name in each.lora_A}
    if not layers:
        raise ValueError(f"The model has no adapter {adapter_name!r}: there is nothing to export.")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for half in ("lora_A", "lora_B"):
            tensors[f"{PREFIX}{name}.{half}.weight"] = _plain(getattr(layer, half)[adapter_name].weight, name)
    trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
    kept: list[tuple[str, Tensor]] = [(name, each) for name, each in trained.items() if not is_adapter_key(name)]
    whole = sorted({name.rpartition(".")[0] for name, _ in kept})
    if "" in whole:
        raise ValueError(
            f"{kept[0][0]!r} trains and belongs to the model itself: PEFT's format holds whole modules only. Move it "
            "into a module, or freeze it before the export."
        )
    kept += [(name, each) for name, each in _buffers(module).items() if name.rpartition(".")[0] in whole]
    tensors |= {f"{PREFIX}{name}": _plain(each, name) for name, each in kept}
    settings = _settings(module, layers, adapter_name, whole)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_config(settings, folder)
    return folder


def _settings(module: nn.Module, layers: dict[str, Any], adapter_name: str, to_save: list[str]) -> dict[str, Any]:
    ranks = {name: int(layer.r[adapter_name]) for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[adapter_name] for name, layer in layers.items()}
    scales = {name: float(layer.scaling[adapter_name]) for name, layer in layers.items()}
    rslora = all(math.isclose(scales[name], alphas[name] / math.sqrt(ranks[name])) for name in layers)
    rslora = rslora and any(rank > 1 for rank in ranks.values())
    for name, scale in scales.items():  # one that was set by hand needs an alpha of its own
        divisor = math.sqrt(ranks[name]) if rslora else ranks[name]
        if not math.isclose(scale, alphas[name] / divisor):
            alphas[name] = scale * divisor
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    dropout = getattr(next(iter(layers.values())).lora_dropout[adapter_name], "p", 0.0)
    config = getattr(module, "config", None)
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "target_modules": list(layers) if _unambiguous(module, list(layers)) else exactly(list(layers)),
        "fan_in_fan_out": all(stored_transposed(base_of(layer)) for layer in layers.values()),
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "rank_pattern": {only(name): each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {only(name): each for name, each in alphas.items() if each != alpha},
        "modules_to_save": to_save or None,
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "task_type": "CAUSAL_LM" if _generates(module) else None,
    }


def only(name: str) -> str:
    """Return a pattern that matches the module called ``name`` alone: PEFT's also match the end of a name."""
    return f"^{re.escape(name)}"


def _unambiguous(module: nn.Module, names: list[str]) -> bool:
    """Whether a list of names means these alone in PEFT, where an element also matches the end of a longer name."""
    others = [name for name, each in module.named_modules() if is_linear(base_of(each)) and name not in names]
    return not any(other.endswith(f".{name}") for other in others for name in names)


def _generates(module: nn.Module) -> bool:
    return type(module).__name__.endswith("ForCausalLM") and hasattr(module, "prepare_inputs_for_generation")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the buffers that belong into a file, by name."""
    return {**dict(module.named_parameters()), **_buffers(module)}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}" if name else key: buffer
        for name, each in module.named_modules()
        for key, buffer in each.named_buffers(recurse=False)
        if key not in each._non_persistent_buffers_set
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
