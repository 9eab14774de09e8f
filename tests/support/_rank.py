"""The rank's side of `tests.support.ranks`: what happens inside the process that plays one rank."""

import ctypes
import faulthandler
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Literal

Status = Literal["returned", "raised", "died", "timeout"]

STACK_SIGNAL = signal.SIGUSR1
"""A rank that gets it writes the stacks of all its threads to its file `stacks<rank>`."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a rank needs to know, sent as plain bytes so that no tensor is shared between ranks."""

    rank: int
    world_size: int
    payload: bytes
    folder: str
    timeout: float
    group: bool
    netns: str | None
    cwd: str
    env: dict[str, str]
    parent_pid: int


def rank_main(job: Job, pipe: Connection, stay: bool) -> None:
    _die_with_parent(job.parent_pid)
    os.setpgid(0, 0)
    stacks = open(f"{job.folder}/stacks{job.rank}", "w")  # noqa: SIM115  (open as long as the process lives)
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
    _redirect_output(f"{job.folder}/output{job.rank}")
    status, body = _call(job)
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(pickle.dumps((status, body)))
    if status == "returned" or stay:
        # Others may still be reading what this rank sent: closing its connections now could cut them off.
        try:
            pipe.recv_bytes()
        except EOFError:
            os._exit(1)
    _leave_group()
    sys.exit(0 if status == "returned" else 1)


def _call(job: Job) -> tuple[Status, Any]:
    try:
        if job.netns is not None:
            _enter_netns(job.netns)
        _prepare_environment(job)
        if job.group:
            _join_group(job)
        fn, args = pickle.loads(job.payload)
        value = fn(job.rank, job.world_size, *args)
        return "returned", pickle.dumps(value)
    except BaseException:
        return "raised", traceback.format_exc()


def _die_with_parent(test_process: int) -> None:
    """Ask the kernel to kill this process when its parent dies.

    The parent is the test process (spawn), or the fork server. That leaves once nobody holds the write end of its
    "alive" pipe; multiprocessing hands every rank a copy, so that it too may start processes, and it must go.
    """
    server: Any = multiprocessing.forkserver._forkserver
    if (alive := getattr(server, "_forkserver_alive_fd", None)) is not None:
        os.close(alive)
        server._forkserver_alive_fd = None
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    try:
        os.kill(test_process, 0)
    except ProcessLookupError:
        os._exit(1)  # it died before we asked
    if os.getppid() == 1 != test_process:
        os._exit(1)


def _redirect_output(path: str) -> None:
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(target, descriptor)
    os.close(target)


def _enter_netns(name: str) -> None:
    """Move this thread, and so every thread it will start, into a named network namespace."""
    clone_newnet = 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if libc.setns(descriptor, clone_newnet) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {name}")
    finally:
        os.close(descriptor)


def _prepare_environment(job: Job) -> None:
    os.chdir(job.cwd)
    # The fork server's environment is of when it started; the test may have changed its own since.
    for name in set(os.environ) - set(job.env):
        del os.environ[name]
    os.environ.update(job.env)
    import torch

    torch.set_num_threads(1)


def _join_group(job: Job) -> None:
    import torch.distributed as dist

    # A file needs no port, so two runs cannot race for one, and network namespaces share it.
    store = dist.FileStore(  # type: ignore[attr-defined]
        f"{job.folder}/rendezvous", job.world_size
    )
    limit = timedelta(seconds=job.timeout)
    dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.world_size, timeout=limit)


def _leave_group() -> None:
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
