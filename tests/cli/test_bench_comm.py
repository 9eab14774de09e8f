"""`bench comm`: real processes on this machine, its files, and wrong values."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lightning_efficient.cli.bench.comm import main, parse_sizes
from lightning_efficient.cli.errors import UserError
from lightning_efficient.dissect import CommReport, read_json


def run(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "lightning_efficient", "bench", "comm", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=env)


@pytest.mark.distributed
def test_it_measures_two_processes_and_writes_what_it_prints(tmp_path: Path) -> None:
    done = run(
        "--sizes", "1KiB,64KiB", "--ops", "all_reduce", "broadcast", "--out", "here", "--json", "x.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "gloo over 2 processes" in done.stdout
    report = read_json(CommReport, tmp_path / "x.json")
    assert report == read_json(CommReport, tmp_path / "here" / "comm.json")
    assert [(each.op, each.n_bytes) for each in report.points] == [
        ("all_reduce", 1024), ("all_reduce", 65_536), ("broadcast", 1024), ("broadcast", 65_536),
    ]  # fmt: skip
    assert set(report.fits) == {"all_reduce", "broadcast"}
    assert report.fits["broadcast"].predict(65_536) > 0
    page = (tmp_path / "here" / "comm.html").read_text()
    assert page.count("<svg") == page.count(">fitted<") == 2  # one for each collective
    assert r"| all\_reduce |" in (tmp_path / "here" / "comm.md").read_text()


@pytest.mark.distributed
def test_it_joins_what_torchrun_started(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m",
        "lightning_efficient", "bench", "comm", "--sizes", "1KiB,4KiB", "--ops", "all_reduce", "--json", "x.json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "x.json").read_text())["world_size"] == 2
    assert done.stdout.count("gloo over 2 processes") == 1


def test_sizes_are_read_as_written() -> None:
    assert parse_sizes("1KiB..64KiB") == (1024, 4096, 16_384, 65_536)
    assert parse_sizes("1kb,2MiB,7") == (1000, 2 * 2**20, 7)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--world-size", "1"], "2 or more are needed"),
        (["--sizes", "1Kib..1B"], "the first is larger than the last"),
        (["--sizes", "much"], "bad size 'much'"),
        (["--sizes", "0"], "bad size '0'"),
        (["--repeats", "0"], "--repeats 0"),
        (["--timeout", "0"], "--timeout 0"),
        (["--budget", "long"], "--budget long"),
        (["--backend", "nccl", "--world-size", "99"], "99 processes on this machine need a CUDA device each"),
    ],
)
def test_wrong_values_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        main(words)


def test_a_world_size_that_torchrun_has_settled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun has started 3 processes"):
        main(["--world-size", "5"])


@pytest.mark.distributed
@pytest.mark.slow
def test_a_process_that_stops_ends_the_command_with_the_reason(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "lightning_efficient", "bench", "comm", "--sizes", "1MiB,2MiB", "--repeats", "1000000",
        "--timeout", "3s", "--json", "x.json",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        ranks = _connected(psutil.Process(process.pid))
        try:
            ranks[1].suspend()
            # The collective's timeout, the grace period of five seconds, and some for a loaded machine.
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()
    assert process.returncode == 1
    assert "a rank is gone or the network is stuck" in said
    assert not (tmp_path / "x.json").exists()


def _connected(command: psutil.Process) -> list[psutil.Process]:
    """The two ranks of a command, once they talk to each other."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        ranks = [each for each in command.children() if any("spawn_main" in word for word in each.cmdline())]
        if len(ranks) == 2 and all(each.net_connections(kind="tcp") for each in ranks):
            time.sleep(1.0)  # from the first connection to the first collective
            return ranks
        time.sleep(0.1)
    raise AssertionError("the ranks never connected")


def test_an_unknown_collective_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--ops", "allreduce"])
    assert stopped.value.code == 2
    assert "'allreduce' is not one of all_reduce" in capsys.readouterr().err
