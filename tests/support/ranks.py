"""Run a function on several real ranks: one process each, joined by gloo, with a hard timeout and no orphans.

Ranks are forked from a server process that imported torch, lightning, pytest and this package once, because importing
them anew costs seconds per rank and there are hundreds of multi-rank tests. The server has one thread and has run no
operator, so the fork is safe. `start_method="spawn"` gives each rank a fresh interpreter instead, with a string hash
seed of its own: use it where code may depend on Python's `hash()`.

    def claim(rank, world_size, scale):
        x = torch.full((2,), float(rank)) * scale
        dist.all_reduce(x)
        return x

    def test_sum():
        assert run_ranks(claim, 2, 3.0)[0].tolist() == [3.0, 3.0]
"""

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from tests.support._rank import STACK_SIGNAL, Job, Status, rank_main

Env = Mapping[str, str] | Sequence[Mapping[str, str]] | None
StartMethod = Literal["forkserver", "spawn"]

_PRELOAD = [
    *("torch", "torch.distributed", "torch.nn.parallel", "lightning.pytorch", "lightning.pytorch.cli", "pytest"),
    *(f"lightning_efficient.{part}" for part in ("callbacks", "data", "models", "strategies")),
]
_EXIT_GRACE_S = 10.0
_OUTPUT_TAIL = 20_000


class RankError(AssertionError):
    """A rank raised, died or did not end in time. The message holds its traceback, or every rank's stack."""


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """How one rank ended.

    Attributes:
        rank: The global rank.
        status: `returned`; `raised` an exception; `died` without a word (a signal, `os._exit`); or was still running
            at the `timeout`.
        value: What the function returned, if it did.
        error: The traceback if it raised, the Python stacks of all its threads at the timeout, else "".
        exitcode: Of the process; `-N` if signal N killed it.
        seconds: From the start of all ranks until this one was done.
        output: The end of what the rank and its libraries wrote to stdout and stderr.
    """

    rank: int
    status: Status
    value: Any
    error: str
    exitcode: int | None
    seconds: float
    output: str


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    start_method: StartMethod = "forkserver",
    group: bool = True,
    netns: Sequence[str] | None = None,
    env: Env = None,
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` real ranks and return their results in rank order.

    Each rank starts with `torch.set_num_threads(1)`, a default gloo group (rendezvous over a file), and the
    environment of an external launcher (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`), so a `Trainer(devices=world_size)`
    inside `fn` takes part as that rank. A rank that is done stays connected until all are done.

    Args:
        fn: A module-level function. It, `args` and the results travel by pickle: nothing is shared between ranks.
        world_size: The number of ranks.
        *args: Further arguments for `fn`.
        timeout: Seconds for everything together; then all ranks are killed. Also the timeout of the gloo group.
        start_method: `forkserver` is fast; `spawn` gives each rank a fresh interpreter and string hash seed.
        group: Whether to initialise the default process group.
        netns: The network namespace of each rank, by name (see `tests.netlab`).
        env: Environment variables beside those of this process, for all ranks or for each.

    Raises:
        RankError: If a rank raised, died or timed out. The other ranks are killed; the first failure is told.
    """
    outcomes = _run(fn, world_size, args, timeout, start_method, group, netns, env, stop_at_failure=True)
    failures = [o for o in outcomes if o.status != "returned"]
    if failures:
        raise RankError("\n\n".join(_describe(o) for o in _worth_telling(failures)))
    return [o.value for o in outcomes]


def rank_outcomes(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    start_method: StartMethod = "forkserver",
    group: bool = True,
    netns: Sequence[str] | None = None,
    env: Env = None,
) -> list[RankOutcome]:
    """Like `run_ranks`, but let ranks fail or die and say how each one ended: for tests of faults.

    A rank that raises or dies is gone at once, as in production, and the others carry on until they end or the
    timeout kills them.
    """
    return _run(fn, world_size, args, timeout, start_method, group, netns, env, stop_at_failure=False)


def _run(
    fn: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    timeout: float,
    start_method: StartMethod,
    group: bool,
    netns: Sequence[str] | None,
    env: Env,
    *,
    stop_at_failure: bool,
) -> list[RankOutcome]:
    if world_size < 1:
        raise ValueError(f"world_size must be >= 1, got {world_size}")
    if netns is not None and len(netns) != world_size:
        raise ValueError(f"{len(netns)} namespaces for {world_size} ranks: name one for each rank.")
    payload = _pickled_call(fn, args)
    folder = tempfile.mkdtemp(prefix="ranks-")
    context = context_of(start_method)
    began = time.monotonic()
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            space = netns[rank] if netns is not None else None
            job = Job(
                rank,
                world_size,
                payload,
                folder,
                timeout,
                group,
                space,
                cwd=os.getcwd(),
                env=_environment(rank, world_size, env),
                parent_pid=os.getpid(),
            )
            ranks.append(_Rank(context, job, stay=stop_at_failure))
        _follow(ranks, began + timeout, began, stop_at_failure=stop_at_failure)
        return [r.outcome() for r in ranks]
    finally:
        # Also the way out of pytest-timeout and Ctrl-C: no rank outlives this call.
        for r in ranks:
            r.kill()
        for r in ranks:
            r.close()
        shutil.rmtree(folder, ignore_errors=True)


class _Rank:
    """The parent's end of one rank."""

    def __init__(self, context: Any, job: Job, *, stay: bool) -> None:
        self.rank = job.rank
        self.folder = Path(job.folder)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=rank_main, args=(job, theirs, stay), daemon=False)
        self.process.start()
        theirs.close()
        self.status: Status | None = None
        self.value: Any = None
        self.error = ""
        self.seconds = 0.0

    def receive(self) -> None:
        """Take the rank's report; silence and a closed pipe mean that it died."""
        try:
            status, body = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            self.status = "died"
            return
        if status == "returned":
            self.value = pickle.loads(body)
        else:
            self.error = body
        self.status = status

    def release(self) -> None:
        """Let a rank that is done leave its process group and exit."""
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(b"go")

    def ask_for_stacks(self) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, STACK_SIGNAL)

    def stacks(self) -> str:
        return _tail(self.folder / f"stacks{self.rank}", limit=4 * _OUTPUT_TAIL)

    def kill(self) -> None:
        """Kill the rank and whatever it started: it leads a process group of its own."""
        if self.process.pid is None or not self.process.is_alive():
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()

    def close(self) -> None:
        self.process.join(_EXIT_GRACE_S)
        self.pipe.close()
        if not self.process.is_alive():
            self.process.close()

    def outcome(self) -> RankOutcome:
        self.process.join(_EXIT_GRACE_S)
        return RankOutcome(
            rank=self.rank,
            status=self.status or "died",
            value=self.value,
            error=self.error,
            exitcode=self.process.exitcode,
            seconds=self.seconds,
            output=_tail(self.folder / f"output{self.rank}"),
        )


def _follow(ranks: list[_Rank], deadline: float, began: float, *, stop_at_failure: bool) -> None:
    """Wait until every rank has reported, one has failed, or the time is over; then see them out."""
    waiting = {r.pipe: r for r in ranks}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            _time_out(list(waiting.values()), began)
            for r in ranks:
                r.release()
            return
        _collect(ready, waiting, began)
        if stop_at_failure and any(r.status in ("raised", "died") for r in ranks):
            # The first to report may be the victim of a rank that died: let the culprit's news arrive.
            _collect(wait(list(waiting), timeout=0.2), waiting, began)
            for r in ranks:
                r.kill()
            for r in waiting.values():
                r.status, r.error = "timeout", ""
            return
    for r in ranks:
        r.release()
    for r in ranks:
        # A rank that returned but cannot exit (a stuck thread, a held collective) is a failure too.
        r.process.join(max(0.0, min(_EXIT_GRACE_S, deadline - time.monotonic())))
    stuck = [r for r in ranks if r.process.is_alive()]
    if stuck:
        _time_out(stuck, began)
        for r in stuck:
            r.error = f"The function ended ({r.status}), but the process did not exit.\n{r.error}"


def _collect(ready: list[Any], waiting: dict[Any, _Rank], began: float) -> None:
    for pipe in ready:
        r = waiting.pop(pipe)
        r.receive()
        r.seconds = time.monotonic() - began


def _time_out(late: list[_Rank], began: float) -> None:
    for r in late:
        r.ask_for_stacks()
    time.sleep(0.5)  # faulthandler writes in the signal handler of the rank: give it time to run
    for r in late:
        r.kill()
        r.status, r.error, r.seconds = "timeout", r.stacks(), time.monotonic() - began


def _worth_telling(failures: list[RankOutcome]) -> list[RankOutcome]:
    """Leave out ranks that were killed only because another one had failed; the likely culprit comes first."""
    told = [o for o in failures if o.status in ("raised", "died")]
    told.sort(key=lambda o: (o.status != "died", o.seconds))
    return told or [o for o in failures if o.error] or failures


def _describe(outcome: RankOutcome) -> str:
    what = {
        "raised": f"raised after {outcome.seconds:.1f} s:\n{outcome.error}",
        "died": f"died with exit code {outcome.exitcode} after {outcome.seconds:.1f} s, without an exception.",
        "timeout": f"did not end within {outcome.seconds:.1f} s and was killed. Its stacks:\n{outcome.error}",
        "returned": "returned.",
    }[outcome.status]
    output = f"\nIts output ended with:\n{outcome.output}" if outcome.output.strip() else ""
    return f"rank {outcome.rank} {what}{output}"


def _pickled_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    if "<" in getattr(fn, "__qualname__", "<"):
        raise TypeError(f"{fn!r} cannot be sent to a rank: it is not importable. Use a function at module level.")
    # Plain pickle copies tensors; multiprocessing's own pickler would share their memory between the ranks.
    return pickle.dumps((fn, args))


def _environment(rank: int, world_size: int, env: Env) -> dict[str, str]:
    """This process's environment, an external launcher's on one machine, and the caller's wishes, in rising order."""
    launcher = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_FR_BUFFER_SIZE": "50000",  # what `count_collectives` reads
    }
    wishes = env or {}
    return {**os.environ, **launcher, **(wishes if isinstance(wishes, Mapping) else wishes[rank])}


def context_of(start_method: StartMethod) -> Any:
    """The multiprocessing context whose processes start as ranks do."""
    context = multiprocessing.get_context(start_method)
    if isinstance(context, multiprocessing.context.ForkServerContext):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # OpenMP reads it when the server loads torch
        context.set_forkserver_preload(_PRELOAD)
    return context


def _tail(path: Path, limit: int = _OUTPUT_TAIL) -> str:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    return text if len(text) <= limit else "[...] " + text[-limit:]
