"""How long a step takes, where a device may still be at work when the call returns."""

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one step, the device included."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begun = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begun)
