"""SignSGD with majority vote: one bit per gradient element.

Source: Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018 (arXiv 1802.04434),
algorithm 3.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from lightning_efficient._compat import GradBucket
from lightning_efficient.compression.base import Compressor
from lightning_efficient.compression.completion import BucketWork, Verdict, poison

_BITS = 8


class SignSGD(Compressor):
    """Every rank sends the signs of its gradient; each element gets the sign most ranks voted for.

    With gradient :math:`M_w` of rank w::

        gradient = sign(sum_w sign(M_w))

    The gradients that the optimizer sees are -1, 0 (a tie) and 1, so it needs a learning rate of its own, usually ten
    to a hundred times smaller than plain SGD's, and gradient clipping means something else. There is no error feedback,
    as published. The all-gather grows with the number of ranks.

    A bit cannot say zero: where their gradient is exactly zero ranks vote for and against in turns, which cancels among
    an even number of ranks and from one step to the next among an odd one.
    A parameter whose gradient is zero on all ranks stays zero.

    Args:
        warmup_steps: see :class:`~lightning_efficient.compression.Compressor`.
        atomic: see :class:`~lightning_efficient.compression.Compressor`.
    """

    method = "sign_sgd"

    def __init__(self, *, warmup_steps: int = 0, atomic: bool | None = None) -> None:
        super().__init__(warmup_steps=warmup_steps, atomic=atomic)

    @override
    def _reduce_compressed(self, bucket: GradBucket) -> Future[Tensor]:
        flat, numels = bucket.buffer(), [p.numel() for p in bucket.parameters()]
        packed = pack_signs(flat, zero_votes_plus=(dist.get_rank(self._group) + self.step) % 2 == 0)
        nonzero = torch.stack([part.any() for part in flat.split(numels)] + [~flat.isfinite().all()]).to(torch.uint8)
        sent = torch.cat([packed, nonzero])
        gathered = sent.new_empty(self.world_size, sent.numel())
        scale = self._scale

        def write(ok: Verdict) -> None:
            # The payload holds no floats: whether a rank met nan is its last byte.
            votes, nonzero = gathered[:, : packed.numel()], gathered[:, packed.numel() :].amax(0)
            count_votes(votes, out=flat)
            for part, any_rank in zip(flat.split(numels), nonzero[:-1], strict=True):
                part.mul_(any_rank)
            flat.masked_fill_(nonzero[-1].bool(), torch.nan)
            scale.rescale_(flat)
            poison(flat, ok)

        return self._when_done(self._all_gather(gathered, sent), BucketWork(flat, [gathered], write))


def pack_signs(x: Tensor, *, zero_votes_plus: bool) -> Tensor:
    """Signs of a flat tensor as bits, in ceil(numel / 8) bytes; bit j of byte i is element ``j * bytes + i``."""
    positive = x >= 0 if zero_votes_plus else x > 0
    width = -(-x.numel() // _BITS)
    bits = torch.zeros(_BITS * width, dtype=torch.uint8, device=x.device)
    bits[: x.numel()] = positive
    packed = torch.zeros(width, dtype=torch.uint8, device=x.device)
    for j, row in enumerate(bits.view(_BITS, width)):
        packed |= row << j
    return packed


def count_votes(packed_WB: Tensor, *, out: Tensor) -> None:
    """``out = sign(sum_w sign_w)`` of the signs that W ranks packed."""
    ranks, width = packed_WB.shape
    count = torch.uint8 if ranks <= torch.iinfo(torch.uint8).max else torch.int32
    for j, part in enumerate(out.split(width)):
        for_plus = torch.zeros(part.numel(), dtype=count, device=out.device)
        for packed in packed_WB[:, : part.numel()]:  # bytes stay bytes: this is memory traffic, not arithmetic
            for_plus += (packed >> j) & 1
        part.copy_(for_plus).mul_(2).sub_(ranks).sign_()
