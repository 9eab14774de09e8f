"""`LoRAFA`: adapters for any LightningModule, in place before the optimizer is built, and saved without their base."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_efficient.lora_fa import (
    LoRAFAConfig,
    LoRAFAReport,
    SavedBytes,
    apply_lora_fa,
    calibrate,
    export_peft,
    keep_adapters_only,
    saved_bytes,
)
from lightning_efficient.lora_fa.config import Backend, Init, Lean
from lightning_efficient.lora_fa.functional import DropoutMode
from lightning_efficient.lora_fa.inject import adapted_layers
from lightning_efficient.lora_fa.state import A_fingerprints, base_fingerprint


class LoRAFA(Callback):
    r"""Fine-tunes through frozen-A adapters, :math:`y = W x + s\,B A x`, which keep only :math:`A x` for backward.

    Adapters are put in before the optimizer is built: in ``setup``, or right after the module's ``configure_model`` if
    it has one. The module's ``configure_optimizers`` has to take the parameters from the module at that time; frozen
    ones among them do no harm. Checkpoints hold the adapters and what else trains; loading stays strict about these.

    Attributes:
        report: what was adapted, once it is.
        stats: ``lora_fa/adapted``, ``lora_fa/fell_back``, ``lora_fa/trainable``, and, once measured,
            ``lora_fa/saved_mib``: what the first training batch kept for backward.

    Args:
        model_attr: attribute of the LightningModule that holds the backbone; ``None``: the whole module.
        target_modules: which linears, see :class:`~lightning_efficient.lora_fa.LoRAFAConfig`. So are all up to
            ``backend``.
        exclude_modules: see ``target_modules``.
        r: see ``target_modules``.
        alpha: see ``target_modules``.
        init: see ``target_modules``; ``"eva"`` and ``"gradient"`` look at the first batches.
        calibration_batches: how many batches of each rank they look at.
        dropout: see ``target_modules``.
        dropout_mode: see ``target_modules``.
        adapter_dtype: see ``target_modules``.
        lean: see ``target_modules``.
        lean_mlp: see ``target_modules``.
        lean_norm: see ``target_modules``.
        modules_to_save: see ``target_modules``.
        use_rslora: see ``target_modules``.
        rank_pattern: see ``target_modules``.
        alpha_pattern: see ``target_modules``.
        seed: see ``target_modules``.
        backend: see ``target_modules``.
        adapter_only_checkpoint: leave the frozen base out of checkpoints.
        check_base: what to do when a checkpoint was made with another base: ``"error"``, ``"warn"`` or ``"off"``.
        export_dir: folder that rank 0 writes the adapter to at the end of fit, in PEFT's format.
        report_saved_bytes: measure what the first training batch keeps for backward.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model_attr: str | None = "model",
        *,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        r: int = 32,
        alpha: float = 64.0,
        init: Init = "orthogonal",
        calibration_batches: int = 8,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "recompute",
        adapter_dtype: str = "float32",
        lean: bool = True,
        lean_mlp: Lean = "auto",
        lean_norm: Lean = "auto",
        modules_to_save: Sequence[str] = (),
        use_rslora: bool = False,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        seed: int = 0,
        backend: Backend = "auto",
        adapter_only_checkpoint: bool = True,
        check_base: Literal["error", "warn", "off"] = "error",
        export_dir: str | None = None,
        report_saved_bytes: bool = True,
    ) -> None:
        if calibration_batches < 1:
            raise ValueError(f"calibration_batches is {calibration_batches}: it counts batches. Set 1 or more.")
        if check_base not in ("error", "warn", "off"):
            raise ValueError(f"check_base is {check_base!r}: there are 'error', 'warn' and 'off'. Use one of them.")
        if isinstance(modules_to_save, str):
            raise ValueError(f"modules_to_save is the string {modules_to_save!r}: write [{modules_to_save!r}].")
        self.model_attr = model_attr
        self.config = LoRAFAConfig(
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            r=r,
            alpha=alpha,
            init=init,
            dropout=dropout,
            dropout_mode=dropout_mode,
            adapter_dtype=adapter_dtype,
            lean=lean,
            lean_mlp=lean_mlp,
            lean_norm=lean_norm,
            modules_to_save=list(modules_to_save),
            use_rslora=use_rslora,
            rank_pattern=rank_pattern or {},
            alpha_pattern=alpha_pattern or {},
            seed=seed,
            backend=backend,
        )
        self.calibration_batches = calibration_batches
        self.adapter_only_checkpoint = adapter_only_checkpoint
        self.check_base = check_base
        self.export_dir = export_dir
        self.report_saved_bytes = report_saved_bytes
        self.report: LoRAFAReport | None = None
        self.stats: dict[str, float] = {}
        self._base = ""
        self._A: dict[str, str] = {}
        self._restored: dict[str, Any] | None = None
        self._calibrated = False
        self._handles: list[RemovableHandle] = []
        self._counting: SavedBytes | None = None

    # ---- putting the adapters in -----------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise NotImplementedError(
                "LoRAFA does not run under DeepSpeedStrategy: ZeRO gathers each linear by hooks that the lean forward "
                "goes past. Use ddp, or ModelParallelStrategy with fully_shard on whole blocks."
            )
        if is_overridden("configure_model", pl_module):
            original = pl_module.configure_model

            def configure_model() -> None:
                original()
                self._inject(trainer, pl_module)

            pl_module.configure_model = configure_model  # type: ignore[method-assign]
        else:
            self._inject(trainer, pl_module)

    def _inject(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        backbone = self._backbone(pl_module)
        if isinstance(trainer.precision_plugin, BitsandbytesPrecision) and not adapted_layers(backbone):
            # First, or its own turn later would quantise the adapters too; it leaves quantised modules alone then.
            trainer.precision_plugin.convert_module(pl_module)
        if self.report is None or not adapted_layers(backbone):
            self.report = apply_lora_fa(backbone, self.config)
            self.stats = {
                "lora_fa/adapted": float(len(self.report.adapted)),
                "lora_fa/fell_back": float(len(self.report.fell_back)),
                "lora_fa/trainable": float(self.report.trainable),
            }
            rank_zero_info(str(self.report))
        self._base = base_fingerprint(pl_module)
        if self.adapter_only_checkpoint and not self._handles:
            self._handles = keep_adapters_only(pl_module)
            if isinstance(trainer.strategy, ModelParallelStrategy):
                # It walks over the parameters itself when it loads, past the module's hooks; A is checked all the same.
                pl_module.strict_loading = False

    def _backbone(self, pl_module: pl.LightningModule) -> nn.Module:
        if self.model_attr is None:
            return pl_module
        backbone = getattr(pl_module, self.model_attr, None)
        if not isinstance(backbone, nn.Module):
            raise RuntimeError(
                f"{type(pl_module).__name__}.{self.model_attr} is no module when adapters are put in: build it in "
                "__init__ or configure_model, name another attribute in model_attr (null: the whole module), or call "
                "apply_lora_fa yourself."
            )
        return backbone

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        trained = [(name, p) for name, p in self._backbone(pl_module).named_parameters() if p.requires_grad]
        missing = [name for name, p in trained if id(p) not in held]
        if trainer.optimizers and missing:
            raise RuntimeError(
                f"No optimizer holds {missing[0]!r}{' and others' if len(missing) > 1 else ''}: the optimizer was "
                "built before the adapters were put in. Build it in configure_optimizers, from self.parameters()."
            )

    # ---- what A is, and that it came back ---------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_restored(pl_module)
        if self.config.init in ("eva", "gradient") and not self._calibrated:
            self._calibrate(trainer, pl_module)
        self._A = A_fingerprints(self._backbone(pl_module))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._check_restored(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_restored(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_restored(pl_module)

    def _check_restored(self, pl_module: pl.LightningModule) -> None:
        """A never changes, so its hash tells under every strategy whether the adapters were read."""
        if self._restored is None:
            return
        expected, self._restored = self._restored["A"], None
        found = A_fingerprints(self._backbone(pl_module))
        sharded = any(hasattr(p, "full_tensor") for p in pl_module.parameters())
        wrong = [name for name in expected if name not in found or (not sharded and found[name] != expected[name])]
        if wrong:
            raise RuntimeError(
                f"The adapter was not restored: {wrong[0]} differs from the checkpoint's, so B would be read with "
                "another A. The checkpoint lacks it, or was made with other settings of LoRAFA."
            )

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        backbone = self._backbone(pl_module)
        if any(hasattr(p, "full_tensor") for p in backbone.parameters()):
            raise RuntimeError(
                f"init={self.config.init!r} needs whole layers, and they are sharded. Calibrate on one process, export "
                "the adapter and load it with load_peft, or use init='orthogonal'."
            )
        method: Any = self.config.init
        run = partial(self._run_batches, trainer, pl_module, backward=method == "gradient")
        with isolate_rng(), _evaluating(pl_module):
            calibrate(
                backbone,
                run,
                method=method,
                seed=self.config.seed,
                reduce=lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"),
            )
        for parameter in pl_module.parameters():
            parameter.grad = None
        with torch.no_grad():  # equal sums can still turn into different bits on different machines
            for layer in adapted_layers(backbone).values():
                for down in layer.lora_A.values():
                    down.weight.copy_(trainer.strategy.broadcast(down.weight))
        self._calibrated = True
        rank_zero_info(f"LoRA-FA: A was chosen by {method} from {self.calibration_batches} batches")

    def _run_batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule, backward: bool) -> None:
        seen = 0
        for seen, batch in enumerate(trainer.train_dataloader or [], start=1):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module.on_before_batch_transfer(batch, 0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            batch = pl_module.on_after_batch_transfer(batch, 0)
            with trainer.precision_plugin.forward_context(), torch.set_grad_enabled(backward):
                loss = pl_module.training_step(batch, seen - 1)
            if backward:
                value = loss["loss"] if isinstance(loss, dict) else loss
                if not isinstance(value, Tensor):
                    raise RuntimeError(
                        "init='gradient' needs a training_step that returns the loss. Use init='eva' or 'orthogonal'."
                    )
                value.backward()
            if seen == self.calibration_batches:
                break
        if not seen:
            raise RuntimeError(f"init={self.config.init!r} needs a batch, and the training data has none.")

    # ---- what a step keeps -----------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.report_saved_bytes and "lora_fa/saved_mib" not in self.stats:
            self._counting = saved_bytes(module=pl_module).__enter__()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._stop_counting(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_counting(trainer)

    def _stop_counting(self, trainer: pl.Trainer) -> None:
        if self._counting is None:
            return
        counted, self._counting = self._counting, None
        counted.__exit__(None, None, None)
        self.stats["lora_fa/saved_mib"] = counted.total / 2**20
        for logger in trainer.loggers:
            logger.log_metrics(self.stats, step=trainer.global_step)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None
        self._leave(pl_module)

    # ---- the end ---------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        changed = [name for name, now in A_fingerprints(self._backbone(pl_module)).items() if self._A.get(name) != now]
        if changed:
            rank_zero_warn(f"{changed[0]} changed during training, though A is frozen: something wrote to it.")
        kept = (
            f", {self.stats['lora_fa/saved_mib']:.1f} MiB kept per batch" if "lora_fa/saved_mib" in self.stats else ""
        )
        rank_zero_info(f"LoRA-FA: {int(self.stats['lora_fa/adapted'])} lean linears trained{kept}")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.export_dir is not None and trainer.is_global_zero:
            folder = export_peft(self._backbone(pl_module), Path(self.export_dir))
            rank_zero_info(f"LoRA-FA: the adapter is in {folder}, in PEFT's format")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave(pl_module)

    def _leave(self, pl_module: pl.LightningModule) -> None:
        pl_module.__dict__.pop("configure_model", None)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "base": self._base, "A": self._A, "calibrated": self._calibrated}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        self._calibrated = bool(state_dict["calibrated"])
        if self.check_base != "off" and state_dict["base"] != self._base:
            message = (
                f"The checkpoint's adapter was trained on another base model (fingerprint {state_dict['base']}, this "
                f"one is {self._base}): its output would be wrong. Load the same pretrained weights before, or set "
                "check_base='warn' if you know better."
            )
            if self.check_base == "error":
                raise RuntimeError(message)
            rank_zero_warn(message)


@contextmanager
def _evaluating(pl_module: pl.LightningModule) -> Iterator[None]:
    """Without dropout, and with nothing logged: `self.log` works in the Trainer's loops only."""
    modes = {each: each.training for each in pl_module.modules()}
    silent = dict.fromkeys(("log", "log_dict"), _nothing)
    pl_module.eval()
    pl_module.__dict__.update(silent)
    try:
        yield
    finally:
        for name in silent:
            del pl_module.__dict__[name]
        for each, training in modes.items():
            each.training = training


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
