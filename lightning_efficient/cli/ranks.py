"""Commands that run on several ranks: those that torchrun started, or processes they start on this machine."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes

from lightning_efficient.cli.errors import UserError

_GRACE_S = 5.0  # for the other processes to end by themselves after one has failed


def run_on_ranks(run: Callable[[int, argparse.Namespace, str], None], options: argparse.Namespace, ranks: int) -> int:
    """Call `run(rank, options, rendezvous)` as the rank that torchrun made of this process, or in new processes.

    Args:
        run: A function of a module, so that other processes find it.
        options: Handed on.
        ranks: How many to start where torchrun has started none.

    Returns:
        The exit code: 0, or 1 when a process failed.
    """
    if _ranks_of_torchrun() is not None:
        run(int(os.environ["RANK"]), options, "env://")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options, f"file://{folder}/rendezvous")
        try:
            processes = start_processes(run, args=arguments, nprocs=ranks, join=False, start_method="spawn")
            while not processes.join(grace_period=_GRACE_S):
                pass
        except ProcessException as error:
            sys.stderr.write(f"error: a process failed: {str(error).strip().splitlines()[-1]}\n")
            return 1
    return 0


def settle_ranks(option: str, given: int | None) -> int:
    """Return how many ranks there will be: as torchrun has it, as given, or 2.

    Args:
        option: Its name, for the error.
        given: Its value.

    Raises:
        UserError: The option contradicts torchrun.
    """
    started = _ranks_of_torchrun()
    if started is not None and given not in (None, started):
        raise UserError(f"{option} {given}: torchrun has started {started} processes. Leave the option out.")
    return started or (2 if given is None else given)


def settle_backend(backend: str, ranks: int) -> str:
    """Return `nccl` or `gloo` for `auto`.

    Args:
        backend: `auto`, `nccl` or `gloo`.
        ranks: Of all machines.

    Raises:
        UserError: NCCL is asked for, and has too few devices on this machine.
    """
    # Of this machine: NCCL refuses two processes on one GPU.
    here = ranks if _ranks_of_torchrun() is None else int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    devices = torch.cuda.device_count() if dist.is_nccl_available() else 0
    if backend == "auto":
        return "nccl" if devices >= here else "gloo"
    if backend == "nccl" and devices < here:
        raise UserError(
            f"--backend nccl: {here} processes on this machine need a CUDA device each, and there are {devices}. Use "
            "--backend gloo, or fewer processes."
        )
    return backend


def _ranks_of_torchrun() -> int | None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return ranks if ranks > 1 and "RANK" in os.environ else None
