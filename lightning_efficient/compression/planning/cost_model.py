r"""What the cost of a data-parallel step depends on: the link, the device, the step's compute, and DDP's buckets.

Frozen values and pure functions. What each method puts on the link is in ``cost_methods``; both meet in ``timeline``.
The alpha-beta model of the link is that of ACP-SGD (Zhang, Shi, Chu, Li: "Evaluation and Optimization of Gradient
Compression for Distributed Deep Learning", ICDCS 2023, arXiv 2306.08881, cost analysis).

Legend: W workers; N bytes; alpha seconds a message costs however small; beta seconds a byte costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
MIB = 2**20
#: torch's DistributedDataParallel: cap of every bucket but the first, and of the first, when no cap is asked for.
DEFAULT_BUCKET_CAP_MB = 25.0
DEFAULT_FIRST_BUCKET_MB = 1.0


@dataclass(frozen=True, slots=True)
class LinkModel:
    """A link between neighbours on a ring: a message of N bytes takes ``alpha_s + N * beta_s_per_byte`` seconds.

    Args:
        alpha_s: seconds per message, whatever its size; at least 0.
        beta_s_per_byte: seconds per byte; at least 0.
        residual: root mean square of the relative misfit where the link was measured (0.1 is 10 %); 0 if it was given.

    Raises:
        ValueError: if a value is negative or not finite.
    """

    alpha_s: float
    beta_s_per_byte: float
    residual: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha_s", "beta_s_per_byte", "residual"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"bad link ({name}={value}): it must be finite and at least 0. Give seconds.")

    @classmethod
    def from_rate(cls, bits_per_s: float, *, latency_s: float = 0.0) -> LinkModel:
        """A link given by its rate in bits per second and its latency in seconds."""
        if not bits_per_s > 0:
            raise ValueError(f"bad link rate ({bits_per_s} bit/s): it must be above 0. Give bits per second, e.g. 1e8.")
        return cls(alpha_s=latency_s, beta_s_per_byte=8.0 / bits_per_s)

    @property
    def bits_per_s(self) -> float:
        """The rate in bits per second (``inf`` where a byte costs nothing)."""
        return 8.0 / self.beta_s_per_byte if self.beta_s_per_byte else math.inf

    def all_reduce_s(self, n_bytes: float, *, world_size: int) -> float:
        r"""Ring all-reduce of N bytes: :math:`2(W-1)\alpha + 2\frac{W-1}{W} N \beta` (2306.08881, cost model)."""
        hops = 2 * (world_size - 1)
        return hops * self.alpha_s + hops / world_size * n_bytes * self.beta_s_per_byte

    def all_gather_s(self, n_bytes: float, *, world_size: int) -> float:
        r"""Ring all-gather of N bytes *from each rank*: :math:`(W-1)(\alpha + N\beta)` (2306.08881, cost model)."""
        return (world_size - 1) * (self.alpha_s + n_bytes * self.beta_s_per_byte)


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """What compressing costs the device: ``max(flops / flops_per_s, bytes / memory_bytes_per_s) + ops * per_op_s``.

    The defaults make compute free: right where the link is slow, an upper bound on the gain where it is not.

    Args:
        flops_per_s: sustained floating-point operations per second of tall and skinny products.
        memory_bytes_per_s: sustained memory traffic in bytes per second.
        per_op_s: seconds an operation costs however small (Python, a kernel's launch).
        orthogonalize_s: seconds one thin QR costs, beyond ``per_op_s``.
    """

    flops_per_s: float = math.inf
    memory_bytes_per_s: float = math.inf
    per_op_s: float = 0.0
    orthogonalize_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.flops_per_s > 0 and self.memory_bytes_per_s > 0 and min(self.per_op_s, self.orthogonalize_s) >= 0):
            raise ValueError(f"bad device ({self}): rates must be above 0 and times at least 0. Give SI units.")

    def seconds(self, *, flops: float = 0.0, n_bytes: float = 0.0, ops: int = 1) -> float:
        """Seconds of ``ops`` operations that together do ``flops`` and move ``n_bytes`` through memory."""
        return max(flops / self.flops_per_s, n_bytes / self.memory_bytes_per_s) + ops * self.per_op_s


@dataclass(frozen=True, slots=True)
class Workload:
    """One step's compute, without any communication.

    Args:
        shapes: shapes of the trainable parameters, in registration order.
        ready_s: for each of them, seconds after the start of backward at which its gradient is complete.
        forward_s: seconds before that backward begins (with gradient accumulation: all earlier micro-batches too).
        backward_s: seconds of the backward.
        itemsize: bytes of a gradient element.

    Raises:
        ValueError: if nothing is trainable, lengths differ, or a time is negative or later than the end of backward.
    """

    shapes: tuple[Shape, ...]
    ready_s: tuple[float, ...]
    forward_s: float
    backward_s: float
    itemsize: int = 4

    def __post_init__(self) -> None:
        if not self.shapes or len(self.shapes) != len(self.ready_s):
            raise ValueError(
                f"bad workload ({len(self.shapes)} shapes, {len(self.ready_s)} ready times): each trainable parameter "
                "needs both, and there must be one at least. Give the trainable parameters in registration order."
            )
        if self.forward_s < 0 or min(self.ready_s) < 0 or max(self.ready_s) > self.backward_s * (1 + 1e-9):
            raise ValueError(
                f"bad workload (gradients ready between {min(self.ready_s)} and {max(self.ready_s)} s, "
                f"backward_s={self.backward_s}, forward_s={self.forward_s}): times must be at least 0 and gradients "
                "ready by the end of backward. Give all times in seconds."
            )

    @classmethod
    def from_work(
        cls,
        shapes: Iterable[Sequence[int]],
        *,
        forward_s: float,
        backward_s: float,
        work: Sequence[float] | None = None,
        itemsize: int = 4,
    ) -> Workload:
        """A workload whose gradients become ready in reverse order, spaced by each one's share of the work.

        Args:
            shapes: shapes in registration order.
            forward_s: seconds of the forward.
            backward_s: seconds of the backward.
            work: relative cost of each parameter's part of backward (e.g. its FLOPs); its number of elements if None,
                which suits stacks of linear layers and flatters nothing but embeddings.
            itemsize: bytes of a gradient element.
        """
        sizes: tuple[Shape, ...] = tuple(tuple(int(size) for size in shape) for shape in shapes)
        costs = [float(math.prod(shape)) for shape in sizes] if work is None else [float(cost) for cost in work]
        total = math.fsum(costs)
        if len(costs) != len(sizes) or min(costs, default=0.0) < 0 or not total > 0:
            raise ValueError(
                f"bad work ({len(costs)} costs for {len(sizes)} shapes, total {total}): each parameter needs one, "
                "at least 0, and their sum must be above 0. Leave work out to use the numbers of elements."
            )
        ready = [0.0] * len(sizes)
        done = 0.0
        for index in reversed(range(len(sizes))):
            done += costs[index]
            ready[index] = min(done / total, 1.0) * backward_s
        return cls(sizes, tuple(ready), forward_s, backward_s, itemsize)

    @property
    def no_communication_s(self) -> float:
        """Seconds of the step if communication and compression were free."""
        return self.forward_s + self.backward_s

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients: what plain DDP hands to its collectives."""
        return self.itemsize * sum(math.prod(shape) for shape in self.shapes)

    def ready_order(self) -> tuple[int, ...]:
        """Indices in the order in which gradients become ready; ties in reverse registration order, as DDP has it."""
        return tuple(sorted(range(len(self.shapes)), key=lambda index: (self.ready_s[index], -index)))


def assign_buckets(n_bytes: Sequence[int], *, bucket_cap_mb: float | None = None) -> tuple[tuple[int, ...], ...]:
    """Cuts gradients, given in ready order, into DDP's buckets.

    A bucket closes once it *reaches* its cap, so a gradient larger than the cap shares a bucket with whatever was open.
    Without an explicit cap, torch takes 1 MiB for the first bucket and 25 MiB for the others; an explicit cap holds for
    all. This is the layout from the second iteration on (in the first, DDP may use a single bucket).

    Args:
        n_bytes: bytes of each gradient, in ready order.
        bucket_cap_mb: DDP's argument of that name, in MiB; None as in ``DistributedDataParallel(bucket_cap_mb=None)``.

    Returns:
        For each bucket, in launch order, the positions in ``n_bytes`` that it holds.

    Raises:
        ValueError: if the cap is not above 0.
    """
    if bucket_cap_mb is not None and not bucket_cap_mb > 0:
        raise ValueError(
            f"bad bucket cap ({bucket_cap_mb} MiB): it must be above 0. Give MiB, or None for torch's own."
        )
    later_cap = (DEFAULT_BUCKET_CAP_MB if bucket_cap_mb is None else bucket_cap_mb) * MIB
    cap = DEFAULT_FIRST_BUCKET_MB * MIB if bucket_cap_mb is None else later_cap
    buckets: list[tuple[int, ...]] = []
    members: list[int] = []
    size = 0
    for position, count in enumerate(n_bytes):
        members.append(position)
        size += count
        if size >= cap:
            buckets.append(tuple(members))
            members, size, cap = [], 0, later_cap
    return (*buckets, tuple(members)) if members else tuple(buckets)
