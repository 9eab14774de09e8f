r"""How long a data-parallel step takes, on the timeline of wait-free back-propagation.

Two resources run one task at a time: the *device* (forward, backward, compressing, decompressing) and the *link*
(collectives, in launch order). Backward fills DDP's buckets; a full bucket is compressed on the device and handed to
the link while backward goes on. Seconds in which the device waits for the link are *exposed* communication.

Source: wait-free back-propagation with tensor fusion as in ACP-SGD (Zhang, Shi, Chu, Li, ICDCS 2023, arXiv 2306.08881).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_efficient.compression.planning.cost_methods import BucketPlan, Method, Schedule
from lightning_efficient.compression.planning.cost_model import DeviceModel, LinkModel, Workload, assign_buckets


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """What the model says of one step; the mean over a method's phases (ACP-SGD alternates two).

    Attributes:
        method: the method's name.
        bucket_cap_mb: the cap in MiB; None for torch's default.
        step_s: seconds of forward, backward, compression and what of the communication is exposed.
        compute_s: seconds the device is busy.
        compression_s: seconds of it spent compressing and decompressing.
        buckets: number of buckets.
        collectives: collectives per step.
        payload_bytes: bytes this rank hands to collectives.
        wire_bytes: bytes this rank sends when they run on rings.
    """

    method: str
    bucket_cap_mb: float | None
    step_s: float
    compute_s: float
    compression_s: float
    buckets: int
    collectives: int
    payload_bytes: float
    wire_bytes: float

    @property
    def exposed_s(self) -> float:
        """Seconds the device waits for the link."""
        return self.step_s - self.compute_s


def estimate_step(
    method: Method,
    workload: Workload,
    link: LinkModel,
    *,
    world_size: int,
    bucket_cap_mb: float | None = None,
    device: DeviceModel | None = None,
) -> StepEstimate:
    """Predicts one data-parallel step.

    Args:
        method: what is done with the gradients, from :mod:`lightning_efficient.compression.planning.cost_methods`.
        workload: the step's compute.
        link: the link each rank sends over.
        world_size: number of ranks W; with 1 the link is free.
        bucket_cap_mb: DDP's bucket cap in MiB; None for torch's default. A method that works after backward ignores it
            and fuses everything into one bucket.
        device: what compression costs the device; nothing if None.

    Returns:
        The estimate, averaged over the method's phases.

    Raises:
        ValueError: if the world size is below 1 or the cap is not above 0.
    """
    if world_size < 1:
        raise ValueError(f"bad world size ({world_size}): a step needs a rank at least. Give 1 or more.")
    device = DeviceModel() if device is None else device
    order = workload.ready_order()
    if method.schedule == "after_backward":
        buckets: tuple[tuple[int, ...], ...] = (tuple(order),)
    else:
        sizes = [workload.itemsize * math.prod(workload.shapes[index]) for index in order]
        cuts = assign_buckets(sizes, bucket_cap_mb=bucket_cap_mb)
        buckets = tuple(tuple(order[position] for position in cut) for cut in cuts)
    steps, plans = [], []
    for phase in range(method.phases):
        phase_plans = [
            method.plan([workload.shapes[index] for index in bucket], phase=phase, world_size=world_size, device=device)
            for bucket in buckets
        ]
        steps.append(_step_seconds(phase_plans, buckets, workload, link, world_size, method.schedule))
        plans.extend(phase_plans)
    compression_s = sum(plan.device_s for plan in plans) / method.phases
    return StepEstimate(
        method=method.name,
        bucket_cap_mb=bucket_cap_mb,
        step_s=sum(steps) / method.phases,
        compute_s=workload.no_communication_s + compression_s,
        compression_s=compression_s,
        buckets=len(buckets),
        collectives=sum(len(plan.rounds) for plan in plans) // method.phases,
        payload_bytes=sum(r.n_bytes for plan in plans for r in plan.rounds) / method.phases,
        wire_bytes=sum(r.wire_bytes(world_size) for plan in plans for r in plan.rounds) / method.phases,
    )


def _step_seconds(
    plans: Sequence[BucketPlan],
    buckets: Sequence[Sequence[int]],
    workload: Workload,
    link: LinkModel,
    world_size: int,
    schedule: Schedule,
) -> float:
    if schedule == "wait_free":
        return workload.forward_s + _wait_free_seconds(plans, buckets, workload, link, world_size)
    # Blocking hooks stall backward for every bucket, and after backward nothing is left to overlap with: both are sums.
    link_s = sum(r.seconds(link, world_size=world_size) for plan in plans for r in plan.rounds)
    return workload.no_communication_s + sum(plan.device_s for plan in plans) + link_s


# What a free device prefers: work that a later collective waits for, then backward, then decompression.
_BETWEEN, _BACKWARD, _DECOMPRESS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class _Task:
    """Something that occupies the device or the link for ``seconds``, at ``release_s`` at the earliest.

    ``preference`` orders tasks that could start at the same moment; on the link it is their order of launch.
    ``bucket`` and ``stage`` say where in the bucket's chain it stands: 1, 3, ... are collectives, 2, 4, ... the device
    work after each. Stage 0 is backward, of which ``segment`` is the part.
    """

    release_s: float
    seconds: float
    preference: tuple[float, int]
    bucket: int
    stage: int
    segment: int = 0

    @property
    def on_link(self) -> bool:
        return self.stage % 2 == 1


def _wait_free_seconds(
    plans: Sequence[BucketPlan],
    buckets: Sequence[Sequence[int]],
    workload: Workload,
    link: LinkModel,
    world_size: int,
) -> float:
    """Seconds from the start of backward until the last bucket is decompressed.

    List scheduling: of all released tasks the one that can start first runs next, on its own resource, and releases its
    successors when it ends. A bucket's chain: its gradients' parts of backward and its compression; its collectives,
    with the work between them; its decompression. Backward gives way to other device work between two gradients.
    """
    segments = _backward_segments(plans, buckets, workload)

    def backward(segment: int, release_s: float) -> _Task:
        seconds, bucket = segments[segment]
        return _Task(release_s, seconds, (_BACKWARD, segment), bucket, stage=0, segment=segment)

    def chain(bucket: int, stage: int, release_s: float) -> list[_Task]:
        plan, position = plans[bucket], stage // 2
        if stage % 2:
            if position == len(plan.rounds):
                return []
            seconds = plan.rounds[position].seconds(link, world_size=world_size)
            return [_Task(release_s, seconds, (release_s, bucket), bucket, stage)]
        if position < len(plan.rounds):
            return [_Task(release_s, plan.between_s, (_BETWEEN, bucket), bucket, stage)]
        return [_Task(release_s, plan.decompress_s, (_DECOMPRESS, bucket), bucket, stage)]

    free_s = {"device": 0.0, "link": 0.0}
    waiting = [backward(0, 0.0)]
    while waiting:
        task = min(waiting, key=lambda t: (max(t.release_s, free_s["link" if t.on_link else "device"]), t.preference))
        waiting.remove(task)
        resource = "link" if task.on_link else "device"
        end = free_s[resource] = max(task.release_s, free_s[resource]) + task.seconds
        if task.stage or task.bucket >= 0:
            waiting += chain(task.bucket, task.stage + 1, end)
        if not task.stage and task.segment + 1 < len(segments):
            waiting.append(backward(task.segment + 1, end))
    return max(free_s.values())


def _backward_segments(
    plans: Sequence[BucketPlan], buckets: Sequence[Sequence[int]], workload: Workload
) -> list[tuple[float, int]]:
    """Backward cut where gradients become ready: seconds, and the bucket the part completes (-1 for none).

    A part that completes a bucket includes its compression.
    """
    segments = []
    done_s = 0.0
    for number, (bucket, plan) in enumerate(zip(buckets, plans, strict=True)):
        for index in bucket:
            last = index == bucket[-1]
            seconds = workload.ready_s[index] - done_s
            segments.append((seconds + plan.compress_s, number) if last else (seconds, -1))
            done_s = workload.ready_s[index]
    return [*segments, (workload.backward_s - done_s, -1)]
