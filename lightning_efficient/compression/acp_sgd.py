"""ACP-SGD: alternately compressed Power-SGD, one independent all-reduce per bucket and step.

Source: Zhang et al., "Evaluation and Optimization of Gradient Compression for Distributed Deep Learning", ICDCS 2023
(arXiv 2306.08881), section IV.

Dimension letters: N rows, M columns, R rank, W ranks.
"""

from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from lightning_efficient._compat import GradBucket
from lightning_efficient.compression.completion import BucketWork, Verdict
from lightning_efficient.compression.factors import commit, masked, write_product
from lightning_efficient.compression.low_rank import BucketJob, LowRankCompressor
from lightning_efficient.compression.orthogonalize import orthogonalize


class ACPSGD(LowRankCompressor):
    r"""Send one of the two low-rank factors per step, in turns.

    Per gradient matrix :math:`M_w` (N x M) of rank w, with carried error :math:`E_w` and a basis known to every rank::

        odd steps (basis Q, Q^T Q = I):          even steps (basis P, P^T P = I):
            A_w = M_w + E_w                          A_w = M_w + E_w
            P_w = A_w Q                              Q_w = A_w^T P
            E_w = A_w - P_w Q^T                      E_w = A_w - P Q_w^T
            P   = mean_w P_w   (the all-reduce)      Q   = mean_w Q_w   (the all-reduce)
            gradient = P Q^T                         gradient = P Q^T
            basis of the next step: orth(P)          basis of the next step: orth(Q)

    The factor that was summed last, made orthonormal, is the basis of the next step: a power iteration, half a round
    per step. There is one all-reduce per bucket, started while backward still runs; it also carries the tensors that
    are too small to compress. The error is the *local* one (each rank's own product), which stays bounded where the
    data of the ranks differ. Whose turn it is is kept per parameter, because a parameter used in every second backward
    would otherwise stay in one subspace for ever.

    At equal rank it sends about half the bytes of :class:`PowerSGD` and is behind it early in training; at rank 2r it
    matches Power-SGD of rank r at the same bytes. Rank 1 with momentum, and no error feedback, are unsafe.

    Example:
        >>> compressor = ACPSGD(rank=4)
        >>> compressor.method
        'acp_sgd'
    """

    method = "acp_sgd"

    @override
    def _reduce_compressed(self, bucket: GradBucket) -> Future[Tensor]:
        job = self._encode(bucket)
        work = BucketWork(job.flat, [job.send.wire], lambda ok: self._decode(job, ok))
        return self._when_done(self._all_reduce(job.send.wire), work)

    def _decode(self, job: BucketJob, ok: Verdict) -> None:
        """Write the averaged gradients, keep the errors, and make the summed factors the next bases."""
        job.send.open()
        mean = self._mean(ok)
        kept = self._verdicts(job, ok)
        for j, keep in enumerate(kept):
            if keep is False:  # no rank used it: DDP discards the gradient, so nothing may leave the error buffer
                job.gradient(j).zero_()
            else:
                self._decode_one(job, j, keep, mean)
        job.write_raw(mean)
        self._take_turns(job.layout.factors, kept)

    def _decode_one(self, job: BucketJob, j: int, keep: Verdict, mean: float | Tensor) -> None:
        factors, own, total = job.layout.factors[j], job.send.own[j], job.send.sum[j]
        basis, sends_q = factors.basis, factors.sends_q
        p_own, q_own = (basis, own) if sends_q else (own, basis)
        self._keep_error(job.corrected[j], p_own, q_own, factors, job.scale, keep)
        if job.observation is not None:
            self._observe(job.observation, own, factors, job.scale)
        next_basis = orthogonalize(masked(total, keep), self.orthogonalization)
        total.mul_(mean if keep is True else mean * keep)  # an unread verdict: 1/W, 0 if unused, nan if not finite
        p_mean, q_mean = (basis, total) if sends_q else (total, basis)
        write_product(p_mean, q_mean, out=job.gradient(j))
        commit(factors.sent, next_basis, keep)
