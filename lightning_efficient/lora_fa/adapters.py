"""Switch, merge and re-factor the adapters of a model, whichever backend they are in."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa.frozen import compressed, dense
from lightning_efficient.lora_fa.init import orthonormal_rows
from lightning_efficient.lora_fa.inject import adapted_layers
from lightning_efficient.lora_fa.layer import LoRAFALinear


def set_adapter(module: nn.Module, name: str) -> None:
    """Make the adapters called ``name`` the active ones; every A stays frozen. Layers without one run their base.

    Raises:
        ValueError: there is no such adapter, or adapters are merged.
    """
    layers = _require(module)
    _refuse_merged(layers)
    if not any(name in layer.lora_A for layer in layers.values()):
        known = sorted({each for layer in layers.values() for each in layer.lora_A})
        raise ValueError(f"There is no adapter {name!r}: the model has {', '.join(known)}. Use one of them.")
    for layer in layers.values():
        layer.set_adapter(name)


@contextlib.contextmanager
def disable_adapter(module: nn.Module) -> Iterator[None]:
    """Run the base model alone inside the block; afterwards the adapters are as they were.

    Raises:
        ValueError: adapters are merged.
    """
    adapted = _require(module)
    _refuse_merged(adapted)
    layers = [layer for layer in adapted.values() if not layer.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge(module: nn.Module, safe: bool = True, *, keep_copy: bool = False) -> None:
    r"""Add each active adapter to its base, :math:`W \leftarrow W + s B A`, in place.

    A quantised base is dequantised, added to and quantised again; a warning gives the largest relative error of a
    weight, and the old weight is kept for :func:`unmerge`.

    Args:
        module: has adapters.
        safe: look for NaN and infinity in the sums first, and change nothing if there are any.
        keep_copy: keep the weight, so that :func:`unmerge` restores it to the last bit; otherwise within rounding.

    Raises:
        ValueError: a merged weight would not be finite, is shared with another module, or cannot be changed; or
            adapters are merged already. Nothing has changed then.
    """
    layers = {name: layer for name, layer in _require(module).items() if _names(layer)}
    if not layers:
        raise ValueError("No adapter is active: there is nothing to merge. Call set_adapter first.")
    if any(layer.merged for layer in layers.values()):
        raise ValueError("Adapters are merged already: merging them again would add them twice. Call unmerge first.")
    _refuse_shared(module, layers)
    with torch.no_grad():
        for name, layer in layers.items():
            _check_merge(name, layer, safe)
        errors = {name: _merge_layer(layer, safe, keep_copy) for name, layer in layers.items()}
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > 0:
        warnings.warn(
            f"Merging into a quantised base rounds the sum: the worst weight ({worst}) is off by {errors[worst]:.1%}. "
            "Keep the adapter apart, or merge into the unquantised base.",
            stacklevel=2,
        )


def unmerge(module: nn.Module) -> None:
    """Take the adapters out of their bases again.

    Raises:
        ValueError: nothing is merged.
    """
    layers = [layer for layer in _require(module).values() if layer.merged]
    if not layers:
        raise ValueError("No adapter is merged: there is nothing to take out. Call merge first.")
    with torch.no_grad():
        for layer in layers:
            kept = layer.__dict__.pop("_unmerged", None)
            if kept is not None:
                _restore(layer.base_layer, kept)
                layer.merged_adapters.clear()
            elif isinstance(layer, LoRAFALinear):
                weight_NK = _dense_weight(layer)
                weight_NK.sub_(_delta(layer, layer.merged_adapters).to(weight_NK.dtype))
                layer.merged_adapters.clear()
            else:
                layer.unmerge()


def orthonormalize(module: nn.Module) -> None:
    r"""Give every A orthonormal rows without changing the model: with :math:`A = L Q`, Q becomes A, and B becomes B L.

    For adapters whose A was trained, or drawn by ``kaiming`` or ``gaussian``: from here on the gradient of B is that of
    LoRA-FA v2's correction up to a constant, in every optimizer. Build the optimizer after it.
    """
    with torch.no_grad():
        for layer in _require(module).values():
            for name in layer.lora_A:
                down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
                A_RK = down.double()
                Q_RK = orthonormal_rows(A_RK)
                up.copy_(up.double() @ (A_RK @ Q_RK.t()))
                down.copy_(Q_RK)


def _merge_layer(layer: Any, safe: bool, keep_copy: bool) -> float:
    """Merge one layer and return the relative error of its weight."""
    base = layer.base_layer
    ordinary, other = dense(base), compressed(base)
    before, wanted = base.weight, None
    if ordinary is None and other is not None:
        wanted = other.weight(torch.float32) + _delta(layer, _names(layer))
    if keep_copy or wanted is not None:
        layer.__dict__["_unmerged"] = _remember(base)
        if ordinary is not None:
            base.weight = nn.Parameter(before.detach().clone(), requires_grad=False)
    if not isinstance(layer, LoRAFALinear):
        layer.merge(safe_merge=safe)
    elif wanted is not None:
        base.weight = _quantise_like(before, wanted)
        layer.merged_adapters.extend(_names(layer))
    else:
        weight_NK = _dense_weight(layer)
        weight_NK.add_(_delta(layer, _names(layer)).to(weight_NK.dtype))
        layer.merged_adapters.extend(_names(layer))
    if wanted is None:
        return 0.0
    now = compressed(base)
    assert now is not None
    return float((now.weight(torch.float32) - wanted).norm() / wanted.norm())


def _remember(base: Any) -> tuple[nn.Parameter, dict[str, Any]]:
    """The weight, and what an int8 layer has taken out of it."""
    state = getattr(base, "state", None)
    return base.weight, {name: getattr(state, name) for name in ("CB", "SCB") if hasattr(state, name)}


def _restore(base: Any, kept: tuple[nn.Parameter, dict[str, Any]]) -> None:
    base.weight, state = kept
    for name, value in state.items():
        setattr(base.state, name, value)


def _quantise_like(old: Any, wanted: Tensor) -> nn.Parameter:
    kind = type(old).__name__
    if kind == "Params4bit":
        new = type(old)(
            wanted.to("cpu", old.quant_state.dtype),
            requires_grad=False,
            quant_type=old.quant_type,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_storage=old.quant_storage,
        ).to(old.device)
    elif kind == "Int8Params":
        new = type(old)(wanted.to("cpu"), requires_grad=False, has_fp16_weights=False).to(old.device)
    else:
        raise ValueError(f"A weight of the kind {kind} cannot be quantised again here. Keep the adapter apart.")
    assert isinstance(new, nn.Parameter)
    return new


def _check_merge(name: str, layer: Any, safe: bool) -> None:
    """Raise before anything has changed."""
    base = layer.base_layer
    ordinary, other = dense(base), compressed(base)
    known = ordinary is not None or (other is not None and type(base.weight).__name__ in ("Params4bit", "Int8Params"))
    if isinstance(layer, LoRAFALinear) and not known:
        raise ValueError(f"The weight of {name!r}, a {type(base).__name__}, cannot be changed. Keep the adapter apart.")
    if not safe:
        return
    sum_NK = _delta(layer, _names(layer))
    if ordinary is not None:
        sum_NK = (ordinary.weight + sum_NK).to(ordinary.weight.dtype)
    if not torch.isfinite(sum_NK).all():
        raise ValueError(f"With its adapter, {name!r} is not finite: nothing was merged. Train it anew.")


def _refuse_shared(module: nn.Module, layers: dict[str, Any]) -> None:
    holders = Counter(id(each) for _, each in module.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        if holders[id(layer.base_layer.weight)] > 1:
            raise ValueError(
                f"The weight of {name!r} is also another module's: merging would change that one, too. Give the layer "
                "a copy of its weight first, or keep the adapter apart."
            )


def _refuse_merged(layers: dict[str, Any]) -> None:
    if any(layer.merged for layer in layers.values()):
        raise ValueError("Adapters are merged: the base cannot be told apart from them. Call unmerge first.")


def _names(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _delta(layer: Any, names: list[str]) -> Tensor:
    """The sum of ``s B A`` over adapters, (N, K), in float32 or better."""
    total: Tensor | None = None
    for name in names:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        wide = torch.promote_types(down.dtype, torch.float32)
        product = (up.to(wide) @ down.to(wide)) * layer.scaling[name]
        total = product if total is None else total + product
    assert total is not None
    return total


def _dense_weight(layer: LoRAFALinear) -> Tensor:
    base = dense(layer.base_layer)
    assert base is not None
    return base.weight.data


def _require(module: nn.Module) -> dict[str, Any]:
    layers = adapted_layers(module)
    if not layers:
        raise ValueError("The model has no adapters. Call apply_lora_fa first.")
    return dict(layers)
