"""Put adapters into a model: which linears, with which A, in whose layers, and what came of it.

Dimension letters: K inputs, N outputs, R rank.
"""

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa import blocks
from lightning_efficient.lora_fa.config import LoRAFAConfig, matches, pattern_meets
from lightning_efficient.lora_fa.frozen import is_linear, sizes
from lightning_efficient.lora_fa.init import draw_A
from lightning_efficient.lora_fa.layer import LeanLinear, LoRAFALinear
from lightning_efficient.lora_fa.swap import swap

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class LoRAFAReport:
    """What :func:`apply_lora_fa` did.

    Attributes:
        adapted: the adapted linears whose forward is the lean one.
        fell_back: those that are adapted but run their own, plain forward, with the reason.
        lean_blocks: feed-forward blocks, norms and activations that became lean.
        trainable: parameters that train now.
        total: all parameters.
        est_saved_bytes_per_token: bytes that the adapters keep per token for backward: h alone, per adapted linear.
    """

    adapted: list[str] = field(default_factory=list)
    fell_back: dict[str, str] = field(default_factory=dict)
    lean_blocks: list[str] = field(default_factory=list)
    trainable: int = 0
    total: int = 0
    est_saved_bytes_per_token: int = 0

    def __str__(self) -> str:
        said = (
            f"LoRA-FA: {len(self.adapted) + len(self.fell_back)} linears adapted, {len(self.lean_blocks)} blocks and "
            f"norms lean; {self.trainable:,} of {self.total:,} parameters train"
        )
        if self.adapted:
            said += f"; lean adapters keep {self.est_saved_bytes_per_token:,} bytes per token"
        if self.fell_back:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(self.fell_back.items())[:5])
            said += f". Not lean, {len(self.fell_back)}: {some}"
        return said


def apply_lora_fa(
    module: nn.Module,
    config: LoRAFAConfig | None = None,
    *,
    adapter_name: str = ADAPTER_NAME,
) -> LoRAFAReport:
    """Freeze ``module`` and put LoRA-FA adapters on its linears, in place.

    A comes from the seed and the layer's name: two processes get the same. B is zero, so the model's output stays what
    it was, to the last bit. A second call with the same name changes nothing; one with another name adds adapters.
    Call it before ``fully_shard`` and before the optimizer is built.

    Args:
        module: the model, on any device.
        config: what to put where.
        adapter_name: of the adapters.

    Returns:
        What was adapted, and what could not be lean.

    Raises:
        ValueError: nothing matches, the rank is above a layer's size, or parameters are sharded already.
        ModuleNotFoundError: ``backend="peft"`` without PEFT.
    """
    config = config if config is not None else LoRAFAConfig()
    _modules_to_save(module, config)
    if _uses_peft(module, config):
        from lightning_efficient.lora_fa import peft_bridge

        peft_bridge.inject(module, config, adapter_name)
    else:
        _inject(module, config, adapter_name)
    _keep_off_fast_path(module)
    for layer in adapted_layers(module).values():
        layer.lora_fa_dropout_mode = config.dropout_mode
    train_only_adapters(module, config)
    lean_blocks: list[str] = []
    if config.lean:
        for layer in adapted_layers(module).values():
            swap(layer, LeanLinear)
        if config.lean_mlp == "auto":
            lean_blocks += blocks.make_mlps_lean(module)
        if config.lean_norm == "auto":
            lean_blocks += blocks.make_norms_lean(module)
    return report(module, lean_blocks)


def report(module: nn.Module, lean_blocks: list[str] | None = None) -> LoRAFAReport:
    """Return the report of a module that has adapters already."""
    adapted: list[str] = []
    fell_back: dict[str, str] = {}
    per_token = 0
    for name, layer in adapted_layers(module).items():
        reason = why_not_lean(layer)
        if reason is None:
            adapted.append(name)
            per_token += sum(down.weight.shape[0] * down.weight.element_size() for down in _active_downs(layer))
        else:
            fell_back[name] = reason
    parameters = list(module.parameters())
    return LoRAFAReport(
        adapted=adapted,
        fell_back=fell_back,
        lean_blocks=lean_blocks or [],
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        est_saved_bytes_per_token=per_token,
    )


def why_not_lean(layer: Any) -> str | None:
    """Return why an adapted layer runs its own forward; None where it is lean."""
    if not isinstance(layer, LeanLinear):
        return "lean is off"
    if any(hasattr(p, "full_tensor") for p in nn.Module.parameters(layer)):  # type: ignore[arg-type]
        return None  # sharded by the block around it, which makes it whole before it runs
    return layer.why_plain()


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """Return the adapted linears by name: ours, or PEFT's, which have the same attributes."""
    return {
        name: each
        for name, each in module.named_modules()
        if isinstance(getattr(each, "lora_A", None), nn.ModuleDict) and is_linear(getattr(each, "base_layer", each))
    }


def is_adapter_key(key: str) -> bool:
    """Whether a parameter's name is that of an A or a B."""
    return ".lora_A." in f".{key}" or ".lora_B." in f".{key}"


def train_only_adapters(module: nn.Module, config: LoRAFAConfig) -> None:
    """Freeze all but the active adapters' B and ``modules_to_save``.

    Raises:
        ValueError: a name of ``modules_to_save`` matches no module.
    """
    active = {id(p) for layer in adapted_layers(module).values() for p in layer.parameters() if p.requires_grad}
    for name, parameter in module.named_parameters():
        down = ".lora_A." in f".{name}"
        parameter.requires_grad_(id(parameter) in active and is_adapter_key(name) and not down)
    for each in _modules_to_save(module, config):
        each.requires_grad_(True)


def _modules_to_save(module: nn.Module, config: LoRAFAConfig) -> list[nn.Module]:
    found: list[nn.Module] = []
    for wanted in config.modules_to_save:
        some = [each for name, each in module.named_modules() if matches(name, [wanted])]
        if not some:
            raise ValueError(f"modules_to_save has {wanted!r}: no module has such a name. Correct or remove it.")
        found += some
    return found


def target_names(module: nn.Module, config: LoRAFAConfig) -> list[str]:
    """Return the names of the linears to adapt, in the module's order.

    Raises:
        ValueError: none matches, or the model is itself a linear.
    """
    if is_linear(module):
        raise ValueError(
            f"The model is a single {type(module).__name__}: adapters replace linears inside a module, and this one "
            "has no parent here. Wrap it, for example in torch.nn.Sequential."
        )
    adapted = adapted_layers(module)
    linears = {name: each for name, each in module.named_modules() if (is_linear(each) or name in adapted) and name}
    inside = tuple(f"{name}." for name in adapted)
    linears = {name: each for name, each in linears.items() if not name.startswith(inside)}
    all_linear = config.target_modules == "all-linear"
    left_out = _heads(module) if all_linear else set()
    names = [
        name
        for name, each in linears.items()
        if (all_linear or matches(name, config.target_modules))
        and not matches(name, config.exclude_modules)
        and not any(matches(name, [kept]) or f".{kept}." in f".{name}." for kept in config.modules_to_save)
        and id(each) not in left_out
    ]
    if not names:
        some = ", ".join(list(linears)[:10]) or "none"
        raise ValueError(
            f"target_modules={config.target_modules!r} (without {config.exclude_modules!r}) matches no linear: nothing "
            f"would be adapted. The linears here are {some}; name some of them."
        )
    _warn_of_idle_patterns(config, names)
    _warn_of_second_places(module, names)
    return names


def initial_A(name: str, layer: nn.Module, config: LoRAFAConfig) -> Tensor:
    """Return A, (R, K), of the layer called ``name``, on its device in the adapters' dtype.

    Raises:
        ValueError: the rank is above the layer's size, or its weight is sharded.
    """
    if hasattr(layer.weight, "full_tensor"):
        raise ValueError(
            f"The weight of {name!r} is sharded already: adapters have to be there before fully_shard. Call "
            "apply_lora_fa in configure_model, before it."
        )
    size_N, size_K = sizes(layer)
    rank = config.rank_of(name)
    if rank > min(size_N, size_K):
        raise ValueError(
            f"r is {rank}, but the layer {name!r} has {size_K} inputs and {size_N} outputs: a rank above the smaller "
            "of them adds nothing. Lower r, or give the layer its own rank in rank_pattern."
        )
    weight: Any = layer.weight
    A_RK = draw_A(config.init, layer, rank, layer_generator(config.seed, name))
    return A_RK.to(device=weight.device, dtype=config.dtype)


def layer_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on the seed and the layer's name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _inject(module: nn.Module, config: LoRAFAConfig, adapter_name: str) -> None:
    existing = adapted_layers(module)
    if any(not isinstance(layer, LoRAFALinear) for layer in existing.values()):
        raise ValueError(
            "The model has PEFT's adapters already, and backend is 'native'. Use backend='peft' or 'auto'."
        )
    if any(adapter_name in layer.lora_A for layer in existing.values()):
        return
    # Everything that can be refused is, before the first layer changes.
    drawn = {
        name: initial_A(name, base_of(module.get_submodule(name)), config) for name in target_names(module, config)
    }
    for name, A_RK in drawn.items():
        found = module.get_submodule(name)
        layer = found if isinstance(found, LoRAFALinear) else LoRAFALinear(found)
        layer.add_adapter(
            adapter_name, A_RK, scale=config.scale_of(name), alpha=config.alpha_of(name), dropout=config.dropout
        )
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, layer)
    for layer in existing.values():
        layer.set_adapter(adapter_name)


def base_of(module: nn.Module) -> nn.Module:
    """Return the linear inside an adapted layer; another module as it is."""
    base: nn.Module = getattr(module, "base_layer", module)
    return base


def _warn_of_idle_patterns(config: LoRAFAConfig, names: list[str]) -> None:
    """A misspelt pattern would otherwise change nothing, and say nothing."""
    for setting, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(pattern_meets(pattern, name) for name in names):
                warnings.warn(
                    f"{setting} has {pattern!r}, which means no adapted linear: it does nothing. Correct or remove it.",
                    stacklevel=5,
                )


def _warn_of_second_places(module: nn.Module, names: list[str]) -> None:
    places: dict[int, dict[tuple[int, str], str]] = {}
    for name, each in module.named_modules(remove_duplicate=False):
        parent, _, last = name.rpartition(".")
        places.setdefault(id(each), {})[id(module.get_submodule(parent)), last] = name
    for name in names:
        mine = places[id(module.get_submodule(name))].values()
        if len(mine) > 1:
            other = next(each for each in mine if each != name)
            warnings.warn(
                f"{name!r} is also {other!r}: only the first gets an adapter, as in PEFT. Give the other a linear "
                "of its own, or name the first in exclude_modules.",
                stacklevel=4,
            )


def _keep_off_fast_path(module: nn.Module) -> None:
    """In eval mode, torch's encoder layers read the weights of their linears and never call them, unless told so."""
    for each in module.modules():
        if isinstance(each, nn.TransformerEncoderLayer) and adapted_layers(each):
            each.activation_relu_or_gelu = 0


def _uses_peft(module: nn.Module, config: LoRAFAConfig) -> bool:
    if config.backend != "auto":
        return config.backend == "peft"
    return any(not isinstance(layer, LoRAFALinear) for layer in adapted_layers(module).values())


def _heads(module: nn.Module) -> set[int]:
    """Ids of output heads, which "all-linear" leaves out: the model's own, and linears tied to an embedding."""
    heads = set()
    embeddings = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
    for name, each in module.named_modules():
        own = getattr(each, "get_output_embeddings", None)
        if callable(own):
            try:
                heads.add(id(own()))
            except (NotImplementedError, AttributeError):
                warnings.warn(f"{name or 'the model'} does not name its output head", stacklevel=2)
        if isinstance(each, nn.Linear) and (id(each.weight) in embeddings or matches(name, ["lm_head"])):
            heads.add(id(each))
    return heads


def _active_downs(layer: Any) -> list[Any]:
    return [layer.lora_A[name] for name in layer.active_adapters if name in layer.lora_A]
