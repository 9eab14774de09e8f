"""The parts of a measurement, each a number of optimizer steps that something is done with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from lightning_efficient._compat import compiles
from lightning_efficient.callbacks.dissect_ranges import RangesForActions
from lightning_efficient.dissect import Attribution, CleanWindow, Counts, Recorder, SavedBytes
from lightning_efficient.dissect.attribution import ENGINE, LOOP
from lightning_efficient.dissect.events import PHASE, STEP
from lightning_efficient.dissect.flops import FlopCount
from lightning_efficient.dissect.memory import PeakMemory
from lightning_efficient.dissect.ranges import ModuleRanges


class Part:
    """Steps that nothing is done with.

    Args:
        steps: how many.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0

    @property
    def full(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.steps

    def enter(self) -> None:
        """The first step is about to begin."""

    def begin_step(self) -> None:
        """A step begins."""

    def begin_batch(self, batch: Any) -> None:
        """A batch of the step begins."""

    def before_backward(self) -> None:
        """Backward begins."""

    def after_backward(self) -> None:
        """Backward has ended."""

    def end_batch(self) -> None:
        """A batch has ended; what follows is the way to the next one."""

    def end_step(self) -> None:
        """A step has ended with all that belongs to it: the next one's first batch is there."""
        self.done += 1

    def interrupt(self, *, complete: bool) -> None:
        """Something that is not training begins; ``complete`` if the optimizer has moved in the step before it."""
        self.done += complete

    def leave(self) -> None:
        """Undo whatever was set up; done once or more, also after an error."""


class Clean(Part):
    """Steps that are timed, and whose peak of memory counts.

    Args:
        steps: how many.
        module: what is trained.
        count: what a batch holds.
    """

    def __init__(self, steps: int, module: pl.LightningModule, count: Callable[[Any], Counts]) -> None:
        super().__init__(steps)
        self.window = CleanWindow(module.device)
        self.peak_bytes: tuple[int | None, int | None] = (None, None)
        self._peak = PeakMemory(module.device)
        self._count = count
        self._watching = False

    @property
    def peak_unknown(self) -> str:
        """Why the peak is None; empty where it is not."""
        return self._peak.reason

    @override
    def begin_step(self) -> None:
        if not self._watching:  # after validation, too, whose memory is not that of steps
            self._peak.reset()
            self._watching = True
        self.window.begin_step()

    @override
    def begin_batch(self, batch: Any) -> None:
        self.window.start_batch(self._count(batch))

    @override
    def end_batch(self) -> None:
        self.window.end_batch()

    @override
    def end_step(self) -> None:
        self.window.end_step()
        self.done = self.window.done

    @override
    def interrupt(self, *, complete: bool) -> None:
        self.window.interrupt()
        self._read_peak()

    @override
    def leave(self) -> None:
        self._read_peak()

    def _read_peak(self) -> None:
        if self._watching:
            self._watching = False
            (before, reserved_before), (now, reserved) = self.peak_bytes, self._peak.read()
            self.peak_bytes = _larger(before, now), _larger(reserved_before, reserved)


class Dissected(Part):
    """Steps under the profiler.

    Args:
        steps: how many.
        trainer: whose profiling points become ranges.
        module: whose submodules become rows.
        ignore: state key of the callback whose hooks begin and end the steps.
    """

    def __init__(self, steps: int, trainer: pl.Trainer, module: pl.LightningModule, *, ignore: str) -> None:
        super().__init__(steps)
        self.recorder = Recorder(module, trainer.optimizers, root=False)
        self._trainer: Any = trainer
        self._ignore = ignore
        self._between = False

    def result(self) -> Attribution | None:
        """What the steps came down to."""
        return self.recorder.result() if self.done else None

    @override
    def begin_step(self) -> None:
        if not self.recorder.running:
            self.recorder.start()
            self._trainer.profiler = RangesForActions(
                self._trainer.profiler,
                open_range=self.recorder.open,
                close_range=self.recorder.close,
                ignore=self._ignore,
            )
        self.recorder.open(STEP)

    @override
    def begin_batch(self, batch: Any) -> None:
        self._close_between()

    @override
    def before_backward(self) -> None:
        self.recorder.open(f"{PHASE}backward:{ENGINE}")

    @override
    def after_backward(self) -> None:
        self.recorder.close()

    @override
    def end_batch(self) -> None:
        self.recorder.open(f"{PHASE}other:{LOOP}")
        self._between = True

    @override
    def end_step(self) -> None:
        self._close_between()
        self.recorder.close()
        self.done += 1

    @override
    def interrupt(self, *, complete: bool) -> None:
        if complete:
            self.end_step()
        else:
            self.recorder.discard()
        self.leave()

    @override
    def leave(self) -> None:
        if isinstance(self._trainer.profiler, RangesForActions):
            self._trainer.profiler = self._trainer.profiler.inner
        self._between = False
        self.recorder.stop()

    def _close_between(self) -> None:
        if self._between:
            self.recorder.close()
            self._between = False


class Counted(Part):
    """Steps of which FLOPs and the bytes kept for backward are counted, unless the model is compiled.

    Args:
        steps: how many.
        module: what is trained.
        count: what a batch holds.

    Attributes:
        flops: of the last complete step; None where nothing was counted.
        counts: what its batches held.
        saved_total: bytes that waited for backward at once, at most; None where nothing was counted.
        saved: the most that each module kept for one backward.
        interrupted: whether something was kept that cannot be seen; see :class:`SavedBytes`.
        compiled: whether the model is compiled.
    """

    def __init__(self, steps: int, module: pl.LightningModule, count: Callable[[Any], Counts]) -> None:
        super().__init__(steps)
        self.flops: FlopCount | None = None
        self.counts: list[Counts] = []
        self.saved_total: int | None = None
        self.saved: dict[str, int] = {}
        self.interrupted = False
        self.compiled = compiles(module)
        self._module = module
        self._count = count
        self._names: dict[str, nn.Module] = {}
        self._counting: FlopCount | None = None
        self._keeping: SavedBytes | None = None

    @override
    def begin_step(self) -> None:
        self.counts = []
        if not self.compiled:
            self._names = ModuleRanges(self._module, root=False).modules  # by the names of the rows
            self._counting = FlopCount(self._module)
            self._counting.__enter__()

    @override
    def begin_batch(self, batch: Any) -> None:
        self.counts.append(self._count(batch))
        self._keep()

    @override
    def before_backward(self) -> None:
        self._stop_keeping()  # what recomputation keeps for a moment waits for nothing

    @override
    def after_backward(self) -> None:
        self._keep()  # a batch may have another forward and backward, as of a GAN's second network

    @override
    def end_batch(self) -> None:
        self._stop_keeping()

    @override
    def end_step(self) -> None:
        self.done += 1
        self.flops = self._counting
        self.leave()

    @override
    def interrupt(self, *, complete: bool) -> None:
        if complete:
            self.end_step()
        self.leave()

    @override
    def leave(self) -> None:
        self._stop_keeping()
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None

    def _keep(self) -> None:
        self._stop_keeping()
        if not self.compiled:
            self._keeping = SavedBytes(self._module, names=self._names)
            self._keeping.__enter__()

    def _stop_keeping(self) -> None:
        if self._keeping is None:
            return
        self._keeping.__exit__(None, None, None)
        self.interrupted |= self._keeping.interrupted
        self.saved_total = max(self.saved_total or 0, self._keeping.total)
        for name, kept in self._keeping.by_module().items():
            self.saved[name] = max(self.saved.get(name, 0), kept)
        self._keeping = None


def _larger(one: int | None, other: int | None) -> int | None:
    return max((each for each in (one, other) if each is not None), default=None)


class MeasurementParts(NamedTuple):
    """All parts, in their order."""

    warmup: Part
    clean: Clean
    dissected: Dissected
    counted: Counted
