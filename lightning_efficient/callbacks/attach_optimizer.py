"""`AttachOptimizer`: gives optimizers that watch layers the module, and shows what they do."""

import statistics
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_efficient import _compat
from lightning_efficient.eva import LayerReport
from lightning_efficient.optimizers import Eva, EvaP
from lightning_efficient.optimizers.eva import EvaStats

_CANCELLED = 1e-4
"""A layer's output gradient counts as cancelled below this share of the largest of the model."""


@runtime_checkable
class Attachable(Protocol):
    """What the callback looks for in an optimizer."""

    def attach(self, module: nn.Module, skip: Sequence[str] = ()) -> Any:
        """Watch the layers of ``module``."""

    def detach(self) -> None:
        """Stop watching."""


class AttachOptimizer(Callback):
    """Gives each optimizer that has ``attach`` the module: :class:`~lightning_efficient.optimizers.Eva` and its like.

    It does so at fit start: after the module is on its device, before a checkpoint's optimizer state is restored and
    before a compiled module runs for the first time. Under a gradient scaler the optimizer learns the loss scale. Hooks
    are taken off again when fit ends, however it ends.

    Every ``log_every_n_steps`` optimizer steps, to every logger of the Trainer (a second optimizer logs ``eva1/...``):

    ``eva/rho``
        median over layers of the share of the captured direction that the preconditioner takes out of the gradient.
        Near 0 it does nothing.
    ``eva/rho_max``
        the largest of them.
    ``eva/nu`` (this and the next two: not for EvaP)
        the step size factor of the last step.
    ``eva/clipped``
        share of the steps since the last entry that the KL clip made shorter. While it is 1, the learning rate has no
        effect on the preconditioned layers.
    ``eva/skipped_kv``
        steps so far whose vectors were not finite and were dropped.

    It warns once when the median of rho stays below ``warn_inert_below`` for two entries, and names layers whose output
    gradient cancels out, as it does in front of BatchNorm. Between entries nothing is read from the device.

    In the CLI, ``fit`` adds the callback by itself.

    Attributes:
        stats: the last entry, by name.

    Args:
        skip: shell patterns of names of modules to leave to the optimizer's fallback rule, such as ``"*lm_head"``.
        log_every_n_steps: optimizer steps between entries.
        warn_inert_below: a median of rho below it counts as inert.
        required: warn where no optimizer can be attached; the CLI sets it to false for the one that it adds.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        skip: Sequence[str] = (),
        *,
        log_every_n_steps: int = 50,
        warn_inert_below: float = 1e-3,
        required: bool = True,
    ) -> None:
        if isinstance(skip, str):
            raise ValueError(f"skip is the string {skip!r}: it is a list of patterns. Write [{skip!r}].")
        if log_every_n_steps < 1:
            raise ValueError(f"log_every_n_steps is {log_every_n_steps}: it counts steps. Set 1 or more.")
        if not 0 <= warn_inert_below <= 1:
            raise ValueError(
                f"warn_inert_below is {warn_inert_below}: rho is a share. Set it in [0, 1]; 0 never warns."
            )
        self.skip = list(skip)
        self.log_every_n_steps = log_every_n_steps
        self.warn_inert_below = warn_inert_below
        self.required = required
        self.stats: dict[str, float] = {}
        self._attached: list[Attachable] = []
        self._scaled: list[Eva] = []
        self._due = 0
        self._inert_entries: dict[int, int] = {}
        self._warned: set[str] = set()
        self._counted: dict[int, tuple[int, int]] = {}

    # ---- attaching -------------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._inert_entries, self._counted, self._warned, self.stats = {}, {}, set(), {}
        found = [each for each in map(_bare, trainer.optimizers) if isinstance(each, Attachable)]
        if not found and self.required:
            rank_zero_warn(
                "AttachOptimizer found no optimizer to attach: none has an attach method. Use "
                "lightning_efficient.optimizers.Eva or EvaP, or remove the callback."
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for optimizer in found:
            if not getattr(optimizer, "attached", False):
                optimizer.attach(pl_module, skip=self.skip)
            elif self.skip:
                rank_zero_warn(
                    f"AttachOptimizer(skip={self.skip!r}) has no effect: the optimizer was attached before, in "
                    "configure_optimizers perhaps. Give skip to that attach, or leave it to the callback."
                )
            self._attached.append(optimizer)
            if scaler is not None and isinstance(optimizer, Eva) and optimizer.loss_scale is None:
                optimizer.loss_scale = lambda: _compat.loss_scale(scaler)
                self._scaled.append(optimizer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        for optimizer in self._attached:
            optimizer.detach()
        for optimizer in self._scaled:
            optimizer.loss_scale = None
        self._attached, self._scaled = [], []

    # ---- watching --------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._plan(trainer.global_step)
        for index, optimizer in enumerate(self._watched()):
            if isinstance(optimizer, Eva):
                self._steps_of(optimizer, index)

    def _watched(self) -> list[Eva | EvaP]:
        return [each for each in self._attached if isinstance(each, (Eva, EvaP))]

    def _plan(self, step: int) -> None:
        self._due = (step // self.log_every_n_steps + 1) * self.log_every_n_steps

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < self._due:
            return
        self._plan(trainer.global_step)
        for index, optimizer in enumerate(self._watched()):
            self._observe(trainer, pl_module, optimizer, index)

    def _observe(self, trainer: pl.Trainer, module: nn.Module, optimizer: Eva | EvaP, index: int) -> None:
        reports = {name: report for name, report in optimizer.kv_report().items() if report.rho is not None}
        shares = [report.rho for report in reports.values() if report.rho is not None]
        if not shares:
            return
        metrics = {"rho": statistics.median(shares), "rho_max": max(shares)}
        if isinstance(optimizer, Eva):
            metrics |= self._steps_of(optimizer, index)
            self._warn_if_inert(metrics["rho"], index)
            self._warn_of_cancelled(module, optimizer, reports)
        named = {f"eva{index or ''}/{name}": value for name, value in metrics.items()}
        self.stats.update(named)
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)

    def _steps_of(self, optimizer: Eva, index: int) -> dict[str, float]:
        """What its steps since the last entry were like."""
        stats, (steps, clipped) = optimizer.stats, self._counted.get(index, (0, 0))
        self._counted[index] = stats.counted_steps, stats.clipped
        return {
            "nu": 1.0 if optimizer.nu is None else float(optimizer.nu),
            "clipped": (stats.clipped - clipped) / max(1, stats.counted_steps - steps),
            "skipped_kv": float(stats.skipped_kv),
        }

    def _warn_if_inert(self, rho: float, index: int) -> None:
        self._inert_entries[index] = self._inert_entries.get(index, 0) + 1 if rho < self.warn_inert_below else 0
        if self._inert_entries[index] == 2:
            self._warn(
                f"inert{index}",
                f"Eva's curvature term is numerically inert: the median of eva/rho is {rho:.1e}, so the update is a "
                "scaled gradient. Lower damping, or use g_scale='expectation', damping_mode='relative' or "
                "variant='eva_f'.",
            )

    def _warn_of_cancelled(self, module: nn.Module, optimizer: Eva, reports: dict[str, LayerReport]) -> None:
        """Over the whole batch, the backward of BatchNorm has mean zero: what is left of g is rounding."""
        if optimizer.config.kv_samples is not None or optimizer.config.variant != "eva":
            return
        norms = {name: report.g_norm for name, report in reports.items() if report.g_norm is not None}
        cancelled = [name for name, norm in norms.items() if norm < _CANCELLED * max(norms.values())]
        if cancelled and any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules()):
            self._warn(
                "cancelled",
                f"The output gradients of {', '.join(cancelled[:3])}{' and others' if len(cancelled) > 3 else ''} "
                "cancel out over the batch, as they do in front of BatchNorm: Eva has no curvature there. Use "
                "variant='eva_f', or set kv_samples below the batch size.",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(message)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in self._watched():
            stats = optimizer.stats
            if not stats.counted_steps:
                continue
            shares = [report.rho for report in optimizer.kv_report().values() if report.rho is not None]
            said = (
                f"{type(optimizer).__name__}: {stats.counted_steps} steps preconditioned {len(shares)} layers, median "
                f"rho {statistics.median(shares or [0.0]):.2g}"
            )
            if isinstance(stats, EvaStats):
                said += (
                    f", {stats.kv_updates} vector updates ({stats.skipped_kv} dropped), "
                    f"{stats.clipped / stats.counted_steps:.0%} of the steps clipped"
                )
            rank_zero_info(said)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself: what is set on Lightning's wrapper stays on the wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
