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

_REWEIGHTED = 50
_EXACT = 1e-6  # relative errors below this count as this


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


def fit_line(points: Sequence[tuple[float, float]], *, robust: bool = False) -> tuple[float, float, float]:
    r"""Fit :math:`t = a + b N` with :math:`a, b \ge 0` to relative errors.

    Relative, so that small messages determine the latency and large ones the rate.

    Args:
        points: pairs of bytes N and seconds t, of two sizes at least; seconds above 0.
        robust: minimise the sum of the errors' absolute values instead of their squares, so that a size that was
            disturbed, or that a token bucket let pass unslowed, does not bend the line.

    Returns:
        a in seconds, b in seconds per byte, and the root mean square of the relative errors.

    Raises:
        ValueError: the points do not determine a line.
    """
    if len({n_bytes for n_bytes, _ in points}) < 2 or min(seconds for _, seconds in points) <= 0:
        raise ValueError(
            f"cannot fit a line ({len(points)} points): two sizes and times above 0 are needed. Measure more sizes."
        )
    a, b = _weighted_line(points, [1.0] * len(points))
    for _ in range(_REWEIGHTED if robust else 0):  # squares weighted by the last round's errors approach absolute ones
        a, b = _weighted_line(points, [1 / max(abs(error), _EXACT) for error in _errors(points, a, b)])
    return a, b, math.sqrt(statistics.fmean(error * error for error in _errors(points, a, b)))


def _errors(points: Sequence[tuple[float, float]], a: float, b: float) -> list[float]:
    return [(a + b * n_bytes) / seconds - 1 for n_bytes, seconds in points]


def _weighted_line(points: Sequence[tuple[float, float]], weights: Sequence[float]) -> tuple[float, float]:
    """Minimise the weighted sum of ``((a + b N) / t - 1)^2`` over ``a, b >= 0``: two normal equations."""
    xs, ys = [1 / t for _, t in points], [n / t for n, t in points]
    wx, wy = ([w * value for w, value in zip(weights, values, strict=True)] for values in (xs, ys))
    xx, xy, yy = _dot(wx, xs), _dot(wx, ys), _dot(wy, ys)
    x1, y1 = math.fsum(wx), math.fsum(wy)
    determinant = xx * yy - xy * xy
    if determinant > 0:
        a, b = (x1 * yy - y1 * xy) / determinant, (y1 * xx - x1 * xy) / determinant
        if a >= 0 and b >= 0:
            return a, b
        if b < 0:
            return x1 / xx, 0.0
    return 0.0, y1 / yy  # the best line through the origin


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(left, right, strict=True))
