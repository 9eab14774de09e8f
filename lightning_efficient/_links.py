"""What every measurement of a link needs: the clock, the device a backend wants, and the line through the times."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def seconds_of(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Time ``run``, each time until the device is done, after an untimed run."""
    run()
    synchronize(device)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Return where the tensors of a group's collectives live."""
    if "nccl" in dist.get_backend(group) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def wait_for(work: Any, *, what: str, timeout_s: float, device: torch.device) -> None:
    """Wait for a collective that was issued with ``async_op=True``.

    Args:
        work: what it returned.
        what: for the error: the collective and its size.
        timeout_s: seconds after which the link counts as dead.
        device: where its tensors live.

    Raises:
        RuntimeError: it failed, or took longer.
    """
    try:
        work.wait(timedelta(seconds=timeout_s))
        synchronize(device)
    except RuntimeError as error:
        raise RuntimeError(
            f"the link probe failed ({what}, timeout {timeout_s:g} s): a rank is gone or the network is stuck. Check "
            "that all ranks run and reach each other, or raise timeout_s."
        ) from error


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    r"""Fit :math:`t = a + b N` with :math:`a, b \ge 0` by least squares on relative errors.

    Relative, so that small messages determine the latency and large ones the rate.

    Args:
        points: pairs of bytes N and seconds t, of two sizes at least; seconds above 0.

    Returns:
        a in seconds, b in seconds per byte, and the root mean square of the relative errors.

    Raises:
        ValueError: the points do not determine a line.
    """
    if len({n_bytes for n_bytes, _ in points}) < 2 or min(seconds for _, seconds in points) <= 0:
        raise ValueError(
            f"cannot fit a line ({len(points)} points): two sizes and times above 0 are needed. Measure more sizes."
        )
    # With weights 1/t, minimise sum (a x + b y - 1)^2 over x = 1/t and y = N/t: two normal equations.
    xs, ys = [1 / t for _, t in points], [n / t for n, t in points]
    xx, xy, yy = _dot(xs, xs), _dot(xs, ys), _dot(ys, ys)
    x1, y1 = math.fsum(xs), math.fsum(ys)
    determinant = xx * yy - xy * xy
    a, b = (x1 * yy - y1 * xy) / determinant, (y1 * xx - x1 * xy) / determinant
    if a < 0:  # the best line with a = 0 (and below, with b = 0)
        a, b = 0.0, y1 / yy
    elif b < 0:
        a, b = x1 / xx, 0.0
    residual = math.sqrt(statistics.fmean((a * x + b * y - 1) ** 2 for x, y in zip(xs, ys, strict=True)))
    return a, b, residual


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(left, right, strict=True))
