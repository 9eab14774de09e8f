"""`LoRAFA`: adapters for any LightningModule, in place before the optimizer is built, and saved without their base."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_efficient import _compat
from lightning_efficient.callbacks.lora_fa_calibration import choose_directions
from lightning_efficient.callbacks.lora_fa_checkpoint import (
    AdapterRecord,
    CheckBase,
    backbone_of,
    check_restored,
    check_settings,
    record_adapters,
    record_of,
)
from lightning_efficient.lora_fa import (
    LoRAFAConfig,
    LoRAFAReport,
    SavedBytes,
    apply_lora_fa,
    export_peft,
    keep_adapters_only,
    saved_bytes,
)
from lightning_efficient.lora_fa.config import Backend, Init, Lean
from lightning_efficient.lora_fa.functional import DropoutMode
from lightning_efficient.lora_fa.inject import adapted_layers, report
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
        report_saved_bytes: measure what the first training batch keeps for backward; not where something is compiled.

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
        check_base: CheckBase = "error",
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
        self._A: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []
        self._strict_loading: bool | None = None
        self._counting: SavedBytes | None = None

    # ---- putting the adapters in -----------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._refuse(trainer)
        self.stats.pop("lora_fa/saved_mib", None)
        if is_overridden("configure_model", pl_module):
            original = pl_module.configure_model

            def configure_model() -> None:
                original()
                self._inject(trainer, pl_module)

            pl_module.configure_model = configure_model  # type: ignore[method-assign]
        else:
            self._inject(trainer, pl_module)

    def _refuse(self, trainer: pl.Trainer) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise NotImplementedError(
                "LoRAFA does not run under DeepSpeedStrategy: ZeRO gathers each linear by hooks that the lean forward "
                "goes past. Use ddp, or ModelParallelStrategy with fully_shard on whole blocks."
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(each, WeightAveraging) for each in callbacks[: callbacks.index(self)]):
            raise RuntimeError(
                "A WeightAveraging callback stands before LoRAFA: it has copied the model without its adapters. List "
                "LoRAFA first."
            )

    def _inject(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        backbone = self._backbone(pl_module)
        before = adapted_layers(backbone)
        if not before and _compat.starts_processes_by_fork_or_spawn(trainer):
            raise RuntimeError(
                "LoRAFA cannot put adapters in under ddp_spawn, ddp_fork or ddp_notebook: this process is a copy, and "
                "the caller's module would get none of what is trained. Use ddp, or call apply_lora_fa in __init__."
            )
        if not before and isinstance(trainer.precision_plugin, BitsandbytesPrecision):
            # First, or its own turn later would quantise the adapters too; it leaves quantised modules alone then.
            trainer.precision_plugin.convert_module(pl_module)
        check_settings(backbone, self.config)
        record = record_of(pl_module)
        if self.report is None or record is None or not before:
            self._tell(apply_lora_fa(backbone, self.config))
            rank_zero_info(str(self.report))
        if record is None or not before:
            # Taken once: what the Trainer casts or shards later is the same base still.
            record = AdapterRecord(self.config, self.model_attr, base_fingerprint(pl_module))
            record_adapters(pl_module, record)
        record.check_base, record.adapter_only = self.check_base, self.adapter_only_checkpoint
        if self.adapter_only_checkpoint and not self._handles:
            self._handles = keep_adapters_only(pl_module)
            if isinstance(trainer.strategy, ModelParallelStrategy):
                # It looks up each parameter in a full checkpoint, the base's too; the record's checks are strict.
                self._strict_loading, pl_module.strict_loading = pl_module.strict_loading, False

    def _tell(self, now: LoRAFAReport) -> None:
        self.report = now
        self.stats |= {
            "lora_fa/adapted": float(len(now.adapted)),
            "lora_fa/fell_back": float(len(now.fell_back)),
            "lora_fa/trainable": float(now.trainable),
        }

    def _backbone(self, pl_module: pl.LightningModule) -> nn.Module:
        return backbone_of(pl_module, self.model_attr)

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
        if self.export_dir is not None and any(hasattr(p, "full_tensor") for _, p in trained):
            raise RuntimeError(
                f"export_dir={self.export_dir!r} cannot be written at the end: the adapters are sharded over ranks. "
                "Remove it, read the checkpoint with load_lora_fa_checkpoint afterwards, and call export_peft."
            )

    # ---- what A is, and that it came back ---------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_restored(pl_module)
        backbone, record = self._backbone(pl_module), record_of(pl_module)
        assert record is not None
        if self.config.init in ("eva", "gradient") and not record.calibrated:
            choose_directions(trainer, pl_module, backbone, self.config, self.calibration_batches)
            record.calibrated = True
            rank_zero_info(f"LoRA-FA: A was chosen by {self.config.init} from {self.calibration_batches} batches")
        self._A = A_fingerprints(backbone)
        self._report_again(report(backbone))

    def _report_again(self, now: LoRAFAReport) -> None:
        """An optimizer that watches layers has put its hooks on since the adapters were put in."""
        assert self.report is not None
        if new := [name for name in now.fell_back if name not in self.report.fell_back]:
            rank_zero_warn(
                f"{len(new)} adapted linears are no longer lean ({new[0]}: {now.fell_back[new[0]]}): they train as "
                "before, but their forward keeps more for backward."
            )
        self._tell(replace(now, lean_blocks=self.report.lean_blocks))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            check_restored(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_restored(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_restored(pl_module)

    # ---- what a step keeps -----------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.report_saved_bytes or "lora_fa/saved_mib" in self.stats:
            return
        if not _compat.compiles(pl_module):  # it would be compiled with the hooks, and once more without them
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
        lean, plain = int(self.stats["lora_fa/adapted"]), int(self.stats["lora_fa/fell_back"])
        rank_zero_info(f"LoRA-FA: {lean + plain} adapted linears trained, {lean} of them lean{kept}")

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
        if self._strict_loading is not None:
            pl_module.strict_loading, self._strict_loading = self._strict_loading, None
        for handle in self._handles:
            handle.remove()
        self._handles = []
