"""Top-k sparsification with error feedback: only the largest elements are sent.

Source: Lin et al., "Deep Gradient Compression", ICLR 2018 (arXiv 1712.01887), sections 2 and 3; Stich et al.,
"Sparsified SGD with Memory", NeurIPS 2018 (arXiv 1809.07599).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from lightning_efficient._compat import GradBucket
from lightning_efficient.compression.base import Compressor, Observation
from lightning_efficient.compression.completion import BucketWork, Verdict, poison
from lightning_efficient.compression.factors import commit, compute_dtype, square_sum
from lightning_efficient.compression.scale import Scale


class TopK(Compressor):
    """Send the k largest elements of each parameter with their positions and keep the rest for later.

    Per parameter with gradient :math:`M_w` and carried error :math:`E_w` of rank w::

        A_w = M_w + E_w
        S_w = the density * numel elements of A_w largest in magnitude
        E_w = A_w outside S_w
        gradient = mean_w of A_w on S_w        (an all-gather, which grows with the number of ranks)

    Selection is per parameter, so it does not depend on how DDP cuts its buckets, and covers tensors of every shape, so
    nothing is sent uncompressed. It is not linear: what is chosen depends on each rank's own error. A checkpoint
    therefore holds the errors of all ranks, and resumes exactly on as many; on another number every rank goes on with
    their mean, which loses nothing of what was carried.

    Args:
        density: share of the elements to send, in (0, 1]; at least one element of a parameter is sent.
        error_feedback: carry what was not sent to the next step. Without it training stalls; for experiments.
        warmup_steps: see :class:`~lightning_efficient.compression.Compressor`.
        atomic: see :class:`~lightning_efficient.compression.Compressor`.
    """

    method = "top_k"

    def __init__(
        self,
        density: float = 0.001,
        *,
        error_feedback: bool = True,
        warmup_steps: int = 0,
        atomic: bool | None = None,
    ) -> None:
        super().__init__(warmup_steps=warmup_steps, atomic=atomic)
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}: it is the share of elements to send. Set it in (0, 1].")
        self.density = density
        self.error_feedback = error_feedback
        self._errors: dict[str, Tensor] = {}

    @override
    def _on_bind(self) -> None:
        self._errors = {
            name: torch.zeros(p.numel(), device=p.device, dtype=compute_dtype(p.dtype))
            for name, p in self._parameters.items()
            if self.error_feedback and not p.is_complex()
        }

    @override
    def _reduce_compressed(self, bucket: GradBucket) -> Future[Tensor]:
        flat = bucket.buffer()
        names = [self._names.get(id(p), "") for p in bucket.parameters()]  # "": frozen after DDP took it
        numels = [p.numel() for p in bucket.parameters()]
        used = torch.stack([part.any() for part in flat.split(numels)]) if self._detect_unused else None
        corrected = flat.to(compute_dtype(flat.dtype))
        parts = corrected.split(numels)
        for name, part in zip(names, parts, strict=True):
            if name in self._errors:
                self._scale.add_error(part, self._errors[name])
        chosen = self._choose(parts)
        count = chosen.numel()
        sent = _Payload.pack(corrected[chosen], chosen, used)
        gathered = sent.new_empty(self.world_size, sent.numel())
        received = _Payload(gathered, count)
        job = _Job(flat, corrected, parts, names, chosen, received, self._scale, self._observation)
        # Positions are integers in the clothes of floats: only the values can say whether the step is finite.
        work = BucketWork(flat, [received.values], lambda ok: self._decode(job, ok))
        return self._when_done(self._all_gather(gathered, sent), work)

    def _choose(self, parts: Sequence[Tensor]) -> Tensor:
        """Positions in the bucket of each parameter's largest elements."""
        chosen, start = [], 0
        for part in parts:
            if part.numel():
                count = max(1, round(self.density * part.numel()))
                chosen.append(part.abs().topk(count, sorted=False).indices + start)
            start += part.numel()
        return torch.cat(chosen)

    def _decode(self, job: "_Job", ok: Verdict) -> None:
        values, positions = job.received.values, job.received.positions
        used = job.received.used
        verdicts: list[Verdict] = [ok] * len(job.names) if used is None else list((used & ok).unbind())
        if job.flat.device.type == "cpu":
            verdicts = [bool(verdict) for verdict in verdicts]
        if self.error_feedback:
            self._keep_errors(job, verdicts)
        job.flat.zero_()
        mean = self._mean(ok)
        for rank in range(self.world_size):  # one rank at a time: each has no position twice, so the order is fixed
            job.flat.index_add_(0, positions[rank], (values[rank] * mean).to(job.flat.dtype))
        if used is not None:  # no rank used it: DDP discards the gradient, so nothing may leave the error buffer
            for part, keep in zip(job.flat.split([p.numel() for p in job.parts]), verdicts, strict=True):
                part.mul_(keep)
        poison(job.flat, ok)

    def _keep_errors(self, job: "_Job", verdicts: list[Verdict]) -> None:
        own = job.corrected[job.chosen] if job.observation is not None else None
        job.corrected.index_fill_(0, job.chosen, 0)
        for name, part, keep in zip(job.names, job.parts, verdicts, strict=True):
            if name in self._errors:
                commit(self._errors[name], job.scale.unscale_(part), keep)
        if job.observation is not None and own is not None:
            left = torch.stack([square_sum(self._errors[name]) for name in job.names if name]).sum()
            job.observation.add(square_sum(job.scale.unscale_(own)), left)

    @override
    def _settings(self) -> dict[str, Any]:
        return {}

    @override
    def _stateful_names(self) -> set[str]:
        return set(self._errors)

    @override
    def _parameter_states(self, *, sync: bool, include_error: bool) -> dict[str, dict[str, Any]]:
        if not include_error:
            return {name: {} for name in self._errors}
        return {name: {"errors_by_rank": self._gathered(error, sync=sync)} for name, error in self._errors.items()}

    @override
    def _load_parameter_states(self, states: dict[str, dict[str, Any]]) -> None:
        rank = dist.get_rank(self._group)
        for name, state in states.items():
            rows = state.get("errors_by_rank")
            own = None if rows is None else rows[rank] if len(rows) == self.world_size else rows.mean(0)
            self._restore_error(name, self._errors[name], own)

    def _gathered(self, error: Tensor, *, sync: bool) -> Tensor:
        """(W, numel) errors of all ranks on the CPU, or (1, numel) of this one."""
        rows = error.new_empty(self.world_size if sync else 1, error.numel())
        if sync:
            dist.all_gather(list(rows.unbind()), error, group=self._group)
        else:
            rows[0] = error
        return rows.cpu()


@dataclass(slots=True)
class _Job:
    """One bucket between its encoding and its decoding."""

    flat: Tensor
    corrected: Tensor
    parts: tuple[Tensor, ...]
    names: list[str]
    chosen: Tensor
    received: "_Payload"
    scale: Scale
    observation: Observation | None


class _Payload:
    """Values, positions and used flags of one or all ranks in one float tensor, so that one collective carries them."""

    def __init__(self, packed: Tensor, count: int) -> None:
        self.values = packed[..., :count]
        self._packed = packed
        self._count = count

    @staticmethod
    def pack(values: Tensor, positions: Tensor, used: Tensor | None) -> Tensor:
        parts = [values, positions.to(_position_dtype(values.dtype)).view(values.dtype)]
        return torch.cat(parts if used is None else [*parts, used.to(values.dtype)])

    @property
    def positions(self) -> Tensor:
        """(..., k) positions in the bucket."""
        bits = self._packed[..., self._count : 2 * self._count].contiguous()
        return bits.view(_position_dtype(bits.dtype)).long()

    @property
    def used(self) -> Tensor | None:
        """Per parameter, whether any rank has a gradient; None where that was not asked."""
        flags = self._packed[..., 2 * self._count :]
        return (flags > 0).any(0) if flags.shape[-1] else None


def _position_dtype(values: torch.dtype) -> torch.dtype:
    return torch.int64 if values == torch.float64 else torch.int32
