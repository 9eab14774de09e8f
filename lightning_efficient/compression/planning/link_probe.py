"""Measures the link of a process group, and what compression costs a device.

All-reduces of log-spaced sizes are timed; the alpha-beta model of ``cost_model`` is fitted to them. Every
rank gets the same answer, that of the slowest rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from lightning_efficient._links import device_of, fit_line, seconds_of, wait_for
from lightning_efficient.compression.planning.cost_model import DeviceModel, LinkModel

#: Bytes: 1 KiB to 16 MiB, by factors of 4.
PROBE_SIZES = tuple(4**power for power in range(5, 13))


def measure_link(
    group: dist.ProcessGroup | None = None,
    *,
    sizes: Sequence[int] = PROBE_SIZES,
    repeats: int = 5,
    budget_s: float = 10.0,
    timeout_s: float = 60.0,
    device: torch.device | str | None = None,
) -> LinkModel:
    """Times all-reduces over a process group and fits the alpha-beta model. Every rank of the group calls it.

    For each size: the median of ``repeats`` on each rank, then the maximum over ranks. The fit weighs relative errors,
    so that small messages determine alpha and large ones beta. Sizes that would not fit into the budget are left out
    (on a slow link the small ones tell enough), by a decision all ranks share.

    Args:
        group: the process group; the default one if None.
        sizes: bytes of the messages; two distinct ones at least, each 4 or more.
        repeats: timed all-reduces per size, after an untimed one.
        budget_s: seconds the whole measurement may take, roughly. The two smallest sizes are always measured.
        timeout_s: seconds one all-reduce may take before the link counts as dead.
        device: where the messages live; the current CUDA device for NCCL, else the CPU, if None.

    Returns:
        The link, identical on all ranks; ``residual`` is the relative misfit.

    Raises:
        ValueError: if the group has one rank only, or sizes or repeats are too few.
        RuntimeError: if no process group is initialised, or an all-reduce fails or outlasts ``timeout_s``.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "cannot measure a link: no process group is initialised. Call torch.distributed.init_process_group first."
        )
    world_size = dist.get_world_size(group)
    sizes = sorted(set(sizes))
    if world_size < 2:
        raise ValueError("cannot measure a link (world size 1): one process has no link. Start 2 ranks or more.")
    if len(sizes) < 2 or sizes[0] < 4 or repeats < 1:
        raise ValueError(
            f"bad probe (sizes={sizes}, repeats={repeats}): a line needs two sizes of 4 bytes or more, measured "
            "once or more. Leave both out for the defaults."
        )
    on = device_of(group) if device is None else torch.device(device)

    def all_reduce(tensor: torch.Tensor) -> None:
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group, async_op=True)
        wait_for(work, what=f"{tensor.nbytes} bytes over {world_size} ranks", timeout_s=timeout_s, device=on)

    begin = time.perf_counter()
    points: list[tuple[int, float]] = []
    elapsed = 0.0
    for position, size in enumerate(sizes):
        if position >= 2:
            # The last size's time, scaled, bounds the next one's from above: latency does not grow.
            next_s = points[-1][1] * size / points[-1][0] * (repeats + 1)
            if elapsed + next_s > budget_s:
                break
        message = torch.zeros(size // 4, dtype=torch.float32, device=on)
        median = statistics.median(seconds_of(lambda m=message: all_reduce(m), repeats, on))  # type: ignore[misc]
        # Both numbers come back as the slowest rank has them, so that all ranks fit, and stop, alike.
        agreed = torch.tensor([median, time.perf_counter() - begin], dtype=torch.float64, device=on)
        all_reduce(agreed)
        seconds, elapsed = agreed.tolist()
        points.append((4 * message.numel(), seconds))
    return fit_link(points, world_size=world_size)


def fit_link(points: Sequence[tuple[float, float]], *, world_size: int) -> LinkModel:
    r"""Fits :math:`T(N) = 2(W-1)\alpha + 2\frac{W-1}{W} N \beta` to measured ring all-reduces.

    Least squares on relative errors, both terms kept at 0 or above.

    Args:
        points: pairs of bytes and seconds, of two sizes at least; seconds above 0.
        world_size: number of ranks W, 2 or more.

    Returns:
        The link; ``residual`` is the root mean square of the relative errors.

    Raises:
        ValueError: if the points do not determine a line.
    """
    if len({n_bytes for n_bytes, _ in points}) < 2 or world_size < 2 or min(seconds for _, seconds in points) <= 0:
        raise ValueError(
            f"cannot fit a link ({len(points)} points, world size {world_size}): two sizes, times above 0 and two "
            "ranks are needed. Measure more sizes."
        )
    a, b, residual = fit_line(points)
    hops = 2 * (world_size - 1)
    return LinkModel(alpha_s=a / hops, beta_s_per_byte=b * world_size / hops, residual=residual)


def measure_device(
    device: torch.device | str = "cpu", *, side: int = 1024, rank: int = 8, repeats: int = 5
) -> DeviceModel:
    """Times what compression is made of: a pass through memory, a skinny product, a thin QR, and an empty operation.

    Args:
        device: where to measure.
        side: rows and columns of the matrix.
        rank: columns of the factor.
        repeats: timed runs of each, after an untimed one; the median counts.

    Returns:
        The device, for :func:`lightning_efficient.compression.planning.timeline.estimate_step`.
    """
    on = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(side, side, generator=generator).to(on)
    other, product = matrix.clone(), torch.empty(rank, side, device=on)
    factor = torch.randn(rank, side, generator=generator).to(on)
    tiny = torch.zeros(1, device=on)

    def median(run: Callable[[], object]) -> float:
        return statistics.median(seconds_of(run, repeats, on))

    per_op_s = median(lambda: tiny.add_(1.0))
    add_s = median(lambda: other.add_(matrix))
    product_s = median(lambda: torch.mm(factor, matrix, out=product))
    qr_s = median(lambda: torch.linalg.qr(factor.T))
    return DeviceModel(
        flops_per_s=2.0 * side * side * rank / max(product_s - per_op_s, 1e-9),
        memory_bytes_per_s=3.0 * matrix.nbytes / max(add_s - per_op_s, 1e-9),
        per_op_s=per_op_s,
        orthogonalize_s=max(qr_s - per_op_s, 0.0),
    )
