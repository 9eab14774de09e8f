"""Which compression rank and bucket size to use, from the cost model: accuracy first, then speed.

A higher rank follows the exact gradient more closely, so the recommendation is the *largest* rank whose communication
still hides behind backward, and no compression at all where plain DDP already does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_efficient.compression.planning.cost_methods import ACPCost, DenseCost
from lightning_efficient.compression.planning.cost_model import (
    DEFAULT_BUCKET_CAP_MB,
    DeviceModel,
    LinkModel,
    Workload,
)
from lightning_efficient.compression.planning.timeline import StepEstimate, estimate_step

#: Ranks on offer. Rank 1 is not: with momentum it is unsafe (see the method card of ACP-SGD).
RANKS = (2, 4, 8, 16, 32, 64)
BUCKET_CAPS_MB = (1.0, 2.0, 4.0, 8.0, 16.0, DEFAULT_BUCKET_CAP_MB, 50.0, 100.0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run, at its best bucket size; ``rank`` is None for plain DDP."""

    rank: int | None
    bucket_cap_mb: float
    estimate: StepEstimate
    compression_rate: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer, why, and all candidates.

    Attributes:
        rank: rank of ACP-SGD; None for plain DDP ("do not compress").
        bucket_cap_mb: DDP's bucket cap, in MiB.
        reason: one sentence for the user.
        no_communication_s: seconds of a step in which communication and compression were free.
        candidates: plain DDP first, then ACP-SGD by rising rank, each at its best bucket size.
    """

    rank: int | None
    bucket_cap_mb: float
    reason: str
    no_communication_s: float
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        """The candidate that is recommended."""
        return next(candidate for candidate in self.candidates if candidate.rank == self.rank)


def recommend(
    workload: Workload,
    link: LinkModel,
    *,
    world_size: int,
    device: DeviceModel | None = None,
    ranks: Sequence[int] = RANKS,
    bucket_caps_mb: Sequence[float] = BUCKET_CAPS_MB,
    tolerance: float = 0.05,
) -> Recommendation:
    """Chooses between plain DDP and ACP-SGD, its rank and the bucket size.

    1. Plain DDP, if its step is within ``tolerance`` of the step without communication.
    2. Else the largest rank whose exposed communication is within ``tolerance`` of that step and that beats plain DDP.
    3. Else (the link is too slow for any rank to hide) the largest rank within ``tolerance`` of the fastest one.
    4. Plain DDP again, where compressing does not save at least ``tolerance`` of its step.

    Args:
        workload: the step's compute.
        link: the link of the slowest rank.
        world_size: number of ranks, 2 or more.
        device: what compression costs the device; nothing if None.
        ranks: ranks to consider, each 2 or more.
        bucket_caps_mb: bucket caps to consider, in MiB.
        tolerance: share of a step that is small enough to ignore.

    Returns:
        The recommendation with all candidates.

    Raises:
        ValueError: if there is one rank only, a compression rank below 2, or nothing to choose from.
    """
    if world_size < 2:
        raise ValueError(f"bad world size ({world_size}): one process has no gradients to exchange. Give 2 or more.")
    if not ranks or not bucket_caps_mb or min(ranks) < 2:
        raise ValueError(
            f"bad choice (ranks={tuple(ranks)}, bucket_caps_mb={tuple(bucket_caps_mb)}): both must hold something, and "
            "rank 1 is not recommended because it is unsafe with momentum. Give ranks of 2 or more."
        )

    def at_best_cap(rank: int | None) -> Candidate:
        method = DenseCost() if rank is None else ACPCost(rank=rank)
        estimates = [
            estimate_step(method, workload, link, world_size=world_size, bucket_cap_mb=cap, device=device)
            for cap in bucket_caps_mb
        ]
        best_s = min(estimate.step_s for estimate in estimates)
        # Of caps the model cannot tell apart (1 %), the one nearest to torch's default: the least surprise.
        cap, estimate = min(
            ((c, e) for c, e in zip(bucket_caps_mb, estimates, strict=True) if e.step_s <= 1.01 * best_s),
            key=lambda pair: abs(pair[0] - DEFAULT_BUCKET_CAP_MB),
        )
        return Candidate(rank, cap, estimate, workload.gradient_bytes / estimate.payload_bytes)

    plain = at_best_cap(None)
    compressed = [at_best_cap(rank) for rank in sorted(set(ranks))]
    chosen, reason = _choose(plain, compressed, workload.no_communication_s, tolerance)
    return Recommendation(
        rank=chosen.rank,
        bucket_cap_mb=chosen.bucket_cap_mb,
        reason=reason,
        no_communication_s=workload.no_communication_s,
        candidates=(plain, *compressed),
    )


def _choose(
    plain: Candidate, compressed: Sequence[Candidate], free_s: float, tolerance: float
) -> tuple[Candidate, str]:
    plain_s = plain.estimate.step_s
    if plain_s <= (1 + tolerance) * free_s:
        return plain, f"plain DDP is within {tolerance:.0%} of a step without communication: compressing gains nothing"
    worthwhile = [c for c in compressed if c.estimate.step_s <= (1 - tolerance) * plain_s]
    if not worthwhile:
        return plain, f"no rank makes the step at least {tolerance:.0%} shorter than plain DDP: do not compress"
    hidden = [c for c in worthwhile if c.estimate.exposed_s <= tolerance * free_s]
    if hidden:
        best = max(hidden, key=lambda c: c.rank or 0)
        return best, f"the largest rank whose exposed communication stays within {tolerance:.0%} of the step"
    fastest_s = min(c.estimate.step_s for c in worthwhile)
    best = max((c for c in worthwhile if c.estimate.step_s <= (1 + tolerance) * fastest_s), key=lambda c: c.rank or 0)
    return best, f"no rank hides its communication on this link: the largest rank within {tolerance:.0%} of the fastest"
