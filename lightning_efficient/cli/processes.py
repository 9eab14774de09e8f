"""No orphans: the ranks that Lightning's launcher starts end with the rank that started them, and the other way round.

Lightning kills the other ranks when a child dies, and on Ctrl-C. What it leaves open: rank 0 ends by an exception, or
is killed, while another rank waits in a collective for half an hour.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import threading
import time
from collections.abc import Sequence

import lightning.pytorch as pl

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 20.0


def end_with_launcher() -> None:
    """In a rank other than 0, end this process soon after the one that started it has gone."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="end-with-launcher").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    # The launcher waits for its children (`reap_children`), so it has died: no clean-up of ours can talk to it.
    os._exit(1)


def reap_children(trainer: pl.Trainer) -> None:
    """When this process exits, wait for the ranks it launched, then end those that still run.

    Args:
        trainer: The trainer whose launcher may start processes.
    """
    atexit.register(_end_launched, trainer)


def _end_launched(trainer: pl.Trainer) -> None:
    processes = getattr(trainer.strategy.launcher, "procs", [])
    end_processes([process for process in processes if isinstance(process, subprocess.Popen)], grace=_GRACE_SECONDS)


def end_processes(processes: Sequence[subprocess.Popen[bytes]], *, grace: float) -> None:
    """Wait up to `grace` seconds for the processes together, then kill and collect the ones that are left.

    Args:
        processes: Child processes of this one.
        grace: Seconds to wait for all of them.
    """
    deadline = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
