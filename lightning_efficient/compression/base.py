"""What every gradient compressor has in common: one DDP bucket in, one future of the averaged bucket out.

A compressor is called by DDP once per bucket and synchronised backward pass, on the thread that runs backward, in the
same bucket order on every rank. It starts its collectives from that call and never from a future's callback: callbacks
run in an order that differs between ranks.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from lightning_efficient._compat import GradBucket
from lightning_efficient.compression.completion import AtomicStep, BucketWork, Gate, Verdict, all_finite
from lightning_efficient.compression.replicas import check_same_parameters
from lightning_efficient.compression.scale import Scale
from lightning_efficient.compression.stats import CompressionStats
from lightning_efficient.compression.warnings import warn_once

LossScale = Callable[[], Tensor | float | None]
"""Returns the factor by which the running backward pass has scaled its loss, or None when it is not scaled."""

STATE_VERSION = 1


class Compressor(ABC):
    """Averages the gradients of a data-parallel model with fewer bytes than an all-reduce of all of them.

    A compressor does nothing until :meth:`bind` tells it the parameters' names and the process group. Users call
    :func:`~lightning_efficient.compression.register_compressor` or pass it to
    :class:`~lightning_efficient.strategies.CompressedDDPStrategy`, which bind it.

    Args:
        warmup_steps: synchronised backward passes that are reduced densely, as plain DDP does, before compression
            starts.
        atomic: write a step's gradients and commit its state for all buckets or for none, which a run needs that skips
            steps with non-finite gradients; the results are then written after the last collective. None does so
            exactly when a gradient scaler is in use. False decides per bucket.

    Attributes:
        stats: what was sent so far on this rank.
        step: synchronised backward passes seen, including those before a resumed checkpoint.
    """

    method: ClassVar[str]
    """The name under which the compressor appears in recipes, checkpoints and tables."""

    def __init__(self, *, warmup_steps: int = 0, atomic: bool | None = None) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}: it counts steps. Set 0 or more.")
        self.warmup_steps = warmup_steps
        self.atomic = atomic
        self.stats = CompressionStats()
        self.step = 0
        self.launched_at = 0.0
        self._names: dict[int, str] = {}
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._group: dist.ProcessGroup | None = None
        self._loss_scale: LossScale | None = None
        self._any_complex = False
        self._detect_unused = False
        self._scale = Scale(None)
        self._held: AtomicStep | None = None
        self._observation: Observation | None = None
        self._pending_state: dict[str, Any] | None = None

    # ---- life cycle ------------------------------------------------------------------------------------------------

    def bind(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        process_group: dist.ProcessGroup | None = None,
        *,
        loss_scale: LossScale | None = None,
        detect_unused: bool = False,
    ) -> None:
        """Tell the compressor what it works on. A collective: every rank of the group calls it.

        Binding to the same parameters again, as a second ``fit`` does, keeps what is carried between steps.

        Args:
            named_parameters: the model's parameters with the names under which state is kept; frozen ones are ignored.
            process_group: the ranks whose gradients are averaged; None means all.
            loss_scale: how the loss of the running backward is scaled (mixed precision), so that the error that is
                carried over stays in unscaled units.
            detect_unused: parameters may get no gradient on any rank (``find_unused_parameters``, ``static_graph``).

        Raises:
            RuntimeError: the parameters differ across ranks, or a state loaded before does not fit them.
        """
        trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
        check_same_parameters(trainable, process_group)
        known = [(name, id(p)) for name, p in self._parameters.items()]
        new_model = known != [(name, id(p)) for name, p in trainable]
        self._parameters = dict(trainable)
        self._names = {id(p): name for name, p in trainable}
        self._any_complex = any(p.is_complex() for _, p in trainable)
        # The default group by None: the last reference to a group must not die in a callback on one of its own threads.
        self._group = None if process_group is dist.group.WORLD else process_group
        self._loss_scale = loss_scale
        self._detect_unused = detect_unused
        if self.world_size == 1:
            warn_once("gradient compression has no effect: the process group has one rank. Use two devices or more.")
        if new_model:
            self.reset()
        if self._pending_state is not None:
            state, self._pending_state = self._pending_state, None
            self._load(state)

    def reset(self) -> None:
        """Forget what is carried between steps, as if training began; the counters go on."""
        self.step = 0
        self._on_bind()

    @property
    def world_size(self) -> int:
        """Ranks whose gradients are averaged."""
        return dist.get_world_size(self._group)

    # ---- the hook --------------------------------------------------------------------------------------------------

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """Average one bucket over the ranks.

        Args:
            bucket: DDP's bucket; its flat buffer holds this rank's gradients, not divided by the world size.

        Returns:
            A future of the bucket's own buffer, holding the averaged gradients.
        """
        if bucket.index() == 0:
            self._begin_backward()
        flat = bucket.buffer()
        self.stats.buckets += 1
        self.stats.bytes_dense += _payload(flat)
        if uncompressed := self._uncompressed(flat, bucket):
            warn_once(
                f"a bucket with {uncompressed} gradients is all-reduced uncompressed: only real dense gradients are "
                "compressed. Use dense, real parameters to have them compressed."
            )
            future = self._reduce_dense(flat)
        elif self.step < self.warmup_steps:
            future = self._reduce_warmup(bucket, last=self.step == self.warmup_steps - 1)
        else:
            future = self._reduce_compressed(bucket)
        if bucket.is_last():
            self._end_backward()
        return future

    def _uncompressed(self, flat: Tensor, bucket: GradBucket) -> str:
        """What keeps a bucket from being compressed; empty if nothing does."""
        if flat.is_sparse:
            return "sparse"
        # DDP hands complex gradients over as twice as many real numbers: the buffer does not tell.
        return "complex" if self._any_complex and any(p.is_complex() for p in bucket.parameters()) else ""

    @abstractmethod
    def _reduce_compressed(self, bucket: GradBucket) -> Future[Tensor]:
        """Average a dense, real bucket with few bytes."""

    def _reduce_warmup(self, bucket: GradBucket, *, last: bool) -> Future[Tensor]:
        """Average a bucket during warm-up; ``last`` marks the step before compression starts."""
        return self._reduce_dense(bucket.buffer())

    def _reduce_dense(self, flat: Tensor) -> Future[Tensor]:
        """Average as plain DDP does: divide, then sum."""
        self.stats.dense_buckets += 1
        flat.div_(self.world_size)
        future = self._all_reduce(flat)
        if self._held is None:
            return future.then(_first)
        # An overflow in this bucket must hold back the state of the compressed ones.
        return self._when_done(future, BucketWork(flat, [flat], lambda ok: None))

    def _begin_backward(self) -> None:
        """The first bucket of a backward pass is ready."""
        self._scale = Scale(self._loss_scale() if self._loss_scale else None)
        atomic = self._scale.active if self.atomic is None else self.atomic
        self._held = AtomicStep() if atomic else None

    def _end_backward(self) -> None:
        """The last bucket of a backward pass has been launched."""
        if self._held is not None:
            self._held.close()
        self._observation = None
        self.step += 1
        self.stats.steps += 1
        self.launched_at = time.perf_counter()

    def _on_bind(self) -> None:  # noqa: B027  # optional: not every compressor has state
        """Build per-parameter state for ``self._parameters``."""

    def _when_done(self, future: Future[list[Tensor]], work: BucketWork, gate: Gate | None = None) -> Future[Tensor]:
        """A future of the bucket, written once ``future`` is done, or with the whole step when that is atomic.

        Args:
            future: of the bucket's last collective.
            work: how to write the bucket.
            gate: the future DDP already has, where the last collective starts later than the hook returns.
        """
        if self._held is not None:
            gate = gate or Gate(work.received[0].device)
            self._held.hold(future, work, gate)
            return gate.future

        def write(done: Future[list[Tensor]]) -> Tensor:
            done.value()
            return work.finish(all_finite(work.received))

        if gate is None:
            return future.then(write)
        gate.follow(future, write)
        return gate.future

    def _mean(self, ok: Verdict) -> float | Tensor:
        """1/W, or nan where a verdict that nobody has read yet is false."""
        mean = 1 / self.world_size
        if isinstance(ok, bool):
            return mean
        return torch.full((), mean, dtype=torch.float64, device=ok.device).masked_fill(~ok, torch.nan)

    # ---- collectives, counted --------------------------------------------------------------------------------------

    def _all_reduce(self, tensor: Tensor) -> Future[list[Tensor]]:
        """Start a sum over the ranks, in place."""
        return self._all_reduce_work(tensor).get_future()

    def _all_reduce_work(self, tensor: Tensor) -> dist.Work:
        """As :meth:`_all_reduce`, for a caller that waits itself."""
        self._count(tensor)
        work: dist.Work = dist.all_reduce(tensor, group=self._group, async_op=True)
        return work

    def _all_gather(self, gathered: Tensor, tensor: Tensor) -> Future[list[Tensor]]:
        """Start gathering every rank's ``tensor`` into ``gathered`` of shape (W, ...)."""
        self._count(tensor)
        work: dist.Work = dist.all_gather(list(gathered.unbind()), tensor, group=self._group, async_op=True)
        return work.get_future()

    def _count(self, tensor: Tensor) -> None:
        self.stats.collectives += 1
        self.stats.bytes_sent += _payload(tensor)

    # ---- observation -----------------------------------------------------------------------------------------------

    def observe(self) -> "Observation":
        """Measure the next backward pass: see :class:`Observation`. Costs one pass over the error buffers."""
        self._observation = Observation()
        return self._observation

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self, *, sync: bool = True, include_error: bool = True) -> dict[str, Any]:
        """Everything a resumed run needs, as plain tensors, numbers, strings and dicts keyed by parameter name.

        Args:
            sync: store the mean error over the ranks. It is all that the future of a low-rank compressor depends on,
                so the state resumes exactly on any number of ranks. This is a collective: every rank calls it. False
                stores this rank's own error and communicates nothing.
            include_error: store the error buffers, which are as large as the gradients.
        """
        return {
            "version": STATE_VERSION,
            "method": self.method,
            "step": self.step,
            "settings": self._settings(),
            "parameters": self._parameter_states(sync=sync, include_error=include_error),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; before :meth:`bind` it is kept until the parameters are known.

        Raises:
            RuntimeError: the state is of another method, has other settings or other parameters.
        """
        if state.get("method") != self.method:
            raise RuntimeError(
                f"the checkpoint holds compression state of {state.get('method')!r}, the run uses {self.method!r}: "
                "states of different compressors cannot be converted. Resume with the compressor of the checkpoint, "
                "or load only the weights."
            )
        for key, wanted in self._settings().items():
            saved = state["settings"].get(key)
            if saved != wanted:
                raise RuntimeError(
                    f"the checkpoint was written with {key}={saved!r}, the run has {key}={wanted!r}: the saved state "
                    "does not fit. Set the saved value, or load only the weights."
                )
        if self._parameters:
            self._load(dict(state))
        else:
            self._pending_state = dict(state)

    def _load(self, state: dict[str, Any]) -> None:
        saved, expected = state["parameters"], self._stateful_names()
        missing, unexpected = sorted(expected - saved.keys()), sorted(saved.keys() - expected)
        if missing or unexpected:
            raise RuntimeError(
                f"the checkpoint's compression state is of another model: missing {missing[:5]}, unexpected "
                f"{unexpected[:5]} ({len(missing)} and {len(unexpected)} in all). Resume with the model of the "
                "checkpoint, or load only the weights."
            )
        self._load_parameter_states(saved)
        self.step = int(state["step"])

    def _settings(self) -> dict[str, Any]:
        """The settings a saved state depends on."""
        return {}

    def _stateful_names(self) -> set[str]:
        """Names of the parameters that have state."""
        return set()

    def _parameter_states(self, *, sync: bool, include_error: bool) -> dict[str, dict[str, Any]]:
        """State per parameter name."""
        return {}

    def _load_parameter_states(self, states: dict[str, dict[str, Any]]) -> None:  # noqa: B027  # likewise
        """Inverse of :meth:`_parameter_states`; the names have been checked."""

    def _restore_error(self, name: str, error: Tensor, saved: Tensor | None) -> None:
        """Fill an error buffer from a checkpoint, which may hold none."""
        if saved is None:
            error.zero_()
            warn_once(
                "the checkpoint holds no error buffers: error feedback starts from zero. Save them to resume exactly."
            )
        elif saved.shape != error.shape:
            raise RuntimeError(
                f"the checkpoint's error of {name} has shape {tuple(saved.shape)}, the model needs "
                f"{tuple(error.shape)}: the parameter changed. Resume with the model of the checkpoint, or load only "
                "the weights."
            )
        else:
            error.copy_(saved)

    def _mean_error(self, error: Tensor, *, sync: bool) -> Tensor:
        """A copy of an error buffer for a checkpoint, averaged over the ranks when ``sync``."""
        if not sync:
            return error.detach().cpu().clone()
        mean = error.to(torch.promote_types(error.dtype, torch.float32), copy=True)
        dist.all_reduce(mean, group=self._group)
        return mean.div_(self.world_size).cpu()


class Observation:
    """How well one backward pass was compressed on this rank, read after the backward pass.

    With orthonormal factors, and for top-k, what is sent and what is left are orthogonal, so the energy of the
    corrected gradient ``A = M + E`` splits: ``|A|^2 = |sent|^2 + |left|^2``.
    """

    def __init__(self) -> None:
        self._sent: list[Tensor] = []
        self._left: list[Tensor] = []

    def add(self, sent: Tensor, left: Tensor) -> None:
        """Add one tensor's squared norms: of what was sent of it, and of the error left behind (same units)."""
        self._sent.append(sent)
        self._left.append(left)

    @property
    def measured(self) -> bool:
        """Whether anything was compressed with error feedback in the observed pass."""
        return bool(self._sent)

    @property
    def captured_energy(self) -> float:
        """``|sent|^2 / |A|^2``: 1 when nothing is left behind, nan when nothing was compressed."""
        sent, left = self._sums()
        return sent / (sent + left) if sent + left > 0 else float("nan")

    @property
    def residual_norm(self) -> float:
        """Euclidean norm of this rank's error after the step."""
        return math.sqrt(self._sums()[1])

    def _sums(self) -> tuple[float, float]:
        if not self._sent:
            return 0.0, 0.0
        return float(torch.stack(self._sent).sum()), float(torch.stack(self._left).sum())


def _payload(tensor: Tensor) -> int:
    """Bytes a collective sends of a tensor: of a sparse one, its values and their indices."""
    parts = (tensor._values(), tensor._indices()) if tensor.is_sparse else (tensor,)
    return sum(part.numel() * part.element_size() for part in parts)


def _first(future: Future[list[Tensor]]) -> Tensor:
    return future.value()[0]
