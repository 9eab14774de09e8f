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


def base_keys(module: nn.Module, keys: Iterable[str]) -> set[str]:
    """Return those of ``keys`` that belong to the frozen base of ``module``; compiled or wrapped modules count too."""
    frozen = {_plain_key(name) for name, _ in _frozen(module)}
    return {key for key in keys if _plain_key(key) in frozen or ".base_layer." in f".{key}"}


def base_fingerprint(module: nn.Module) -> str:
    """Return hashes of the frozen base: of names, shapes and dtypes, and of 64 entries of each tensor.

    Values are left out while they are sharded or not there yet (meta tensors).
    """
    layout, values, known = hashlib.sha256(), hashlib.sha256(), True
    for name, parameter in sorted(_frozen(module), key=lambda item: _plain_key(item[0])):
        layout.update(f"{_plain_key(name)} {tuple(parameter.shape)} {parameter.dtype};".encode())
        if parameter.is_meta or hasattr(parameter, "full_tensor"):
            known = False
        else:
            values.update(_sample(parameter))
    return f"{layout.hexdigest()[:16]}-{values.hexdigest()[:16] if known else ''}"


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints can be of one base: values count where both know them."""
    (layout, _, values), (other_layout, _, other_values) = one.partition("-"), other.partition("-")
    return layout == other_layout and (values == other_values or not values or not other_values)


def A_fingerprints(module: nn.Module) -> dict[str, str]:
    """Return a hash of every A, by its name; all ranks have to call it where A is sharded."""
    return {
        f"{name}.lora_A.{adapter}": _hash(down.weight)
        for name, layer in adapted_layers(module).items()
        for adapter, down in layer.lora_A.items()
    }


def _drop_base(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
    for key in base_keys(module, [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]):
        del state_dict[prefix + key]


def _forgive_base(module: nn.Module, incompatible_keys: Any) -> None:
    base = base_keys(module, incompatible_keys.missing_keys)
    incompatible_keys.missing_keys[:] = [key for key in incompatible_keys.missing_keys if key not in base]


def _plain_key(key: str) -> str:
    """Without what wrappers put into names: AveragedModel, and torch.compile."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


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
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    raw = whole.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]
