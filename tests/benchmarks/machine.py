"""On what a figure was measured, in words."""

import os
import platform
from pathlib import Path

import torch


def describe_machine() -> str:
    """Cores, processor, kernel, and the versions that matter."""
    return (
        f"{len(os.sched_getaffinity(0))} cores of {_cpu_model()}, {platform.system()} {platform.release()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
