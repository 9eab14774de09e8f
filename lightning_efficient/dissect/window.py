"""The clean steps: timed by marks alone, without a hook, a profiler, or a wait for the device between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.dissect.result import Quantiles, Throughput
from lightning_efficient.dissect.tensors import tensors_in

P99_FROM = 100
"""A 99th percentile of fewer values would be a guess."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What a batch holds; numbers, or scalars on its device that nobody has waited for."""

    tokens: int | Tensor = 0
    padded_tokens: int | Tensor = 0
    samples: int | Tensor = 0


@dataclass(slots=True)
class _Step:
    marks: list[Any] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)


class CleanWindow:
    """Times optimizer steps; an interrupted one does not count.

    On CUDA the marks are events on the current stream, read at the end: a wait in each step would hide what overlaps.

    Args:
        device: where the training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._done: list[tuple[_Step, Any]] = []
        self._current: _Step | None = None
        self._batch_ended: float | None = None

    @property
    def done(self) -> int:
        """Steps collected so far."""
        return len(self._done)

    @property
    def counts(self) -> list[Counts]:
        """Of each batch in the steps collected so far."""
        return [each for step, _ in self._done for each in step.counts]

    def begin_step(self) -> None:
        """An optimizer step begins with the next batch."""
        self._current = _Step()

    def start_batch(self, counts: Counts) -> None:
        """A batch begins."""
        if self._current is not None:
            self._end_wait(self._current)
            self._current.marks.append(self._mark())
            self._current.counts.append(counts)

    def end_batch(self) -> None:
        """The batch has ended; what follows is waiting for the next one."""
        self._batch_ended = time.perf_counter()

    def end_step(self) -> None:
        """The first batch of the next step is there."""
        if self._current is not None:
            self._end_wait(self._current)
            self._done.append((self._current, self._mark()))
            self._current = None

    def interrupt(self) -> None:
        """Forget the step that runs: validation lies in it."""
        self._current = self._batch_ended = None

    def finish(self, total_over_ranks: Callable[[Sequence[float]], tuple[list[float], float]]) -> Throughput:
        """Read the marks.

        Args:
            total_over_ranks: given this rank's counts and seconds, returns the counts summed over all ranks and the
                longest seconds of any.

        Returns:
            The throughput.

        Raises:
            ValueError: no step was completed.
        """
        if not self._done:
            raise ValueError("No clean step was completed: validation interrupted each of them. Validate less often.")
        if self._cuda:
            torch.cuda.synchronize()
        step_s, batch_s, waits = [], [], []
        for step, end in self._done:
            marks = [*step.marks, end]
            batch_s += [self._between(a, b) for a, b in pairwise(marks)]
            step_s.append(self._between(marks[0], end))
            waits += step.waits
        counts = self.counts
        own = [float(sum(getattr(each, name) for each in counts)) for name in ("tokens", "padded_tokens", "samples")]
        (tokens, padded, samples), seconds = total_over_ranks([*own, sum(step_s)])
        return Throughput(
            step_s=quantiles(step_s),
            micro_batch_s=quantiles(batch_s),
            wait_s=quantiles(waits or [0.0]),
            micro_batches_per_step=len(batch_s) / len(step_s),
            tokens_per_s=tokens / seconds if tokens else None,
            padded_tokens_per_s=padded / seconds if padded else None,
            samples_per_s=samples / seconds if samples else None,
        )

    def _end_wait(self, step: _Step) -> None:
        if self._batch_ended is not None:
            step.waits.append(time.perf_counter() - self._batch_ended)
            self._batch_ended = None

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000 if self._cuda else float(end - start)


def quantiles(values: Sequence[float]) -> Quantiles:
    """Summarise durations.

    Args:
        values: seconds, one or more.

    Returns:
        Quantiles by linear interpolation, mean and standard deviation; p99 only from 100 values on.
    """
    ordered = torch.tensor(sorted(values), dtype=torch.float64)

    def at(share: float) -> float:
        return float(torch.quantile(ordered, share))

    return Quantiles(
        count=len(values),
        p50=at(0.5),
        p90=at(0.9),
        mean=statistics.fmean(values),
        std=statistics.stdev(values) if len(values) > 1 else 0.0,
        p99=at(0.99) if len(values) >= P99_FROM else None,
    )


def count_batch(batch: Any) -> Counts:
    """Count what a batch holds, without waiting for its device.

    Tokens are the labels that are not -100, where there are ``labels``; else the entries of the first tensor of
    integers with two dimensions or more. Padded tokens are those entries; samples the rows of the first tensor.

    Args:
        batch: a tensor, or mappings, lists and tuples of tensors.
    """
    tensors = list(tensors_in(batch))
    if not tensors:
        return Counts()
    ids = next((each for each in tensors if _is_integer(each) and each.ndim >= 2), None)
    padded = ids.numel() if ids is not None else 0
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    scored: int | Tensor = padded
    if padded and isinstance(labels, Tensor) and _is_integer(labels) and labels.ndim >= 2:
        scored = (labels != -100).sum()
    samples = len(tensors[0]) if tensors[0].ndim else 1
    return Counts(tokens=scored, padded_tokens=padded, samples=samples)


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
