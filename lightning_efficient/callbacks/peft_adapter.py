"""`PEFTAdapter`: an adapter of the package peft in any LightningModule, in place before the optimizer is built."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from lightning_efficient.callbacks.lora_fa_checkpoint import backbone_of


class PEFTAdapter(Callback):
    """Freezes the backbone and puts an adapter of peft into it, such as plain LoRA (extra ``peft``).

    The adapter is put in during ``setup``, or right after the module's ``configure_model`` if it has one; a second fit
    finds it there. The module's ``configure_optimizers`` has to take the parameters that train from the module at that
    time. Checkpoints hold the whole model.

    Attributes:
        stats: ``peft/trainable`` and ``peft/layers``: parameters that train, and layers that were adapted.

    Args:
        config: of peft, such as ``{peft_type: LORA, r: 64, lora_alpha: 128, target_modules: [q_proj, v_proj]}``.
        model_attr: attribute of the LightningModule that holds the backbone; ``None``: the whole module.
        seed: of the adapter's first weights, whatever was drawn before; ``None``: they come from torch's global
            generator as it stands.

    Raises:
        ModuleNotFoundError: peft is not installed (in ``setup``).
        ValueError: peft knows no such configuration (in ``setup``), or finds no layer that it names.
    """

    def __init__(self, config: dict[str, Any], model_attr: str | None = "model", *, seed: int | None = None) -> None:
        if "peft_type" not in config:
            raise ValueError(
                f"The adapter's config has no peft_type (it has {', '.join(config) or 'nothing'}): peft cannot tell "
                "which adapter to make. Add, for example, peft_type: LORA."
            )
        self.config = config
        self.model_attr = model_attr
        self.seed = seed
        self.stats: dict[str, float] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _import_peft()
        if not is_overridden("configure_model", pl_module):
            self._inject(trainer, pl_module)
            return
        original = pl_module.configure_model

        def configure_model() -> None:
            original()
            self._inject(trainer, pl_module)

        pl_module.configure_model = configure_model  # type: ignore[method-assign]

    def _inject(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        backbone = backbone_of(pl_module, self.model_attr)
        if not any(isinstance(each, BaseTunerLayer) for each in backbone.modules()):
            if any(isinstance(each, FSDPModule) for each in backbone.modules()):
                raise RuntimeError(
                    "The model is sharded already: an adapter has to be there before fully_shard. Put it in inside of "
                    "configure_model, or train it under another strategy."
                )
            if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
                # First, or its own turn later would quantise the adapters too.
                trainer.precision_plugin.convert_module(pl_module)
            self._put_in(backbone)
        layers = sum(isinstance(each, BaseTunerLayer) for each in backbone.modules())
        trainable = sum(each.numel() for each in backbone.parameters() if each.requires_grad)
        self.stats = {"peft/trainable": float(trainable), "peft/layers": float(layers)}
        rank_zero_info(f"PEFT: {layers} adapted layers, {trainable:,} parameters train")

    def _put_in(self, backbone: nn.Module) -> None:
        peft = _import_peft()
        try:
            with torch.random.fork_rng(enabled=self.seed is not None):
                if self.seed is not None:
                    torch.manual_seed(self.seed)
                peft.inject_adapter_in_model(peft.get_peft_config(dict(self.config)), backbone)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"peft cannot make the adapter {self.config}: {str(error).strip().partition(chr(10))[0]}. Correct the "
                "config; its keys are those of peft's configuration classes, such as LoraConfig."
            ) from error

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        backbone = backbone_of(pl_module, self.model_attr)
        missing = [name for name, p in backbone.named_parameters() if p.requires_grad and id(p) not in held]
        if trainer.optimizers and missing:
            raise RuntimeError(
                f"No optimizer holds {missing[0]!r}{' and others' if len(missing) > 1 else ''}: the optimizer was "
                "built before the adapter was put in. Build it in configure_optimizers, from self.parameters()."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("configure_model", None)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        pl_module.__dict__.pop("configure_model", None)


def _import_peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "PEFTAdapter needs peft, but it is not installed. Install it with: pip install 'lightning-efficient[peft]'"
        ) from error
    return peft
