"""What ACP-SGD and Power-SGD share: settings, factors per parameter, bucket layouts, warm-up and state.

A gradient matrix with the carried error, ``A = M + E``, is approximated by ``P Q^T`` where one factor is an orthonormal
basis known to every rank and the other is the projection of ``A`` on it.

Dimension letters: N rows, M columns, R rank (a leading batch of matrices is left out of the names).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from lightning_efficient._compat import GradBucket
from lightning_efficient.compression.base import Compressor, Observation
from lightning_efficient.compression.completion import Verdict
from lightning_efficient.compression.factors import (
    BucketLayout,
    Factors,
    SendBuffer,
    commit,
    compute_dtype,
    project,
    square_sum,
    subtract_product,
)
from lightning_efficient.compression.matrices import MatrixSpec, is_batched, is_excluded, matrix_spec
from lightning_efficient.compression.orthogonalize import Orthogonalization, orthogonalize
from lightning_efficient.compression.scale import Scale
from lightning_efficient.compression.warnings import warn_once

WireDtype = Literal["float32", "bfloat16", "float16"]
ErrorDtype = Literal["float32", "bfloat16"]

_BUFFERS_KEPT = 16
"""Send buffers cached per compressor and bucket pattern; more only arise when many parameters go unused in turns."""


class BucketJob:
    """One bucket between its encoding and its decoding."""

    __slots__ = ("corrected", "flat", "layout", "observation", "scale", "send", "slices")

    def __init__(
        self, layout: BucketLayout, flat: Tensor, send: SendBuffer, scale: Scale, observation: Observation | None
    ) -> None:
        self.layout = layout
        self.flat = flat
        self.slices = flat.split(layout.numels)
        self.send = send
        self.scale = scale
        self.observation = observation
        self.corrected: list[Tensor] = []

    def gradient(self, j: int) -> Tensor:
        """The j-th compressed parameter's place in the bucket, as matrices (..., N, M)."""
        place: Tensor = self.slices[self.layout.matrices[j]]
        return place.view(self.layout.factors[j].spec.shape)

    def write_raw(self, mean: float | Tensor) -> None:
        """Put the tensors that travelled uncompressed back, divided by the world size."""
        if self.layout.raw:
            parts = self.send.raw.mul_(mean).split([self.layout.numels[i] for i in self.layout.raw])
            for i, part in zip(self.layout.raw, parts, strict=True):
                self.slices[i].copy_(part)


class LowRankCompressor(Compressor):
    """State, settings and bucket layouts of the low-rank compressors; subclasses add the schedule of collectives.

    Args:
        rank: columns of the factors (clipped to each matrix's smaller side).
        min_compression_rate: a matrix is compressed where its two factors are on average this many times smaller.
        warmup_steps: steps reduced densely first.
        seed_from_dense: start the factors from two power iterations on the last dense gradient of the warm-up; costs
            no communication.
        error_feedback: carry what was not sent to the next step. Without it training fails; for experiments.
        wire_dtype: dtype on the wire. "float32" sends float64 gradients as float64.
        error_dtype: dtype of the error buffers, which are as large as the compressed gradients.
        orthogonalization: "qr", or "cholesky", which is faster on GPUs and falls back to QR.
        exclude: shell patterns of parameter names to send uncompressed, such as ``"*.embed*"``.
        matrix_view: regular expressions of parameter names, mapped to ``"batched"`` (the leading dimension counts
            matrices, as in expert stacks) or ``"rows"`` (the default: shape[0] rows, all else columns).
        seed: of the initial factors.
        atomic: see :class:`~lightning_efficient.compression.Compressor`.
    """

    def __init__(
        self,
        rank: int = 4,
        *,
        min_compression_rate: float = 2.0,
        warmup_steps: int = 0,
        seed_from_dense: bool = True,
        error_feedback: bool = True,
        wire_dtype: WireDtype = "float32",
        error_dtype: ErrorDtype = "float32",
        orthogonalization: Orthogonalization = "qr",
        exclude: Sequence[str] = (),
        matrix_view: Mapping[str, str] | None = None,
        seed: int = 0,
        atomic: bool | None = None,
    ) -> None:
        super().__init__(warmup_steps=warmup_steps, atomic=atomic)
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}: it is the number of columns of the factors. Try 4.")
        if min_compression_rate < 0:
            raise ValueError(f"min_compression_rate must be >= 0, got {min_compression_rate}. The default is 2.")
        _check_choice("wire_dtype", wire_dtype, get_args(WireDtype))
        _check_choice("error_dtype", error_dtype, get_args(ErrorDtype))
        _check_choice("orthogonalization", orthogonalization, get_args(Orthogonalization))
        for pattern, view in (matrix_view or {}).items():
            _check_choice(f"matrix_view[{pattern!r}]", view, ("batched", "rows"))
        self.rank = rank
        self.min_compression_rate = min_compression_rate
        self.seed_from_dense = seed_from_dense
        self.error_feedback = error_feedback
        self.wire_dtype = wire_dtype
        self.error_dtype = error_dtype
        self.orthogonalization: Orthogonalization = orthogonalization
        self.exclude = tuple(exclude)
        self.matrix_view = dict(matrix_view or {})
        self.seed = seed
        self._factors: dict[str, Factors] = {}
        self._layouts: dict[tuple[int, ...], BucketLayout] = {}
        self._buffers: dict[tuple[object, ...], SendBuffer] = {}
        self._turns: list[DeferredTurns] = []

    # ---- building --------------------------------------------------------------------------------------------------

    @override
    def _on_bind(self) -> None:
        error_dtype = getattr(torch, self.error_dtype) if self.error_feedback else None
        self._layouts.clear()
        self._buffers.clear()
        self._turns.clear()
        self._factors = {
            name: Factors(name, spec, seed=self.seed, like=p, error_dtype=error_dtype)
            for name, p in self._parameters.items()
            if (spec := self._spec(name, p)) is not None and spec.worth_compressing(self.min_compression_rate)
        }
        if self._parameters and not self._factors:
            name, parameter = max(self._parameters.items(), key=lambda item: item[1].numel())
            warn_once(
                f"{type(self).__name__}(rank={self.rank}) compresses nothing: no matrix shrinks "
                f"{self.min_compression_rate:g} times (the largest parameter is {name} of shape "
                f"{tuple(parameter.shape)}). Lower rank or min_compression_rate, or use plain DDP."
            )

    def _spec(self, name: str, parameter: Tensor) -> MatrixSpec | None:
        if is_excluded(name, self.exclude):
            return None
        return matrix_spec(parameter, self.rank, batched=is_batched(name, self.matrix_view))

    def _layout(self, bucket: GradBucket) -> BucketLayout:
        parameters = bucket.parameters()
        key = tuple(map(id, parameters))
        layout = self._layouts.get(key)
        if layout is None:
            names = [self._names.get(id(p), "") for p in parameters]  # "": frozen after DDP took it, so sent raw
            matrices = [i for i, name in enumerate(names) if name in self._factors]
            layout = self._layouts[key] = BucketLayout(
                numels=[p.numel() for p in parameters],
                matrices=matrices,
                factors=[self._factors[names[i]] for i in matrices],
                raw=[i for i, name in enumerate(names) if name not in self._factors],
            )
        return layout

    def _send_buffer(
        self, layout: BucketLayout, flat: Tensor, shapes: Sequence[torch.Size], *, raw: bool = True
    ) -> SendBuffer:
        """The buffer for factors of these shapes, with room for the raw tensors and flags unless told otherwise."""
        key = (id(layout), raw, *shapes)
        buffer = self._buffers.pop(key, None)
        if buffer is None:
            compute = compute_dtype(flat.dtype)
            buffer = SendBuffer(
                shapes,
                layout.raw_numel if raw else 0,
                len(shapes) if raw else 0,
                compute=compute,
                wire=compute if self.wire_dtype == "float32" else getattr(torch, self.wire_dtype),
                device=flat.device,
            )
            if len(self._buffers) >= _BUFFERS_KEPT * len(self._layouts):
                self._buffers.pop(next(iter(self._buffers)))
        self._buffers[key] = buffer  # moved to the end: the first key is the one unused for longest
        return buffer

    # ---- the mathematics, shared -----------------------------------------------------------------------------------

    def _encode(self, bucket: GradBucket) -> BucketJob:
        """Project each corrected gradient on its basis and lay everything out for one collective."""
        layout, flat = self._layout(bucket), bucket.buffer()
        send = self._send_buffer(layout, flat, [factors.sent.shape for factors in layout.factors])
        job = BucketJob(layout, flat, send, self._scale, self._observation)
        for j, factors in enumerate(layout.factors):
            grad_NM = job.gradient(j)
            if self._detect_unused:
                send.flags[j] = grad_NM.any()
            a_NM = self._corrected(grad_NM, factors, job.scale)
            project(factors.basis, a_NM if factors.sends_q else a_NM.mT, out=send.own[j])
            job.corrected.append(a_NM)
        if not self._detect_unused:
            send.flags.fill_(1)
        if layout.raw:
            torch.cat([job.slices[i] for i in layout.raw], out=send.raw)
        send.seal()
        return job

    def _verdicts(self, job: BucketJob, ok: Verdict) -> list[Verdict]:
        """Per compressed parameter, whether the step counts: all is finite and some rank used it."""
        used = job.send.flags > 0
        return used.tolist() if ok is True else list((ok & used).unbind())

    def _corrected(self, grad_NM: Tensor, factors: Factors, scale: "Scale") -> Tensor:
        """``A = M + S E``, in the gradient's own storage where its dtype allows."""
        a_NM = grad_NM.to(factors.q_RM.dtype)
        if factors.error_NM is not None:
            scale.add_error(a_NM, factors.error_NM)
        return a_NM

    def _keep_error(
        self, a_NM: Tensor, p_RN: Tensor, q_RM: Tensor, factors: Factors, scale: "Scale", keep: Verdict
    ) -> None:
        """``E <- (A - P_w Q_w^T) / S`` with this rank's own factors, where ``keep``; ``A`` may be overwritten."""
        error_NM = factors.error_NM
        if error_NM is None:
            return
        direct = keep is True and error_NM.dtype == a_NM.dtype
        left_NM = subtract_product(a_NM, p_RN, q_RM, out=error_NM if direct else a_NM)
        scale.unscale_(left_NM)
        if not direct:
            commit(error_NM, left_NM, keep)

    def _take_turns(self, factors: Sequence[Factors], kept: Sequence[Verdict]) -> None:
        """Swap the roles of the two factors of every parameter whose step counted."""
        turns = DeferredTurns(factors, kept)
        if turns.ready:
            turns.take()
        else:
            self._turns.append(turns)

    @override
    def _begin_backward(self) -> None:
        super()._begin_backward()
        self._settle()

    def _settle(self) -> None:
        """Take the turns whose verdicts were still on the device when the last step was written."""
        while self._turns:
            self._turns.pop().take()

    def _observe(self, observation: Observation, own_factor: Tensor, factors: Factors, scale: "Scale") -> None:
        if factors.error_NM is not None:
            sent = scale.unscale_(own_factor.detach().clone())
            observation.add(square_sum(sent), square_sum(factors.error_NM))

    # ---- warm-up ---------------------------------------------------------------------------------------------------

    @override
    def _reduce_warmup(self, bucket: GradBucket, *, last: bool) -> Future[Tensor]:
        flat = bucket.buffer()
        future = self._reduce_dense(flat)
        if not (last and self.seed_from_dense):
            return future
        layout = self._layout(bucket)

        def seed(done: Future[Tensor]) -> Tensor:
            done.value()
            slices = flat.split(layout.numels)
            for i, factors in zip(layout.matrices, layout.factors, strict=True):
                self._power_iterate(slices[i].view(factors.spec.shape), factors)
            return flat

        return future.then(seed)

    def _power_iterate(self, mean_NM: Tensor, factors: Factors, iterations: int = 2) -> None:
        a_NM = mean_NM.to(factors.q_RM.dtype)
        finite = a_NM.isfinite().all()
        a_NM = torch.where(finite, a_NM, 0.0)
        for _ in range(iterations):
            p_RN = orthogonalize(factors.q_RM @ a_NM.mT, self.orthogonalization)
            q_RM = orthogonalize(p_RN @ a_NM, self.orthogonalization)
            commit(factors.p_RN, p_RN, finite)
            commit(factors.q_RM, q_RM, finite)

    # ---- state -----------------------------------------------------------------------------------------------------

    @override
    def _settings(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @override
    def _stateful_names(self) -> set[str]:
        return set(self._factors)

    @override
    def _parameter_states(self, *, sync: bool, include_error: bool) -> dict[str, dict[str, Any]]:
        self._settle()
        states: dict[str, dict[str, Any]] = {}
        for name, factors in self._factors.items():
            states[name] = {
                "P": factors.p_RN.cpu().clone(),
                "Q": factors.q_RM.cpu().clone(),
                "sends_q": factors.sends_q,
                "order": list(factors.spec.order),
            }
            if include_error and factors.error_NM is not None:
                states[name]["error"] = self._mean_error(factors.error_NM, sync=sync)
        return states

    @override
    def _load_parameter_states(self, states: dict[str, dict[str, Any]]) -> None:
        self._settle()
        for name, state in states.items():
            factors = self._factors[name]
            same = (
                state["P"].shape == factors.p_RN.shape
                and state["Q"].shape == factors.q_RM.shape
                and list(state["order"]) == list(factors.spec.order)
            )
            if not same:
                raise RuntimeError(
                    f"the checkpoint's factors of {name} have shapes {tuple(state['P'].shape)} and "
                    f"{tuple(state['Q'].shape)} in memory order {list(state['order'])}, the model needs "
                    f"{tuple(factors.p_RN.shape)} and {tuple(factors.q_RM.shape)} in {list(factors.spec.order)}: the "
                    "parameter changed its shape or memory format. Resume with the model of the checkpoint, or load "
                    "only the weights."
                )
        for name, state in states.items():  # only now that all of them fit
            factors = self._factors[name]
            factors.p_RN.copy_(state["P"])
            factors.q_RM.copy_(state["Q"])
            factors.sends_q = bool(state["sends_q"])
            if factors.error_NM is not None:
                self._restore_error(name, factors.error_NM, state.get("error"))
            elif "error" in state:
                warn_once(
                    "the checkpoint holds error buffers and error_feedback is False: what they carry is dropped. Set "
                    "error_feedback=True to go on with them."
                )


class DeferredTurns:
    """Turns of several parameters; where the verdicts live on a device, they are read when the next step begins.

    The copy to the host is asynchronous and has long arrived by then, so reading it does not stall the device.
    """

    def __init__(self, factors: Sequence[Factors], kept: Sequence[Verdict]) -> None:
        self._factors = factors
        self._kept: list[bool] | Tensor
        self._event: torch.cuda.Event | None = None
        if all(isinstance(keep, bool) for keep in kept):
            self._kept = [bool(keep) for keep in kept]
        else:
            self._kept = torch.stack([keep for keep in kept if isinstance(keep, Tensor)])
            if self._kept.is_cuda:
                host = torch.empty(self._kept.shape, dtype=torch.bool, pin_memory=True)
                self._kept = host.copy_(self._kept, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()

    @property
    def ready(self) -> bool:
        """Whether the verdicts can be read without waiting."""
        return isinstance(self._kept, list)

    def take(self) -> None:
        """Swap roles where the verdict is true."""
        if self._event is not None:
            self._event.synchronize()
        for factors, keep in zip(self._factors, self._kept, strict=True):
            if bool(keep):
                factors.sends_q = not factors.sends_q


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(map(repr, choices))}. Set one of them.")
