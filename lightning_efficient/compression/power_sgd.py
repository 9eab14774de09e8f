"""Power-SGD with one power iteration per step, in a form that overlaps with backward over any backend.

Source: Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", NeurIPS 2019
(arXiv 1905.13727), algorithm 1; with the local error form of :class:`ACPSGD`.

Dimension letters: N rows, M columns, R rank, W ranks.
"""

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from lightning_efficient._compat import GradBucket
from lightning_efficient.compression.completion import BucketWork, Gate, Verdict
from lightning_efficient.compression.factors import SendBuffer, commit, project, write_product
from lightning_efficient.compression.low_rank import BucketJob, LowRankCompressor
from lightning_efficient.compression.orthogonalize import orthogonalize


class PowerSGD(LowRankCompressor):
    """Send both low-rank factors in every step, the second one after the first.

    Per gradient matrix, with the letters of :class:`ACPSGD`::

        A_w = M_w + E_w
        P   = orth(sum_w A_w Q)          (first all-reduce)
        Q_w = A_w^T P
        E_w = A_w - P Q_w^T
        Q   = mean_w Q_w                 (second all-reduce)
        gradient = P Q^T

    The second all-reduce of a bucket needs the result of the first. It is started when the next bucket's gradients are
    ready, from the thread that runs backward, so the order of collectives is the same on every rank and the first
    all-reduce has had a bucket's worth of backward to finish.
    """

    method = "power_sgd"

    @override
    def _on_bind(self) -> None:
        super()._on_bind()
        self._waiting: list[_SecondStage] = []

    @override
    def _reduce_compressed(self, bucket: GradBucket) -> Future[Tensor]:
        job = self._encode(bucket)
        gate = Gate(job.flat.device)
        stage = _SecondStage(job, self._all_reduce_work(job.send.wire), gate)
        self._start_second_stages()
        self._waiting.append(stage)
        return gate.future

    @override
    def _begin_backward(self) -> None:
        super()._begin_backward()
        self._waiting.clear()

    @override
    def _end_backward(self) -> None:
        self._start_second_stages()
        super()._end_backward()

    def _start_second_stages(self) -> None:
        for stage in self._waiting:
            self._start_second_stage(stage)
        self._waiting.clear()

    def _start_second_stage(self, stage: "_SecondStage") -> None:
        job = stage.job
        stage.first.wait()
        job.send.open()
        # A non-finite sum gives a non-finite P and Q; the verdict is taken when both collectives are in.
        bases = [orthogonalize(total, self.orthogonalization) for total in job.send.sum]
        shapes = [factors.q_RM.shape for factors in job.layout.factors]
        send = self._send_buffer(job.layout, job.flat, shapes, raw=False)
        for p_RN, a_NM, own in zip(bases, job.corrected, send.own, strict=True):
            project(p_RN, a_NM, out=own)
        send.seal()
        work = BucketWork(job.flat, [job.send.wire, send.wire], lambda ok: self._decode(job, send, bases, ok))
        self._when_done(self._all_reduce(send.wire), work, stage.gate)

    def _decode(self, job: BucketJob, send: SendBuffer, bases: list[Tensor], ok: Verdict) -> None:
        send.open()
        mean = self._mean(ok)
        for j, keep in enumerate(self._verdicts(job, ok)):
            factors, grad_NM = job.layout.factors[j], job.gradient(j)
            if keep is False:  # no rank used it: DDP discards the gradient, so nothing may leave the error buffer
                grad_NM.zero_()
                continue
            self._keep_error(job.corrected[j], bases[j], send.own[j], factors, job.scale, keep)
            if job.observation is not None:
                self._observe(job.observation, send.own[j], factors, job.scale)
            total = send.sum[j].mul_(mean if keep is True else mean * keep)  # see ACPSGD
            write_product(bases[j], total, out=grad_NM)
            commit(factors.q_RM, total, keep)
        job.write_raw(mean)


class _SecondStage:
    """A bucket whose P is on its way."""

    __slots__ = ("first", "gate", "job")

    def __init__(self, job: BucketJob, first: dist.Work, gate: Gate) -> None:
        self.job = job
        self.first = first
        self.gate = gate
