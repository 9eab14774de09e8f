"""Lightning's own profiling points as ranges of the record: data, transfers, hooks of callbacks and of the module."""

from __future__ import annotations

import re
from collections.abc import Callable

from lightning.pytorch.profilers import Profiler
from typing_extensions import override

from lightning_efficient.dissect.attribution import ENGINE, TRAINING_STEP
from lightning_efficient.dissect.events import PHASE

# The first pattern that fits an action of Lightning's profiler decides its phase and row; the rest opens no range.
_ROWS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), row)
    for pattern, row in (
        (r"train_dataloader_next$", "data:<data>"),
        (r"batch_to_device$|(on_before|on_after|transfer)_batch\w*$", "data:<batch to device>"),
        (r"^\[Strategy\].*\.training_step$", f"forward:{TRAINING_STEP}"),
        (r"^\[Strategy\].*\.backward$", f"backward:{ENGINE}"),
        (r"configure_gradient_clipping$", "optimizer:<gradient clipping>"),
        (r"lr_scheduler_step$", "optimizer:<learning-rate schedule>"),
        (r"^\[Callback\](?P<name>\w+)", "other:<callback {name}>"),
        (r"^\[LightningModule\]\w+\.on_", "other:<module hooks>"),
    )
)


class RangesForActions(Profiler):
    """Stands in for a Trainer's profiler while steps are dissected, and passes everything on to it.

    Args:
        inner: the Trainer's own.
        open_range: begins a range of a name.
        close_range: ends the last one.
        ignore: state key of the callback that dissects: its hooks begin and end steps.
    """

    def __init__(
        self, inner: Profiler, *, open_range: Callable[[str], object], close_range: Callable[[], None], ignore: str
    ) -> None:
        super().__init__()
        self.inner = inner
        self._open_range = open_range
        self._close_range = close_range
        self._ignore = f"[Callback]{ignore}."
        self._opened: list[bool] = []

    @override
    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        row = None if action_name.startswith(self._ignore) else row_of(action_name)
        if row is not None:
            self._open_range(PHASE + row)
        self._opened.append(row is not None)

    @override
    def stop(self, action_name: str) -> None:
        # An action that began before this stood in has no entry here.
        if self._opened and self._opened.pop():
            self._close_range()
        self.inner.stop(action_name)


def row_of(action: str) -> str | None:
    """Return ``phase:row`` for an action of Lightning's profiler; None where it needs no row of its own."""
    for pattern, row in _ROWS:
        if found := pattern.search(action):
            return row.format(**found.groupdict())
    return None
