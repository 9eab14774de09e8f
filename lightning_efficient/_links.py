"""What every measurement of a link needs: collectives of a size, the clock, and the line through the times."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_REWEIGHTED = 50
_EXACT = 1e-6  # relative errors below this count as this
_ITEMSIZE = 4


@dataclass(frozen=True, slots=True)
class AlphaBeta:
    """A line through the times of one collective.

    Attributes:
        alpha_s: seconds that it takes however small.
        beta_s_per_byte: seconds that a byte of the message adds.
        residual: root mean square of the relative errors; 0.1 is 10 %.
    """

    alpha_s: float
    beta_s_per_byte: float
    residual: float = 0.0

    def predict(self, n_bytes: float) -> float:
        """Return the seconds of a message of ``n_bytes``."""
        return self.alpha_s + self.beta_s_per_byte * n_bytes


def collective_of(
    op: str, n_bytes: int, *, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[int, Callable[[], Any]]:
    """Make the tensors of a collective.

    Args:
        op: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all`` or ``broadcast``.
        n_bytes: of the whole message: what each rank hands in, or, for an all-gather, its result.
        group: who takes part; the default group if None.
        device: where the tensors live.

    Returns:
        The bytes, rounded up to a whole element for every rank, and what starts the collective and returns the work to
        wait for.
    """
    n = dist.get_world_size(group)
    root = 0 if group is None else dist.get_global_rank(group, 0)
    part = math.ceil(n_bytes / _ITEMSIZE / n)
    whole = torch.zeros(n * part, device=device)
    own, result = torch.zeros(part, device=device), torch.zeros(n * part, device=device)
    start: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group, async_op=True),
        "all_gather": lambda: _single(dist, "all_gather")(result, own, group=group, async_op=True),
        "reduce_scatter": lambda: _single(dist, "reduce_scatter")(own, whole, group=group, async_op=True),
        "all_to_all": lambda: dist.all_to_all_single(result, whole, group=group, async_op=True),
        "broadcast": lambda: dist.broadcast(whole, src=root, group=group, async_op=True),
    }
    return whole.nbytes, start[op]


def _single(module: Any, op: str) -> Any:
    """The collective on one tensor, by its name of today or of older releases of torch."""
    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}
    return getattr(module, f"{op}_single", None) or getattr(module, older[op])


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
