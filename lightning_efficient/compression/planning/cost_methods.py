r"""What each way of exchanging gradients puts on the link and asks of the device, bucket by bucket.

``timeline`` times it. The formulas are those of the ACP-SGD paper (Zhang, Shi, Chu, Li, ICDCS 2023, arXiv 2306.08881,
cost analysis); Power-SGD is arXiv 1905.13727 (algorithm 1).

Legend: W workers; n, m rows and columns of a gradient seen as a matrix (``shape[0]`` by the rest); r rank, never above
min(n, m); u elements sent uncompressed; d elements of a bucket.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

from lightning_efficient.compression.planning.cost_model import DeviceModel, LinkModel, Shape

Schedule = Literal["wait_free", "blocking", "after_backward"]


@dataclass(frozen=True, slots=True)
class Round:
    """One collective: what it is, and how many bytes this rank hands to it."""

    kind: Literal["all_reduce", "all_gather"]
    n_bytes: float

    def seconds(self, link: LinkModel, *, world_size: int) -> float:
        """Seconds it takes on a ring of ``world_size`` ranks."""
        cost = link.all_reduce_s if self.kind == "all_reduce" else link.all_gather_s
        return cost(self.n_bytes, world_size=world_size)

    def wire_bytes(self, world_size: int) -> float:
        """Bytes this rank sends: 2(W-1)/W N for a ring all-reduce, (W-1) N for a ring all-gather."""
        share = 2 / world_size if self.kind == "all_reduce" else 1
        return share * (world_size - 1) * self.n_bytes


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """What one bucket asks for; the rounds depend on each other, in order, with ``between_s`` of device work between.

    Attributes:
        rounds: the collectives, in order; one at least.
        compress_s: device seconds before the first.
        between_s: device seconds between a round and the next.
        decompress_s: device seconds after the last.
    """

    rounds: tuple[Round, ...]
    compress_s: float = 0.0
    between_s: float = 0.0
    decompress_s: float = 0.0

    @property
    def device_s(self) -> float:
        """All device seconds of the bucket."""
        return self.compress_s + self.between_s * (len(self.rounds) - 1) + self.decompress_s


@dataclass(frozen=True)
class Method(ABC):
    """A way of exchanging gradients.

    Args:
        schedule: ``wait_free`` overlaps each bucket with the rest of backward; ``blocking`` stalls backward for each
            bucket (a hook that waits); ``after_backward`` handles everything fused, once backward has ended.
    """

    schedule: Schedule = "wait_free"

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in tables."""

    @property
    def phases(self) -> int:
        """Number of kinds of step the method alternates between."""
        return 1

    @abstractmethod
    def plan(self, shapes: Sequence[Shape], *, phase: int, world_size: int, device: DeviceModel) -> BucketPlan:
        """What a bucket holding gradients of these shapes asks for in a step of that phase."""

    def payload_bytes(self, shapes: Sequence[Shape], *, phase: int = 0) -> float:
        """Bytes a rank hands to collectives for gradients of these shapes in one step of that phase."""
        plan = self.plan(shapes, phase=phase, world_size=2, device=DeviceModel())
        return sum(exchange.n_bytes for exchange in plan.rounds)


@dataclass(frozen=True)
class DenseCost(Method):
    """Plain DDP: one all-reduce of the bucket; ``wire_itemsize`` 2 for a half-precision wire."""

    wire_itemsize: int = 4

    @property
    @override
    def name(self) -> str:
        return "plain" if self.wire_itemsize == 4 else f"half ({8 * self.wire_itemsize} bit)"

    @override
    def plan(self, shapes: Sequence[Shape], *, phase: int, world_size: int, device: DeviceModel) -> BucketPlan:
        d = _elements(shapes)
        cast_s = 0.0 if self.wire_itemsize == 4 else device.seconds(n_bytes=d * (4 + self.wire_itemsize))
        return BucketPlan((Round("all_reduce", self.wire_itemsize * d),), compress_s=cast_s, decompress_s=cast_s)


@dataclass(frozen=True)
class LowRankCost(Method):
    """What ACP-SGD and Power-SGD share: which gradients are compressed, and the size of their factors.

    Args:
        schedule: see :class:`Method`.
        rank: rank r of the factors; 1 or more.
        min_compression_rate: a gradient is compressed if (n+m) r / 2 times this is below n m; 0 compresses each matrix.
        wire_itemsize: bytes of an element on the wire.
        used_flags: whether one element per compressed gradient, which says if it was used, goes with the factors.
    """

    rank: int = 4
    min_compression_rate: float = 2.0
    wire_itemsize: int = 4
    used_flags: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"bad rank ({self.rank}): a factor needs a column. Give rank >= 1.")

    def split(self, shapes: Iterable[Shape]) -> tuple[list[tuple[int, int, int]], int]:
        """The compressed gradients as (n, m, r), and u, the number of elements sent as they are."""
        compressed, raw = [], 0
        for shape in shapes:
            d = math.prod(shape)
            n, m = (shape[0], d // shape[0]) if len(shape) > 1 and d else (1, d)
            r = min(self.rank, n, m)
            if len(shape) > 1 and d and (n + m) * r / 2 * self.min_compression_rate < d:
                compressed.append((n, m, r))
            else:
                raw += d
        return compressed, raw

    def _extra_elements(self, compressed: Sequence[tuple[int, int, int]], raw: int) -> int:
        return raw + (len(compressed) if self.used_flags else 0)


@dataclass(frozen=True)
class ACPCost(LowRankCost):
    """ACP-SGD: one all-reduce, of sum(n r) + u elements when P is sent (phase 0), of sum(m r) + u when Q is (phase 1).

    Device work per matrix: 2nmr to compress, 2nmr for the local error, 2nmr to decompress, one thin QR of the factor
    that was sent.
    """

    @property
    @override
    def name(self) -> str:
        return f"ACP-SGD r={self.rank}"

    @property
    @override
    def phases(self) -> int:
        return 2

    @override
    def plan(self, shapes: Sequence[Shape], *, phase: int, world_size: int, device: DeviceModel) -> BucketPlan:
        compressed, raw = self.split(shapes)
        factors = sum((m if phase % 2 else n) * r for n, m, r in compressed)
        n_bytes = self.wire_itemsize * (factors + self._extra_elements(compressed, raw))
        compress_s = decompress_s = 0.0
        for n, m, r in compressed:
            d, product = n * m, 2.0 * n * m * r
            compress_s += device.seconds(n_bytes=12 * d) + device.seconds(flops=product, n_bytes=4 * d)  # M+E; times Q
            decompress_s += device.seconds(flops=product, n_bytes=8 * d)  # E = A - P Q^T
            decompress_s += device.seconds(flops=product, n_bytes=4 * d)  # P Q^T / W
            decompress_s += device.orthogonalize_s + device.per_op_s
        return BucketPlan((Round("all_reduce", n_bytes),), compress_s=compress_s, decompress_s=decompress_s)


@dataclass(frozen=True)
class PowerCost(LowRankCost):
    """Power-SGD: an all-reduce of sum(n r) + u elements, then one of sum(m r) that depends on it.

    As published it runs after backward, on everything at once (``schedule="after_backward"``, the default here); as a
    DDP hook that waits it is ``"blocking"``; ``"wait_free"`` is a hook that overlaps both rounds with backward.
    Device work per matrix: 2nmr for P; the QR of P and 2nmr for Q in between; 2nmr to decompress, the new error.
    """

    schedule: Schedule = "after_backward"

    @property
    @override
    def name(self) -> str:
        suffix = {"wait_free": ", overlapped", "blocking": ", blocking hook", "after_backward": ""}[self.schedule]
        return f"Power-SGD r={self.rank}{suffix}"

    @override
    def plan(self, shapes: Sequence[Shape], *, phase: int, world_size: int, device: DeviceModel) -> BucketPlan:
        compressed, raw = self.split(shapes)
        p_elements = sum(n * r for n, _, r in compressed) + self._extra_elements(compressed, raw)
        q_elements = sum(m * r for _, m, r in compressed)
        compress_s = between_s = decompress_s = 0.0
        for n, m, r in compressed:
            d, product = n * m, 2.0 * n * m * r
            compress_s += device.seconds(n_bytes=12 * d) + device.seconds(flops=product, n_bytes=4 * d)  # M+E; times Q
            between_s += device.orthogonalize_s + device.per_op_s + device.seconds(flops=product, n_bytes=4 * d)
            decompress_s += device.seconds(flops=product, n_bytes=4 * d) + device.seconds(n_bytes=12 * d)  # P Q^T; E
        rounds = [Round("all_reduce", self.wire_itemsize * p_elements)]
        if compressed:
            rounds.append(Round("all_reduce", self.wire_itemsize * q_elements))
        return BucketPlan(tuple(rounds), compress_s=compress_s, between_s=between_s, decompress_s=decompress_s)


@dataclass(frozen=True)
class TopKCost(Method):
    """Top-k: an all-gather of the k = density d largest elements, values and indices; grows with W.

    Args:
        schedule: see :class:`Method`.
        density: share of elements kept, in (0, 1].
        pair_bytes: bytes of a value and its index.
        select_passes: times the selection reads a gradient.
    """

    density: float = 0.001
    pair_bytes: int = 8
    select_passes: float = 8.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"bad density ({self.density}): it is the share of elements kept. Give it in (0, 1].")

    @property
    @override
    def name(self) -> str:
        return f"Top-k {100 * self.density:g} %"

    @override
    def plan(self, shapes: Sequence[Shape], *, phase: int, world_size: int, device: DeviceModel) -> BucketPlan:
        d = _elements(shapes)
        n_bytes = self.pair_bytes * sum(max(1, round(self.density * math.prod(shape))) for shape in shapes)
        compress_s = device.seconds(n_bytes=12 * d) + device.seconds(n_bytes=4 * d * self.select_passes)
        decompress_s = device.seconds(n_bytes=4 * d) + device.seconds(n_bytes=2 * world_size * n_bytes, ops=world_size)
        return BucketPlan((Round("all_gather", n_bytes),), compress_s=compress_s, decompress_s=decompress_s)


@dataclass(frozen=True)
class SignCost(Method):
    """Sign-SGD with majority vote: an all-gather of one bit per element; the vote unpacks the bits of all W ranks.

    Args:
        schedule: see :class:`Method`.
        used_flags: whether a byte per gradient, which says if it was used, and one for the bucket go with the bits.
    """

    used_flags: bool = True

    @property
    @override
    def name(self) -> str:
        return "Sign-SGD"

    @override
    def plan(self, shapes: Sequence[Shape], *, phase: int, world_size: int, device: DeviceModel) -> BucketPlan:
        d = _elements(shapes)
        n_bytes = math.ceil(d / 8) + (len(shapes) + 1 if self.used_flags else 0)
        compress_s = device.seconds(n_bytes=4 * d + 2 * d + n_bytes)  # read, one byte per sign, pack
        vote_s = device.seconds(n_bytes=world_size * (n_bytes + 2 * d), ops=world_size) + device.seconds(n_bytes=5 * d)
        return BucketPlan((Round("all_gather", n_bytes),), compress_s=compress_s, decompress_s=vote_s)


def _elements(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
