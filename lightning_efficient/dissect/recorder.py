"""Records training steps with the profiler, every module's forward in a named range, and cuts them into rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient._compat import profiler_range
from lightning_efficient.dissect.attribution import Attribution, attribute
from lightning_efficient.dissect.events import PHASE, STEP, Event, events_of
from lightning_efficient.dissect.ranges import ModuleRanges
from lightning_efficient.dissect.result import PHASES, Phase


class Recorder:
    """Profiles steps of any training loop in plain torch.

    Profiled steps are slower than others: take the throughput from steps outside of the recorder.

    Args:
        module: the model.
        optimizers: get a row each; without them, those of one class share a row. Of one that is no torch optimizer,
            such as DeepSpeed's, the one within counts.
        root: whether operations of the model's own ``forward`` are a row, named by the empty path.

    Attributes:
        events: what was recorded so far.
        ranges: the hooks on the modules.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recorder = Recorder(model, [optimizer])
        >>> with recorder:
        ...     for _ in range(2):
        ...         with recorder.step():
        ...             with recorder.range("forward", "<training_step>"):
        ...                 loss = model(torch.randn(4, 8)).square().mean()
        ...             loss.backward()
        ...             optimizer.step()
        >>> breakdown = recorder.result().host
        >>> [row.name for row in breakdown.rows][:3]
        ['0', '1', '2']
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer] = (), *, root: bool = True) -> None:
        self.ranges = ModuleRanges(module, root=root)
        self._optimizers = [each for given in optimizers if (each := _of_torch(given)) is not None]
        self._handles: list[RemovableHandle] = []
        self._open: list[Any] = []
        self.events: list[Event] = []
        self._profile: torch.profiler.profile | None = None

    @property
    def running(self) -> bool:
        """Whether it records now."""
        return self._profile is not None

    def start(self) -> None:
        """Attach the hooks and start the profiler; may be done again after :meth:`stop`, which adds to the record."""
        # The profiler's library writes a line on standard error at each start otherwise.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()
        self.ranges.attach()
        for number, optimizer in enumerate(self._optimizers):
            which = f"{number} " if len(self._optimizers) > 1 else ""
            self._watch(optimizer, f"<optimizer {which}{type(optimizer).__name__}>")

    def stop(self) -> None:
        """Stop the profiler and remove the hooks; harmless when done twice."""
        self.ranges.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.close_to(0)
        if self._profile is not None:
            profile, self._profile = self._profile, None
            profile.stop()
            # The numbers that link kernels to operators begin anew with each record.
            offset = max((each.correlation for each in self.events), default=0)
            self.events += [
                replace(each, correlation=each.correlation + offset) if offset and each.correlation else each
                for each in events_of(profile)
            ]

    def discard(self) -> None:
        """Stop, and forget what was recorded since the last :meth:`start`."""
        kept = list(self.events)
        self.stop()
        self.events = kept

    def open(self, name: str) -> int:
        """Begin a range; ranges end in the opposite order.

        Returns:
            How many were open before, for :meth:`close_to`.
        """
        entered = profiler_range(name)
        entered.__enter__()
        self._open.append(entered)
        return len(self._open) - 1

    def close(self) -> None:
        """End the range that was begun last."""
        if self._open:
            self._open.pop().__exit__(None, None, None)

    def close_to(self, depth: int) -> None:
        """End ranges until so many are left open: also those that an error kept from ending."""
        while len(self._open) > depth:
            self.close()

    @contextmanager
    def step(self) -> Iterator[None]:
        """An optimizer step: only what happens in one is counted."""
        before = self.open(STEP)
        try:
            yield
        finally:
            self.close_to(before)

    @contextmanager
    def range(self, phase: Phase, row: str) -> Iterator[None]:
        """Name a part of a step.

        Args:
            phase: ``forward``, ``recompute``, ``backward``, ``optimizer``, ``data``, ``communication`` or ``other``.
            row: of the table, such as ``<data>``.

        Raises:
            ValueError: there is no such phase.
        """
        if phase not in PHASES:
            raise ValueError(f"There is no phase {phase!r}: a step has {', '.join(PHASES)}. Give one of these.")
        before = self.open(f"{PHASE}{phase}:{row}")
        try:
            yield
        finally:
            self.close_to(before)

    def result(self) -> Attribution:
        """Cut what was recorded into rows; see :func:`attribute`.

        Raises:
            ValueError: no step was recorded.
        """
        return attribute(self.events, self.ranges.describe())

    def __enter__(self) -> Recorder:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _watch(self, optimizer: Optimizer, row: str) -> None:
        # torch's own range around this names the class alone. If a step fails, what encloses it closes the range, too.
        def opening(*step: Any) -> None:
            self.open(f"{PHASE}optimizer:{row}")

        def closing(*step: Any) -> None:
            self.close()

        self._handles.append(optimizer.register_step_pre_hook(opening))
        self._handles.append(optimizer.register_step_post_hook(closing))


def _of_torch(optimizer: object) -> Optimizer | None:
    """The torch optimizer that takes hooks: this one, or the one within."""
    while optimizer is not None and not isinstance(optimizer, Optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
