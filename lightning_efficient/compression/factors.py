"""Low-rank factors of one parameter, their places in the flat buffer of a collective, and the products they need.

Factors are stored with their vectors as rows: a skinny factor in the other layout makes the projection tens of times
slower on CPU.

Dimension letters: N rows, M columns, R rank (a leading batch of matrices is left out of the names).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_efficient.compression.completion import Verdict
from lightning_efficient.compression.matrices import MatrixSpec
from lightning_efficient.compression.orthogonalize import orthogonalize


class Factors:
    """State of one compressed parameter.

    Attributes:
        p_RN: left factor, orthonormal rows whenever it is the known basis.
        q_RM: right factor, likewise.
        error_NM: what this rank has not sent yet, in unscaled gradient units; None without error feedback.
        sends_q: which factor goes over the wire next: Q (the basis is P), or P (the basis is Q).
    """

    __slots__ = ("error_NM", "name", "p_RN", "q_RM", "sends_q", "spec")

    def __init__(self, name: str, spec: MatrixSpec, *, seed: int, like: Tensor, error_dtype: torch.dtype | None):
        self.name = name
        self.spec = spec
        dtype = compute_dtype(like.dtype)
        # Seeded by the name, on the CPU, with an own generator: the same on every rank and device, whatever the order
        # of the parameters, and without touching the global generators that dropout uses.
        generator = torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
        gaussian = torch.randn(spec.factor_shape(spec.cols), generator=generator, dtype=torch.float64)
        self.q_RM = orthogonalize(gaussian).to(like.device, dtype).contiguous()
        self.p_RN = torch.zeros(spec.factor_shape(spec.rows), device=like.device, dtype=dtype)
        self.error_NM = None
        if error_dtype is not None:
            wide = torch.promote_types(error_dtype, dtype) if error_dtype == torch.float32 else error_dtype
            self.error_NM = torch.zeros(spec.shape, device=like.device, dtype=wide)
        self.sends_q = False

    @property
    def basis(self) -> Tensor:
        """The orthonormal factor that every rank knows."""
        return self.p_RN if self.sends_q else self.q_RM

    @property
    def sent(self) -> Tensor:
        """The factor that is sent next; its storage holds the one sent last."""
        return self.q_RM if self.sends_q else self.p_RN


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """Where the parameters of one DDP bucket lie: fixed for a tuple of parameters, whatever the bucket's index.

    ``numels`` cuts the flat buffer into parameters; ``matrices`` and ``raw`` hold positions in that cut.
    """

    numels: list[int]
    matrices: list[int]
    factors: list[Factors]
    raw: list[int]

    @property
    def raw_numel(self) -> int:
        """Elements that travel uncompressed."""
        return sum(self.numels[i] for i in self.raw)


class SendBuffer:
    """The flat buffer of one collective: factors, then raw tensors, then one "used" flag per compressed parameter.

    Kept from step to step, so the hot path allocates nothing.

    Args:
        shapes: shapes of the factors, in the order of the bucket's compressed parameters.
        raw_numel: elements of the tensors that travel uncompressed.
        flags: number of flags.
        compute: dtype of the factors.
        wire: dtype of the collective.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        raw_numel: int,
        flags: int,
        *,
        compute: torch.dtype,
        wire: torch.dtype,
        device: torch.device,
    ) -> None:
        numels = [torch.Size(shape).numel() for shape in shapes]
        total = sum(numels)
        self.wire = torch.empty(total + raw_numel + flags, dtype=wire, device=device)
        self.flags = self.wire[total + raw_numel :]
        self.raw = self.wire[total : total + raw_numel]
        self._wire_factors = self.wire[:total]
        # `own` keeps this rank's factors while the collective overwrites the wire buffer with the sum.
        self._own = torch.empty(total, dtype=compute, device=device)
        self._sum = self._wire_factors if wire == compute else torch.empty_like(self._own)
        self.own = [t.view(shape) for t, shape in zip(self._own.split(numels), shapes, strict=True)]
        self.sum = [t.view(shape) for t, shape in zip(self._sum.split(numels), shapes, strict=True)]

    def seal(self) -> None:
        """Put this rank's factors on the wire; rounding them to the wire's dtype is left to the error feedback."""
        self._wire_factors.copy_(self._own)
        if self._sum is not self._wire_factors:
            self._own.copy_(self._wire_factors)

    def open(self) -> None:
        """After the collective: make the summed factors readable in the compute dtype."""
        if self._sum is not self._wire_factors:
            self._sum.copy_(self._wire_factors)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of factors and their products for gradients of ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def project(basis_RD: Tensor, a_DE: Tensor, *, out: Tensor) -> Tensor:
    """``out_RE = basis_RD @ a_DE``, also for a batch of matrices."""
    return (torch.bmm if a_DE.dim() == 3 else torch.mm)(basis_RD, a_DE, out=out)


def subtract_product(a_NM: Tensor, p_RN: Tensor, q_RM: Tensor, *, out: Tensor) -> Tensor:
    """``out = A - P Q^T`` with the factors' vectors as rows; ``out`` may be ``A``."""
    if a_NM.dim() == 3:
        return torch.baddbmm(a_NM, p_RN.mT, q_RM, alpha=-1, out=out)
    return torch.addmm(a_NM, p_RN.mT, q_RM, alpha=-1, out=out)


def write_product(p_RN: Tensor, q_RM: Tensor, *, out: Tensor) -> None:
    """``out = P Q^T`` with the factors' vectors as rows, cast to the dtype of ``out``."""
    if out.dtype == p_RN.dtype:
        project(p_RN.mT, q_RM, out=out)
    else:
        out.copy_(p_RN.mT @ q_RM)


def commit(target: Tensor, value: Tensor, keep: Verdict) -> None:
    """``target <- value`` where ``keep``; a tensor flag stays on its device."""
    if keep is True:
        target.copy_(value)
    elif keep is not False:
        target.copy_(torch.where(keep, value.to(target.dtype), target))


def masked(x: Tensor, keep: Verdict) -> Tensor:
    """``x``, or zeros where a verdict that stays on the device is false: for kernels that must not meet nan."""
    return x if isinstance(keep, bool) else torch.where(keep, x, torch.zeros_like(x))


def square_sum(x: Tensor) -> Tensor:
    """Squared Euclidean norm, summed in float64."""
    return x.square().sum(dtype=torch.float64)
