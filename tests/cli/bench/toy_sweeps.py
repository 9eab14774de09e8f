"""Sweep files over the toy, and how they are run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from lightning_efficient.cli import main
from tests.support.ranks import context_of

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


def start_bench(folder: Path, *words: str) -> BaseProcess:
    """Start `bench` in a folder, in a process that ignores nobody."""
    process: BaseProcess = context_of("forkserver").Process(target=_bench, args=(folder, words), daemon=True)
    process.start()
    return process


def _bench(folder: Path, words: Sequence[str]) -> None:
    # What is started in the background by a shell ignores Ctrl-C, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    os.chdir(folder)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.exit(main(["bench", *words]))


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
