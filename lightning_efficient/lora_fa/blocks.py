"""Recognise feed-forward blocks, norms and activations around adapted linears, and give them their lean forward."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa import activation as lean_activation
from lightning_efficient.lora_fa.gated_mlp import GATES, adapted_gated_mlp
from lightning_efficient.lora_fa.layer import LeanLinear, LoRAFALinear, watched
from lightning_efficient.lora_fa.norm import rms_norm
from lightning_efficient.lora_fa.swap import swap, swap_back

_TRIAL_WIDTH = 8
_LINEARS = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}
"""Classes of torch and transformers, by the function of :data:`GATES` that they are."""
_COMPOSED_ACTIVATIONS = ("NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "LaplaceActivation")
"""Classes of transformers made of several operations, each of which keeps a tensor."""


class LeanGatedMLP:
    """A block ``down_proj(act(gate_proj(x)) * up_proj(x))``; a base of :func:`swap`."""

    lora_fa_activation: str

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output, (..., D)."""
        linears = [getattr(self, name) for name in _LINEARS]
        operands = [each.operand() if isinstance(each, LeanLinear) else None for each in linears]
        gate, up, down = operands
        inner = linears if (activation := _activation_of(self)) is None else [*linears, activation]
        if gate is None or up is None or down is None or args or kwargs or any(map(watched, inner)):
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        return adapted_gated_mlp(x, gate, up, down, self.lora_fa_activation)


class LeanRMSNorm:
    """An RMSNorm with a gain; a base of :func:`swap`."""

    weight: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the normalised ``x``, (..., D)."""
        # Modules differ in whether they compute float64 in float64, and nobody trains in it.
        if self.weight.requires_grad or x.dtype == torch.float64 or args or kwargs:
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        return rms_norm(x, self.weight, _eps(self))


class LeanActivation:
    """An elementwise activation; a base of :func:`swap`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of each entry."""
        if isinstance(self, nn.ReLU):
            return x.relu_() if self.inplace else lean_activation.relu(x)
        return lean_activation.recomputed(x, super().forward)  # type: ignore[misc]


def make_mlps_lean(module: nn.Module) -> list[str]:
    """Swap the gated blocks whose three linears are lean, and return their names.

    Each candidate is run both ways on random input: one that does not give the same numbers stays as it is.
    """
    changed = []
    for name, block in module.named_modules():
        kind = _gate_of(block)
        if kind is None or isinstance(block, LeanGatedMLP):
            continue
        if not all(isinstance(getattr(block, each, None), LeanLinear) for each in _LINEARS):
            continue
        block.lora_fa_activation = kind
        if _swap_if_equal(block, LeanGatedMLP, _trial_linears()):
            changed.append(name)
        else:
            del block.lora_fa_activation
    return changed


def make_norms_lean(module: nn.Module) -> list[str]:
    """Swap RMSNorms with frozen gains and activations between lean linears, and return their names."""
    changed = []
    for name, norm in list(module.named_modules()):
        gain = getattr(norm, "weight", None)
        if not type(norm).__name__.endswith("RMSNorm") or isinstance(norm, (nn.RMSNorm, LeanRMSNorm)):
            continue  # torch's own keeps no more than this
        if isinstance(gain, Tensor) and gain.ndim == 1 and not gain.requires_grad and _eps(norm) is not None:
            changed += [name] if _swap_if_equal(norm, LeanRMSNorm, {"weight": _trial_gain()}) else []
    for name, parent in list(module.named_modules()):
        for child_name, child in _activations_among_lean(parent):
            if _swap_if_equal(child, LeanActivation, {}):
                changed.append(f"{name}.{child_name}" if name else child_name)
    return changed


def unmake(module: nn.Module) -> None:
    """Give every block, norm and activation its own forward back."""
    for each in module.modules():
        if isinstance(each, (LeanGatedMLP, LeanRMSNorm, LeanActivation)):
            swap_back(each)


def _gate_of(block: nn.Module) -> str | None:
    """The activation of what looks like a gated block, None for other modules."""
    if not all(hasattr(block, name) for name in _LINEARS):
        return None
    named = _activation_of(block)
    kind = "silu" if named is None else _ACTIVATIONS.get(type(named).__name__)
    return kind if kind in GATES else None


def _activation_of(block: Any) -> Any:
    return getattr(block, "act_fn", getattr(block, "activation_fn", None))


def _activations_among_lean(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Activations of a module whose own linears are all lean: nobody else keeps what the activation returns."""
    children = list(parent.named_children())
    linears = [each for _, each in children if isinstance(each, (nn.Linear, LeanLinear))]
    if not linears or not all(isinstance(each, LeanLinear) for each in linears):
        return
    for name, each in children:
        known = type(each).__name__ in _COMPOSED_ACTIVATIONS or type(each) is nn.ReLU
        if known and not isinstance(each, LeanActivation):
            yield name, each


def _swap_if_equal(module: nn.Module, mixin: type, trial: dict[str, nn.Module | nn.Parameter]) -> bool:
    """Swap, and swap back if the two forwards differ on random numbers.

    Args:
        module: to swap.
        mixin: the lean forward.
        trial: small stand-ins for the module's own children and parameters, so that the trial costs the same for any
            size of model, and needs neither its device nor its weights.
    """
    kept = {name: getattr(module, name) for name in trial}
    modes = {child: child.training for child in module.modules()}
    module.eval()
    equal = False
    try:
        # A Trainer makes its GPU the default device while it builds a model.
        with torch.no_grad(), torch.device("cpu"):
            equal = all(_equal(module, mixin, trial, dtype) for dtype in (torch.float32, torch.bfloat16))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        pass  # it is not what its names make it look like
    finally:
        for name, own in kept.items():
            setattr(module, name, own)
        for child, training in modes.items():
            child.training = training
    if equal:
        swap(module, mixin)
    return equal


def _equal(module: nn.Module, mixin: type, trial: dict[str, nn.Module | nn.Parameter], dtype: torch.dtype) -> bool:
    """Whether both forwards give the same bits: in a narrow dtype, one that rounds elsewhere does not."""
    for name, each in trial.items():
        one = each if isinstance(each, nn.Module) else nn.Parameter(each.to(dtype), requires_grad=False)
        setattr(module, name, one.to(dtype) if isinstance(one, nn.Module) else one)
    x = _normal(2, 3, _TRIAL_WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = module(x)
    swap(module, mixin)
    try:
        return torch.equal(before, module(x))
    finally:
        swap_back(module)


def _trial_linears() -> dict[str, nn.Module | nn.Parameter]:
    """Adapted linears with B other than 0, to try a gated block with."""
    generator = torch.Generator().manual_seed(0)
    trial: dict[str, nn.Module | nn.Parameter] = {}
    for name in _LINEARS:
        base = nn.utils.skip_init(nn.Linear, _TRIAL_WIDTH, _TRIAL_WIDTH, bias=False, dtype=torch.float32)
        layer = LoRAFALinear(base)
        A_RK = _normal(2, _TRIAL_WIDTH, generator=generator)
        layer.add_adapter("default", A_RK, scale=1.0, alpha=2.0, dropout=0.0)
        with torch.no_grad():
            base.weight.copy_(_normal(_TRIAL_WIDTH, _TRIAL_WIDTH, generator=generator))
            next(layer.lora_B["default"].parameters()).copy_(_normal(_TRIAL_WIDTH, 2, generator=generator))
        swap(layer, LeanLinear)
        trial[name] = layer
    return trial


def _trial_gain() -> nn.Parameter:
    gain = _normal(_TRIAL_WIDTH, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(gain, requires_grad=False)


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Random numbers that the default device and dtype do not enter."""
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _eps(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
