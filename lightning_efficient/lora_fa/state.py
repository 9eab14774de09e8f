"""Checkpoints that hold the adapters and what else trains, and nothing of the frozen base.

The base is rebuilt by the user's code; fingerprints tell whether it is the same one, and whether A came back.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.lora_fa.inject import adapted_layers, is_adapter_key

_SAMPLES = 64
"""Entries of each frozen tensor that enter the fingerprint."""


def keep_adapters_only(module: nn.Module) -> list[RemovableHandle]:
    """Make ``module.state_dict()`` leave out the frozen base, and ``load_state_dict`` not miss it.

    Loading stays strict about everything else: a missing A or B, or an unknown key, is an error. What is frozen is
    looked up at each call. Adapters, trainable parameters and buffers outside of adapted linears are kept.

    Returns:
        Handles that undo it.
    """
    return [
        module.register_state_dict_post_hook(_drop_base),
        module.register_load_state_dict_post_hook(_forgive_base),
    ]


def base_fingerprint(module: nn.Module) -> str:
    """Return a hash of the frozen base: names, shapes, dtypes, and 64 entries of each tensor (not of sharded ones)."""
    digest = hashlib.sha256()
    for name, parameter in sorted(_frozen(module)):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        if not (parameter.is_meta or hasattr(parameter, "full_tensor")):
            digest.update(_sample(parameter))
    return digest.hexdigest()[:16]


def A_fingerprints(module: nn.Module) -> dict[str, str]:
    """Return a hash of every A, by its name; of this process's part where it is sharded."""
    return {
        f"{name}.lora_A.{adapter}": _hash(down.weight)
        for name, layer in adapted_layers(module).items()
        for adapter, down in layer.lora_A.items()
    }


def _drop_base(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
    for key in _base_keys(module, [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]):
        del state_dict[prefix + key]


def _forgive_base(module: nn.Module, incompatible_keys: Any) -> None:
    base = _base_keys(module, incompatible_keys.missing_keys)
    incompatible_keys.missing_keys[:] = [key for key in incompatible_keys.missing_keys if key not in base]


def _base_keys(module: nn.Module, keys: Iterable[str]) -> set[str]:
    frozen = {name for name, _ in _frozen(module)}
    return {key for key in keys if key in frozen or ".base_layer." in f".{key}"}


def _frozen(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (name, each)
        for name, each in module.named_parameters(remove_duplicate=False)
        if not each.requires_grad and not is_adapter_key(name)
    ]


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    at = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLES, len(flat)), dtype=torch.float64).long()
    return flat[at.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _hash(tensor: Tensor) -> str:
    local = getattr(tensor, "_local_tensor", tensor)
    raw = local.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]
