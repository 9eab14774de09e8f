"""Sweep files over the toy, and how they are run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
RECIPE = {
    "trainer": {"accelerator": "cpu", "logger": False},
    "model": {"class_path": "tests.cli.bench.toys.Toy"},
    "data": {"class_path": "tests.cli.bench.toys.TokenData"},
}


def write_sweep(folder: Path, matrix: dict[str, Any], **more: Any) -> Path:
    """Write the toy's recipe and a sweep over it, with two timed steps a case."""
    (folder / "toy.yaml").write_text(yaml.safe_dump(RECIPE))
    sweep = {
        "recipe": "toy.yaml",
        "matrix": matrix,
        "keys": {"kind": "model.init_args.kind"},
        "window": {"warmup": 1, "clean": 2, "dissect": 1, "memory": 1},
        **more,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def _hear_ctrl_c() -> None:
    # What is started in the background by a shell ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def bench(folder: Path, *words: str, start: bool = False) -> Any:
    """Run `bench` in a folder to its end, or start it."""
    command = [sys.executable, "-m", "lightning_efficient", "bench", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if start:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, preexec_fn=_hear_ctrl_c
        )
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)


def runs(folder: Path) -> list[str]:
    """What ran so far: process and kind of each."""
    path = folder / "runs.txt"
    return path.read_text().splitlines() if path.exists() else []


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
