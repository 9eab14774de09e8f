"""`bench comm`: real processes on this machine, its files, and wrong values."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightning_efficient.cli import ranks
from lightning_efficient.cli.bench.comm import main, parse_sizes
from lightning_efficient.cli.errors import UserError
from lightning_efficient.dissect import CommReport, read_json
from tests.support.commands import run_command
from tests.support.ranks import rank_outcomes


@pytest.mark.distributed
def test_it_measures_two_processes_and_writes_what_it_prints(tmp_path: Path) -> None:
    words = ["--sizes", "1KiB,64KiB", "--ops", "all_reduce", "broadcast", "--out", "here", "--json", "x.json"]
    (done,) = run_command(["bench", "comm", *words], tmp_path)
    assert done.value == 0, done
    assert "gloo over 2 processes" in done.output
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


def _command_of_two_ranks(rank: int, world_size: int) -> int:
    # Forked ranks start at once; a second is enough for one to end by itself, as no time is for one that is stopped.
    start = ranks.start_processes

    def fork(*args: Any, **options: Any) -> Any:
        return start(*args, **{**options, "start_method": "fork"})

    ranks.start_processes, ranks._GRACE_S = fork, 1.0
    Path("pid").write_text(str(os.getpid()))
    return main(["--sizes", "1MiB,2MiB", "--repeats", "1000000", "--timeout", "3s", "--json", "x.json"])


@pytest.mark.distributed
def test_a_process_that_stops_ends_the_command_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor() as threads:
        ending = threads.submit(rank_outcomes, _command_of_two_ranks, 1, timeout=60, group=False)
        _connected(tmp_path / "pid")[1].suspend()
        (ended,) = ending.result()
    assert (ended.status, ended.value) == ("returned", 1)
    assert "a rank is gone or the network is stuck" in ended.output
    assert not (tmp_path / "x.json").exists()


def _connected(pid: Path) -> list[psutil.Process]:
    """The two ranks of a command, once they talk to each other."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        command = pid.read_text() if pid.exists() else ""
        found = psutil.Process(int(command)).children() if command else []
        if len(found) == 2 and all(each.net_connections(kind="tcp") for each in found):
            time.sleep(1.0)  # from the first connection to the first collective
            return found
        time.sleep(0.1)
    raise AssertionError("the ranks never connected")


def test_an_unknown_collective_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--ops", "allreduce"])
    assert stopped.value.code == 2
    assert "'allreduce' is not one of all_reduce" in capsys.readouterr().err


@pytest.mark.distributed
def test_sizes_that_round_to_one_message_have_times_and_no_line(tmp_path: Path) -> None:
    assert main(["--sizes", "1B,8B", "--ops", "all_reduce", "--repeats", "2", "--json", str(tmp_path / "it.json")]) == 0
    report = read_json(CommReport, tmp_path / "it.json")
    assert len({each.n_bytes for each in report.points}) == 1
    assert report.fits == {}
