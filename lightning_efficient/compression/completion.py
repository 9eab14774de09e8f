"""When a bucket's result may be written: as soon as its collective is done, or once the whole step is known to be good.

With a gradient scaler, one non-finite bucket makes the optimizer skip the step and with it the gradients of *all*
buckets. Error buffers that had already moved on would then have lost what those gradients carried. An atomic step
therefore holds every bucket back until all collectives of the backward pass are in, and commits all or none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

Verdict = bool | Tensor
"""Whether values are finite: a bool on the CPU, a 0-d bool tensor elsewhere, which nobody waits for."""


@dataclass(frozen=True, slots=True)
class BucketWork:
    """What is left to do for one bucket when its collective is done.

    Attributes:
        flat: the bucket's buffer, which DDP gets back.
        received: what the collectives delivered, the same on every rank; decides whether the step is finite.
        write: writes the averaged gradients into ``flat`` and commits the state. Not called where the verdict is known
            to be false; given a verdict on a device that turns out false, it must leave nan and not commit.
    """

    flat: Tensor
    received: Sequence[Tensor]
    write: Callable[[Verdict], object]

    def finish(self, ok: Verdict) -> Tensor:
        """Write the bucket, or fill it with nan and leave the state alone."""
        if ok is False:
            (self.flat._values() if self.flat.is_sparse else self.flat).fill_(torch.nan)
        else:
            self.write(ok)
        return self.flat


class Gate:
    """A future for DDP that is opened later, or broken with an error."""

    def __init__(self, device: torch.device) -> None:
        self._gate: Future[Tensor] = Future(devices=[] if device.type == "cpu" else [device])
        # An exception set on a future from Python is invisible to DDP, which waits in C++; one raised inside `then` is
        # not.
        self.future: Future[Tensor] = self._gate.then(lambda gate: gate.value())

    def follow(self, future: Future[Any], write: Callable[[Future[Any]], Tensor]) -> None:
        """Open with what ``write`` makes of ``future`` once that is done, or break with its error."""

        def run(done: Future[Any]) -> None:
            try:
                value = write(done)
            except Exception as error:
                self.break_(error)
            else:
                self.open(value)

        future.add_done_callback(run)

    def open(self, value: Tensor) -> None:
        """Complete the future."""
        self._gate.set_result(value)

    def break_(self, error: Exception) -> None:
        """Complete the future with an error, which DDP raises at the end of backward."""
        self._gate.set_exception(error)  # type: ignore[arg-type]  # annotated with the future's own type


class AtomicStep:
    """Collects the buckets of one backward pass and writes all of them, or none."""

    def __init__(self) -> None:
        self._futures: list[Future[Any]] = []
        self._works: list[BucketWork] = []
        self._gates: list[Gate] = []

    def hold(self, future: Future[Any], work: BucketWork, gate: Gate) -> None:
        """Add a bucket whose collective completes ``future``; ``gate`` opens when the step is decided."""
        self._futures.append(future)
        self._works.append(work)
        self._gates.append(gate)

    def close(self) -> None:
        """No bucket follows: decide once every collective is done."""
        if self._futures:
            torch.futures.collect_all(self._futures).add_done_callback(self._decide)

    def _decide(self, done: Future[list[Future[Any]]]) -> None:
        opened = 0
        try:
            for future in done.value():
                future.value()
            verdict = all_finite([tensor for work in self._works for tensor in work.received])
            for work, gate in zip(self._works, self._gates, strict=True):
                gate.open(work.finish(verdict))
                opened += 1
        except Exception as error:
            for gate in self._gates[opened:]:
                gate.break_(error)


def poison(flat: Tensor, ok: Verdict) -> None:
    """Fill with nan where a verdict that stays on the device is false."""
    if isinstance(ok, Tensor):
        flat.masked_fill_(~ok, torch.nan)


def all_finite(tensors: Sequence[Tensor]) -> Verdict:
    """Whether all values of all tensors are finite."""
    flags = [(tensor._values() if tensor.is_sparse else tensor).isfinite().all() for tensor in tensors]
    if flags[0].device.type == "cpu":
        return all(bool(flag) for flag in flags)
    return torch.stack(flags).all()
