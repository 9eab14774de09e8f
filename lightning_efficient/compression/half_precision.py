"""Gradients sent in 16 bits: half the bytes, and almost no arithmetic."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from lightning_efficient._compat import GradBucket
from lightning_efficient.compression.base import Compressor
from lightning_efficient.compression.completion import BucketWork, Verdict, poison

HalfDtype = Literal["bfloat16", "float16"]


class HalfPrecision(Compressor):
    """Round each rank's share to 16 bits, all-reduce it, and widen the sum.

    With gradient :math:`M_w` of rank w of W::

        gradient = widen(sum_w round(M_w / W))

    Args:
        dtype: "bfloat16" keeps the range of float32, "float16" has three more bits of precision and overflows at 65504.
        warmup_steps: see :class:`~lightning_efficient.compression.Compressor`.
        atomic: see :class:`~lightning_efficient.compression.Compressor`.
    """

    method = "half"

    def __init__(self, dtype: HalfDtype = "bfloat16", *, warmup_steps: int = 0, atomic: bool | None = None) -> None:
        super().__init__(warmup_steps=warmup_steps, atomic=atomic)
        if dtype not in get_args(HalfDtype):
            raise ValueError(f"dtype is {dtype!r}: it must be 'bfloat16' or 'float16'. Set one of them.")
        self.dtype = dtype

    @override
    def _reduce_compressed(self, bucket: GradBucket) -> Future[Tensor]:
        flat = bucket.buffer()
        wire = torch.empty_like(flat, dtype=getattr(torch, self.dtype))
        torch.div(flat, self.world_size, out=wire)  # rounds on the way out: no wide copy

        def write(ok: Verdict) -> None:
            flat.copy_(wire)
            poison(flat, ok)

        return self._when_done(self._all_reduce(wire), BucketWork(flat, [wire], write))
