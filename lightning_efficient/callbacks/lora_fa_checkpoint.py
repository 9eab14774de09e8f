"""What a Lightning checkpoint says of its adapters, and how it is read back, with a Trainer and without one."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_efficient import _compat
from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, keep_adapters_only
from lightning_efficient.lora_fa.inject import adapted_layers
from lightning_efficient.lora_fa.state import A_fingerprints, base_fingerprint, base_keys, same_base
from lightning_efficient.lora_fa.swap import swap

KEY = "lora_fa"
"""Where a checkpoint says it, whether it holds weights alone or all else too."""

CheckBase = Literal["error", "warn", "off"]
ModuleT = TypeVar("ModuleT", bound=pl.LightningModule)

_DECISIVE = ("r", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
"""Settings that another model would come of, though its parameters have the same names and perhaps shapes."""


@dataclass
class AdapterRecord:
    """What is known of a module's adapters; it stays on the module.

    Attributes:
        config: what they were made of.
        model_attr: attribute of the LightningModule that holds the backbone; None: the whole module.
        base: fingerprint of the frozen base, taken before the Trainer cast or sharded it.
        check_base: what to do about a checkpoint of another base.
        adapter_only: whether checkpoints leave the base out.
        calibrated: whether A was chosen from batches.
        expected: what a checkpoint that was read says of A, until that is compared.
    """

    config: LoRAFAConfig
    model_attr: str | None
    base: str
    check_base: CheckBase = "error"
    adapter_only: bool = True
    calibrated: bool = False
    expected: dict[str, str] | None = None


class AdapterCheckpoints:
    """A LightningModule that writes its adapters' record into checkpoints, and checks it; a base of ``swap``.

    Its own hooks are the place, not a callback's: those do not run for a checkpoint of weights alone.
    """

    lora_fa_record: AdapterRecord | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the base out of ``checkpoint``, also after fit, and add the record."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        record = self.lora_fa_record
        assert isinstance(self, pl.LightningModule)
        if record is None:
            return
        if record.adapter_only and "state_dict" in checkpoint:
            base = base_keys(self, checkpoint["state_dict"])
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in base}
        checkpoint[KEY] = {
            "config": record.config.to_dict(),
            "model_attr": record.model_attr,
            "base": record.base,
            "A": A_fingerprints(backbone_of(self, record.model_attr)),
            "calibrated": record.calibrated,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the record of ``checkpoint`` with the module's."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        assert isinstance(self, pl.LightningModule)
        if self.lora_fa_record is not None and KEY in checkpoint:
            _compare(self.lora_fa_record, checkpoint[KEY])
            self.lora_fa_record.expected = checkpoint[KEY]["A"]
            self.lora_fa_record.calibrated = checkpoint[KEY]["calibrated"]
            if (keys := _keys(self, checkpoint)) is not None:
                _require_keys(self, keys)


def record_adapters(module: pl.LightningModule, record: AdapterRecord) -> None:
    """Keep ``record`` on the module and let its checkpoints carry it."""
    swap(module, AdapterCheckpoints)
    module.lora_fa_record = record  # type: ignore[assignment]


def record_of(module: pl.LightningModule) -> AdapterRecord | None:
    """Return what :func:`record_adapters` kept."""
    return module.lora_fa_record if isinstance(module, AdapterCheckpoints) else None


def backbone_of(module: pl.LightningModule, model_attr: str | None) -> nn.Module:
    """Return the module that adapters go into, without what torch.compile wrapped around it.

    Raises:
        RuntimeError: there is none.
    """
    if model_attr is None:
        return module
    backbone = getattr(module, model_attr, None)
    if not isinstance(backbone, nn.Module):
        raise RuntimeError(
            f"{type(module).__name__}.{model_attr} is no module when adapters are put in: build it in __init__ or "
            "configure_model, name another attribute in model_attr (null: the whole module), or call apply_lora_fa "
            "yourself."
        )
    return _compat.without_compile(backbone)


def check_restored(module: pl.LightningModule) -> None:
    """Compare every A with what the checkpoint that was read says of it: a hash tells, as A never changes.

    All ranks have to call it.

    Raises:
        RuntimeError: an A is another one, or on one side only.
    """
    record = record_of(module)
    if record is None or record.expected is None:
        return
    expected, record.expected = record.expected, None
    found = A_fingerprints(backbone_of(module, record.model_attr))
    if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise RuntimeError(
            f"The adapter was not restored: {wrong[0]} is not the checkpoint's, so B would be read with another A. The "
            "checkpoint is damaged, or was made with other settings of LoRAFA."
        )


def load_lora_fa_checkpoint(module: ModuleT, path: str | Path, *, check_base: CheckBase = "error") -> ModuleT:
    """Read a Trainer's checkpoint of adapters into a module that has its pretrained weights, and no adapters yet.

    What ``MyModule.load_from_checkpoint(path)`` cannot do: no callback runs there to put the adapters in, and the
    checkpoint holds no base. Everything that the checkpoint holds has to fit, and everything else has to be base.

    Args:
        module: a fresh module with its base weights, as before training; ``configure_model`` is called.
        path: of a checkpoint that was written while :class:`~lightning_efficient.callbacks.LoRAFA` was in use: a file,
            or the folder of a distributed checkpoint. Nothing in it is executed.
        check_base: what to do when it was made with another base: ``"error"``, ``"warn"`` or ``"off"``.

    Returns:
        ``module``.

    Raises:
        ValueError: the checkpoint says nothing of adapters.
        RuntimeError: the base is another one, or the checkpoint and the module do not fit.

    Example::

        module = load_lora_fa_checkpoint(MyModule(pretrained="..."), "best.ckpt")
    """
    path = Path(path)
    checkpoint = torch.load(path / "meta.pt" if path.is_dir() else path, map_location="cpu", weights_only=True)
    if KEY not in checkpoint:
        raise ValueError(
            f"{str(path)!r} says nothing of adapters: it was saved without LoRAFA. Use load_from_checkpoint, or "
            "load_peft for a folder in PEFT's format."
        )
    if is_overridden("configure_model", module):
        module.configure_model()
    found = checkpoint[KEY]
    config = LoRAFAConfig(**found["config"])
    backbone = backbone_of(module, found["model_attr"])
    # The checkpoint's A replaces what is drawn here: draw what costs least.
    apply_lora_fa(backbone, replace(config, init="kaiming"))
    record_adapters(module, AdapterRecord(config, found["model_attr"], base_fingerprint(module), check_base))
    handles = keep_adapters_only(module)
    try:
        if path.is_dir():
            checkpoint["state_dict"] = _read_shards(module, path)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=True)
    finally:
        for handle in handles:
            handle.remove()
    check_restored(module)
    return module


def check_settings(backbone: nn.Module, config: LoRAFAConfig) -> None:
    """Compare adapters that were there before with what is asked for.

    Raises:
        RuntimeError: a rank or a scale is another one.
    """
    for name, layer in adapted_layers(backbone).items():
        for adapter in layer.active_adapters:
            there = (layer.r[adapter], layer.scaling[adapter])
            asked = (config.rank_of(name), config.scale_of(name))
            if there != asked:
                raise RuntimeError(
                    f"{name!r} has an adapter already, of rank {there[0]} and scale {there[1]:g}, and LoRAFA says "
                    f"{asked[0]} and {asked[1]:g}. Give apply_lora_fa and LoRAFA the same r and alpha."
                )


def _compare(record: AdapterRecord, found: Mapping[str, Any]) -> None:
    ours = record.config.to_dict()
    for name in _DECISIVE:
        if found["config"][name] != ours[name]:
            raise RuntimeError(
                f"The checkpoint's adapters have {name}={found['config'][name]!r}, these have {ours[name]!r}: they are "
                "not the same model. Use the checkpoint's settings."
            )
    if record.check_base != "off" and not same_base(found["base"], record.base):
        message = (
            f"The checkpoint's adapter was trained on another base model (fingerprint {found['base']}, this one is "
            f"{record.base}): its output would be wrong. Load the same pretrained weights before, or set "
            "check_base='warn' if you know better."
        )
        if record.check_base == "error":
            raise RuntimeError(message)
        rank_zero_warn(message)


def _keys(module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> Iterable[str] | None:
    """The keys that a checkpoint's weights have, None where the one who loads them checks them well enough."""
    if "state_dict" in checkpoint:
        # bitsandbytes' layers in Lightning make load_state_dict forgive every missing weight.
        return checkpoint["state_dict"] if module.strict_loading else None
    trainer = module._trainer
    if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy) or trainer.ckpt_path is None:
        return None
    path = Path(trainer.ckpt_path)
    if path.is_dir():  # reading shards is strict
        return None
    keys: list[str] = list(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"])
    return keys


def _require_keys(module: pl.LightningModule, keys: Iterable[str]) -> None:
    wanted = list(module.state_dict())
    there = {*keys, *base_keys(module, wanted)}
    missing = [key for key in wanted if not {key, key.replace("_orig_mod.", "")} & there]
    if missing:
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise RuntimeError(
            f"The checkpoint lacks {some}: it does not hold all that these settings of LoRAFA train. Use the settings "
            "it was made with."
        )


def _read_shards(module: pl.LightningModule, path: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {"state_dict": dict(module.state_dict())}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        load(state, checkpoint_id=path, no_dist=True)
    return state["state_dict"]
