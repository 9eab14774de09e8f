"""`CompressionProbe`: runs a few steps of the user's own training to learn what the cost model needs. Internal.

It belongs to `lightning-efficient compression recommend`, which throws the trained weights away: while computing is
timed, gradients are not exchanged and the replicas drift apart.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_efficient.compression.planning.cost_model import DeviceModel, LinkModel, Workload
from lightning_efficient.compression.planning.link_probe import measure_device, measure_link


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What was measured; of several ranks, the slowest.

    Attributes:
        workload: compute of one micro-batch and the optimizer's step, without communication.
        device: what compression would cost the device.
        link: the link between the ranks; None if there is one rank.
        world_size: number of ranks that took part.
        plain_step_s: seconds of a step with plain DDP and its communication; None if there is one rank.
    """

    workload: Workload
    device: DeviceModel
    link: LinkModel | None
    world_size: int
    plain_step_s: float | None


class CompressionProbe(pl.Callback):
    """Times forward, backward and each gradient without communication, then plain DDP steps, then the link; then stops.

    Args:
        steps: timed steps without communication.
        skip: untimed steps before them.
        synced_steps: timed plain DDP steps after them (and an untimed one, in which DDP forms its buckets).
        needs_link: whether one rank alone is an error.

    Attributes:
        result: the measurement, once fit has ended; the same on all ranks but for ``device``.

    Raises:
        MisconfigurationException: at fit start, if the strategy is neither DDP nor a single device, or a link is needed
            and there is one rank; at the end, if training ended before everything was measured.
    """

    def __init__(self, *, steps: int = 8, skip: int = 2, synced_steps: int = 2, needs_link: bool = True) -> None:
        self._steps, self._skip, self._synced_steps, self._needs_link = steps, skip, synced_steps, needs_link
        self.result: ProbeResult | None = None
        self._marks: list[_Batch] = []
        self._plain_s: list[float] = []
        self._batches = 0
        self._parameters: list[torch.nn.Parameter] = []
        self._hooks: list[RemovableHandle] = []
        self._unsynced = ExitStack()
        self._current: _Batch | None = None

    @property
    def steps_needed(self) -> int:
        """Optimizer steps that a fit has to have: the timed, the untimed, and one in which DDP forms its buckets."""
        return self._skip + self._steps + self._synced_steps + 1

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise MisconfigurationException(
                f"the link cannot be probed under {type(trainer.strategy).__name__}: compression replaces the "
                "all-reduce of DDP. Set trainer.strategy to ddp, or answer 'what if' with --link and --world-size."
            )
        if self._needs_link and trainer.world_size < 2:
            raise MisconfigurationException(
                "no link to measure (world size 1): one process exchanges no gradients. Run on 2 devices or more "
                "(--trainer.devices 2), or describe the link: --link 100mbit --latency 0.2ms --world-size 8."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._parameters = [p for p in pl_module.parameters() if p.requires_grad]
        for index, parameter in enumerate(self._parameters):
            self._hooks.append(parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._ready(index)))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel) and self._batches < self._skip + self._steps:
            self._unsynced.enter_context(model.no_sync())
        self._current = _Batch(trainer.strategy.root_device)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if self._current is not None:
            self._current.begin_backward()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._current is not None:
            self._current.end_backward()

    def _ready(self, index: int) -> None:
        if self._current is not None:
            self._current.gradient_ready(index)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._unsynced.close()
        current, self._current = self._current, None
        assert current is not None  # on_train_batch_start came before
        current.end()
        position = self._batches - self._skip
        self._batches += 1
        if 0 <= position < self._steps:
            self._marks.append(current)
        elif position > self._steps:  # the first synced step is left out: DDP forms its buckets
            self._plain_s.append(current.seconds)
        synced = 1 + self._synced_steps if trainer.world_size > 1 else 0
        if self._batches >= self._skip + self._steps + synced:
            trainer.should_stop = True

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._unhook()
        if len(self._marks) < self._steps:
            raise MisconfigurationException(
                f"too few steps to measure ({len(self._marks)} of {self._steps}): training ended early. Remove what "
                "ends it, or ask for fewer with --steps."
            )
        model = trainer.strategy.model
        group = model.process_group if isinstance(model, DistributedDataParallel) else None
        root = trainer.strategy.root_device
        link = measure_link(group, device=root) if trainer.world_size > 1 else None
        self.result = self._collect(link, measure_device(root), group, root, trainer.world_size)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._unhook()

    def _unhook(self) -> None:
        self._unsynced.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _collect(
        self,
        link: LinkModel | None,
        device: DeviceModel,
        group: dist.ProcessGroup | None,
        root: torch.device,
        world_size: int,
    ) -> ProbeResult:
        backward_s = statistics.median(batch.backward_s for batch in self._marks)
        outside_s = statistics.median(batch.seconds - batch.backward_s for batch in self._marks)
        # DDP waits for a gradient that never comes until the end of backward.
        ready_s = [
            statistics.median(batch.ready_s.get(index, batch.backward_s) for batch in self._marks)
            for index in range(len(self._parameters))
        ]
        plain_s = min(self._plain_s, default=0.0)
        slowest = torch.tensor([outside_s, backward_s, plain_s, *ready_s], dtype=torch.float64, device=root)
        if world_size > 1:
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        outside_s, backward_s, plain_s, *ready_s = slowest.tolist()
        workload = Workload(
            shapes=tuple(tuple(p.shape) for p in self._parameters),
            ready_s=tuple(min(seconds, backward_s) for seconds in ready_s),
            forward_s=outside_s,
            backward_s=backward_s,
            itemsize=max(p.element_size() for p in self._parameters),
        )
        return ProbeResult(workload, device, link, world_size, plain_s if world_size > 1 else None)


class _Batch:
    """Clock of one training batch; on CUDA the gradients' times are events, so that hooks need not wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ready: list[tuple[int, float, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._begin = self._now()
        self._backward_begin = 0.0
        self._backward_mark: float | torch.cuda.Event = 0.0
        self.backward_s = 0.0
        self.seconds = 0.0
        self.ready_s: dict[int, float] = {}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin_backward(self) -> None:
        self._backward_begin = self._now()
        self._backward_mark = self._mark()

    def gradient_ready(self, index: int) -> None:
        # A batch may have several backwards (manual optimization): they count as one long one.
        self._ready.append((index, self.backward_s, self._backward_mark, self._mark()))

    def end_backward(self) -> None:
        self.backward_s += self._now() - self._backward_begin

    def end(self) -> None:
        self.seconds = self._now() - self._begin
        for index, before, begin, mark in self._ready:
            self.ready_s[index] = before + _between(begin, mark)
        self._ready.clear()


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(begin.elapsed_time(end)) / 1000
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
