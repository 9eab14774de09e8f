"""`Dissect`: where the time and the memory of this training's steps go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_efficient._compat import starts_processes_by_fork_or_spawn
from lightning_efficient.callbacks.dissect_parts import Clean, Counted, Dissected, MeasurementParts, Part
from lightning_efficient.callbacks.dissect_report import build_report, measured_values, write_report
from lightning_efficient.callbacks.dissect_steps import StepCounter, require_steps
from lightning_efficient.dissect import Counts, DissectReport, Window, count_batch
from lightning_efficient.dissect.report.dissection import render_text

CountTokens = Callable[[Any], "int | Tensor"]


class Dissect(Callback):
    """Measures a few of the first steps of a fit, prints what they were spent on, and lets the training go on.

    In this order: ``warmup`` steps that do not count; ``clean`` steps, from which throughput and peak memory come and
    in which nothing is hooked or profiled; ``dissect`` steps under the profiler, cut into rows for every module and for
    what lies beside them; ``memory`` steps that count FLOPs and the bytes kept for backward. A step is an optimizer
    step, with all its accumulated batches. Training is not changed: losses and weights are the same bit for bit.

    The report is in ``report``, is printed, goes to the Trainer's loggers as ``dissect/...``, and is written as
    ``dissect.json`` and ``dissect.html``. With several ranks it tells them apart, and names one that lags.

    Definitions: ``docs/methods/dissect.md``; after "Dissecting the Runtime Performance of the Training, Fine-tuning,
    and Inference of Large Language Models" (arXiv 2311.03687).

    Args:
        warmup: steps before the measurement: compilation, growth of the allocator, DDP's second buckets.
        clean: steps that are timed.
        dissect: steps that are profiled; 0 for none.
        memory: 1 to count FLOPs and saved bytes in one more step, 0 not to.
        tokens_fn: counts the tokens of a batch; default: see :func:`lightning_efficient.dissect.count_batch`.
        peak_flops: dense peak of one device in FLOP/s, where the table does not know it or knows it wrongly.
        out: folder of the files; default: where the Trainer's logger writes.
        print_report: whether rank 0 prints the report.
        stop_after: end the fit when the measurement has ended.

    Attributes:
        report: what was measured, on every rank; None until then, and after a fit whose processes were started by fork
            or spawn, which take it with them: read ``dissect.json`` there.

    Raises:
        ValueError: a number of steps is negative, or ``clean`` is below 1.
        MisconfigurationException: at the start, the fit is too short.
    """

    def __init__(
        self,
        warmup: int = 5,
        clean: int = 20,
        *,
        dissect: int = 2,
        memory: int = 1,
        tokens_fn: CountTokens | None = None,
        peak_flops: float | None = None,
        out: str | None = None,
        print_report: bool = True,
        stop_after: bool = False,
    ) -> None:
        super().__init__()
        self.stop_after = stop_after
        if clean < 1 or min(warmup, dissect) < 0 or memory not in (0, 1):
            raise ValueError(
                f"Dissect cannot measure with warmup={warmup}, clean={clean}, dissect={dissect}, memory={memory}: "
                "clean has to be 1 or more, memory 0 or 1, and the others 0 or more. Leave them out for the defaults."
            )
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(
                f"peak_flops is {peak_flops}: a device does more than nothing. Give FLOP/s, e.g. 989.5e12."
            )
        self.window = Window(warmup, clean, dissect, memory)
        self.tokens_fn, self.peak_flops, self.out, self.print_report = tokens_fn, peak_flops, out, print_report
        self.report: DissectReport | None = None
        self._ahead: list[Part] = []
        self._in_step = False

    @property
    def stats(self) -> dict[str, float]:
        """What was measured, as it is logged; empty until then."""
        return measured_values(self.report) if self.report is not None else {}

    @property
    def steps_needed(self) -> int:
        """Optimizer steps that a fit has to have; validation in between needs more."""
        window = self.window
        # The step after the last one timed or profiled says when that ended.
        return window.warmup + window.clean + window.dissect + max(window.memory, 1)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.report = None
        if getattr(trainer, "fast_dev_run", False):
            rank_zero_info("Dissect measures nothing in a fast_dev_run.")
            return
        require_steps(trainer, self.steps_needed, self._needs())
        self._require_no_other_profile(trainer)
        if starts_processes_by_fork_or_spawn(trainer):
            rank_zero_warn(
                "Dissect.report stays None after this fit: its processes were started by fork or spawn, and take what "
                "they measured with them. Read dissect.json, or choose strategy='ddp'."
            )
        self._parts = MeasurementParts(
            Part(self.window.warmup),
            Clean(self.window.clean, pl_module, self._count),
            Dissected(self.window.dissect, trainer, pl_module, ignore=self.state_key),
            Counted(self.window.memory, pl_module, self._count),
        )
        self._ahead = list(self._parts)
        self._in_step = False
        self._loss: Tensor | None = None
        self._steps = StepCounter(trainer)
        self._ahead[0].enter()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._ahead and self._steps.ended:
            self._steps.go_on()
            if self._in_step:
                self._ahead[0].end_step()
            self._in_step = self._go_on(trainer, pl_module)
            if self._in_step:
                self._ahead[0].begin_step()
        if self._in_step:
            self._ahead[0].begin_batch(batch)
            self._steps.start_batch()
            if self._steps.stuck:
                rank_zero_warn(f"Dissect gives up: {self._steps.stuck}")
                self._stop()
                trainer.should_stop |= self.stop_after

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._in_step:
            self._ahead[0].before_backward()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._in_step:
            self._ahead[0].after_backward()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._in_step:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            self._loss = loss.detach() if isinstance(loss, Tensor) else self._loss
            self._ahead[0].end_batch()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._interrupt()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._ahead:
            return
        self._interrupt()
        self._go_on(trainer, pl_module)
        if not self._ahead:
            return
        has_clean_steps = self._parts.clean.full
        rest = "the report is of those that were complete" if has_clean_steps else "there is no report"
        rank_zero_warn(
            f"Dissect saw too few steps ({self._needs()}): the fit ended, or was validated too often, before all of "
            f"them, and {rest}. Train longer, or ask for fewer."
        )
        self._stop()
        if has_clean_steps:
            self._finish(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def _count(self, batch: Any) -> Counts:
        counts = count_batch(batch)
        return counts if self.tokens_fn is None else replace(counts, tokens=self.tokens_fn(batch))

    def _go_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Go on to the first part that still wants steps; False, and the report, where there is none."""
        while self._ahead and self._ahead[0].full:
            self._ahead.pop(0).leave()
            if self._ahead:
                self._ahead[0].enter()
            else:
                self._steps.remove()
                self._finish(trainer, pl_module)
        return bool(self._ahead)

    def _interrupt(self) -> None:
        if self._in_step:
            self._in_step = False
            self._ahead[0].interrupt(complete=self._steps.ended)

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the report together on all ranks at the same step; rank 0 prints and writes it."""
        loss = float(self._loss) if self._loss is not None and self._loss.numel() == 1 else None
        self.report = report = build_report(self._parts, trainer, pl_module, peak_flops=self.peak_flops, loss=loss)
        for logger in trainer.loggers:
            logger.log_metrics(measured_values(report), step=trainer.global_step)
        folder = trainer.strategy.broadcast(self.out or trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero:
            if self.print_report:
                rank_zero_info(render_text(report))
            write_report(report, Path(folder))
        if self.stop_after:
            trainer.should_stop = True

    def _stop(self) -> None:
        if self._ahead:
            self._steps.remove()
        for part in self._ahead:
            part.leave()
        self._ahead, self._in_step = [], False

    def _require_no_other_profile(self, trainer: pl.Trainer) -> None:
        if self.window.dissect and isinstance(getattr(trainer, "profiler", None), PyTorchProfiler):
            raise MisconfigurationException(
                f"The Trainer's {type(trainer.profiler).__name__} and Dissect both record with torch.profiler, which "  # type: ignore[attr-defined]
                "keeps one record at a time. Leave out the Trainer's profiler, or give Dissect(dissect=0)."
            )

    def _needs(self) -> str:
        window = self.window
        return f"warmup={window.warmup}, clean={window.clean}, dissect={window.dissect}, memory={window.memory}"
