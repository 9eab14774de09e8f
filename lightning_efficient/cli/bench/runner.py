"""Runs one case in a process group of its own, and says how it ended."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lightning_efficient.cli.bench.cases import Case
from lightning_efficient.cli.bench.sweep import Sweep
from lightning_efficient.dissect.result import CaseResult, DissectReport, Status, read_json

LOG, REPORT = "log.txt", "case.json"
_POLL_S = 0.05
_GRACE_S = 3.0
_GIB = 2**30
# What torch, CUDA, Python and C++ say when memory ends.
_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|can't allocate memory|Cannot allocate memory|MemoryError|std::bad_alloc"
    r"|not enough memory"
)
_ERROR_LINE = re.compile(
    r"^(?:\[rank ?\d+\]:? ?)?(?:error: .+|(?:[A-Za-z_]+\.)*[A-Z]\w*(?:Error|Exception|Interrupt)\b.*)$"
)
_RANK = re.compile(r"^\[rank ?\d+\]:? ?")
# By these a case would take itself for a rank of the job that the sweep runs in.
_LAUNCHED = re.compile(
    r"(LOCAL_|GROUP_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|(TORCHELASTIC|SLURM|LSB|OMPI|PMI)_\w+"
)


def run_case(case: Case, sweep: Sweep, folder: Path, *, tick: Callable[[], None] = lambda: None) -> CaseResult:
    """Run one case until it ends, or its time does; then nothing of it runs any more.

    Args:
        case: the case.
        sweep: for its window and limits.
        folder: for its log and its report; emptied first.
        tick: called twenty times a second while it runs.

    Returns:
        Its result, whatever happened.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    status, reason = _run(case_command(case, sweep, folder), sweep, folder / LOG, tick)
    result = CaseResult(case.case_id, dict(case.axes), status, reason, wall_s=round(time.monotonic() - start, 3))
    if status != "ok":
        return result
    if not (folder / REPORT).is_file():
        return replace(result, status="failed", reason=f"It ended without a report: see {folder / LOG}.")
    report = read_json(DissectReport, folder / REPORT)
    if report.loss is not None and not math.isfinite(report.loss):
        return replace(result, status="diverged", reason=f"The loss became {report.loss}: its speed means nothing.")
    ranks, wanted = report.machine.world_size, int(case.axes["world"])
    if ranks < wanted:
        return replace(
            result,
            status="failed",
            reason=f"It ran on {ranks} of {wanted} processes: see {folder / LOG} for the reason.",
        )
    return replace(result, report=report)


def case_command(case: Case, sweep: Sweep, folder: Path) -> list[str]:
    """Return the command of a case."""
    window = sweep.window
    return [
        *(sys.executable, "-m", "lightning_efficient", "dissect"),
        *(word for recipe in case.recipes for word in ("-c", str(recipe))),
        *("--warmup", str(window.warmup), "--clean", str(window.clean)),
        *("--dissect", str(window.dissect), "--memory", str(window.memory)),
        *("--json", str(folder / REPORT), "--out", str(folder), "--quiet"),
        *case.words,
    ]


def last_error(lines: Iterable[str]) -> str:
    """Return the last line of a log that names an error, without its rank; empty if there is none."""
    errors = [line.strip() for line in lines if _ERROR_LINE.match(line.strip())]
    return _RANK.sub("", errors[-1]).removeprefix("error: ") if errors else ""


def _run(command: list[str], sweep: Sweep, log: Path, tick: Callable[[], None]) -> tuple[Status, str]:
    limits = sweep.limits
    n_bytes = int((limits.memory_gib or 0) * _GIB)
    guard = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_guard.py")), str(os.getpid()), str(n_bytes)]
    environment = {key: value for key, value in os.environ.items() if not _LAUNCHED.fullmatch(key)}
    environment["PYTHONUNBUFFERED"] = "1"
    if limits.threads is not None:
        environment["OMP_NUM_THREADS"] = str(limits.threads)
    killed_before = _killed_for_memory()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*guard, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        in_time = _wait(process, limits.timeout_s, tick)
        if not in_time:
            _signal(process, signal.SIGTERM)
            _wait(process, _GRACE_S, tick)
    finally:
        # The leader is not collected yet, so its number is still the group's, and no one else's.
        _signal(process, signal.SIGKILL)
        process.wait()
    if not in_time:
        return "timeout", f"It had not ended after {limits.timeout_s:g} s (limits.timeout_s)."
    return _verdict(process.returncode, log, limits.memory_gib, killed_for_memory=_killed_for_memory() > killed_before)


def _wait(process: subprocess.Popen[bytes], seconds: float, tick: Callable[[], None]) -> bool:
    """Wait without collecting the process; return whether it has ended."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        tick()
        time.sleep(_POLL_S)
    return True


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _killed_for_memory() -> int:
    """How many processes of this machine the kernel has killed because memory ended; 0 where it does not say."""
    try:
        counters = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in counters if line.startswith("oom_kill ")), 0)


def _verdict(code: int, log: Path, memory_gib: float | None, *, killed_for_memory: bool = False) -> tuple[Status, str]:
    if code == 0:
        return "ok", ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    error = last_error(lines)
    limit = f" (limits.memory_gib is {memory_gib:g})" if memory_gib else ""
    if out_of := next((line.strip() for line in lines if _OUT_OF_MEMORY.search(line)), ""):
        return "oom", f"Out of memory{limit}: {_one_sentence(_RANK.sub('', out_of))}"
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "oom", f"Killed by signal 9, as the kernel does when memory ends{limit}."
    if killed_for_memory:  # another rank than the first: its death is a broken connection to the others
        return "oom", f"The kernel killed a process while it ran, because memory ended{limit}."
    if code < 0:
        return (
            "failed",
            f"Ended by {signal.Signals(-code).name}: {_one_sentence(error or (lines or ['no output'])[-1])}",
        )
    return "failed", _one_sentence(error or f"exit code {code}, last line: {(lines or ['none'])[-1]}")


def _one_sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:299]}\u2026"
