"""Real sweeps over real processes."""

import csv
import io
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_efficient.cli.bench import main, runner
from lightning_efficient.cli.bench.store import read_results
from lightning_efficient.cli.errors import UserError
from tests.cli.bench.toy_sweeps import ROOT, is_alive, runs, start_bench, write_sweep


def until(what: str, condition: object, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def toys_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def clock_that_leaps(file: Path) -> SimpleNamespace:
    """Stands in for `time`: the hours in which a case hangs are over as soon as it has written the file."""
    return SimpleNamespace(sleep=time.sleep, monotonic=lambda: time.monotonic() + 3600 * file.exists())


@pytest.mark.slow
def test_a_sweep_goes_on_whatever_becomes_of_a_case(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "time", clock_that_leaps(workplace / "hanging.txt"))
    write_sweep(workplace, {"kind": ["hang", "nan", "crash", "ok"]}, limits={"timeout_s": 120})
    assert main(["-c", "sweep.yaml", "--out", "out"]) == 1
    results = {str(each.axes["kind"]): each for each in read_results(workplace / "out/results.jsonl")}
    assert {kind: each.status for kind, each in results.items()} == {
        "hang": "timeout", "nan": "diverged", "crash": "failed", "ok": "ok",
    }, capsys.readouterr()  # fmt: skip
    assert results["crash"].reason == "RuntimeError: the toy fell off the table"
    assert "120 s (limits.timeout_s)" in results["hang"].reason
    assert results["nan"].report is None  # the speed of a NaN run is not reported
    assert results["ok"].report is not None
    assert results["ok"].report.throughput.step_s.count == 2
    # The time ran out for the whole process group, children of the case included.
    assert [is_alive(int(pid)) for pid in (workplace / "hanging.txt").read_text().split()] == [False, False]
    rows = list(csv.DictReader(io.StringIO((workplace / "out/results.csv").read_text())))
    assert all(row["why"] or row["speed_tokens/s"] for row in rows)
    for name in ("report.md", "report.html", "report.json"):
        assert "the toy fell off the table" in (workplace / "out" / name).read_text()


@pytest.mark.slow
def test_auto_doubles_until_memory_ends_and_no_further(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(
        workplace,
        {"micro_batch": "auto"},
        limits={"timeout_s": 120, "memory_gib": 3, "max_micro_batch": 8},
        overrides=["--model.init_args.mib_per_row=1600"],
    )
    assert main(["-c", "sweep.yaml", "--out", "out"]) == 0
    results = read_results(workplace / "out/results.jsonl")
    assert [(each.axes["micro_batch"], each.status) for each in results] == [
        (1, "ok"), (2, "oom"), (4, "skipped"), (8, "skipped"),
    ]  # fmt: skip
    assert "limits.memory_gib is 3" in results[1].reason
    assert results[2].reason == "micro_batch 2 ran out of memory: larger ones are not tried."
    assert "Largest batch: 1." in capsys.readouterr().out
    assert len(runs(workplace)) == 2
    # What ran out of memory runs again when that is asked for, and what ran well does not.
    assert main(["-c", "sweep.yaml", "--out", "out", "--retry", "failed"]) == 0
    assert len(runs(workplace)) == 2
    assert main(["-c", "sweep.yaml", "--out", "out", "--retry", "oom"]) == 0
    assert len(runs(workplace)) == 3


@pytest.mark.slow
@pytest.mark.distributed
def test_a_case_is_no_rank_of_the_job_that_the_sweep_runs_in(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside_slurm = {"JOB_ID": 1, "NTASKS": 1, "JOB_NAME": "sweep", "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NNODES": 1}
    for name, value in {**inside_slurm, "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    write_sweep(workplace, {"world": [2]})
    assert main(["-c", "sweep.yaml", "--out", "out"]) == 0
    (result,) = read_results(workplace / "out/results.jsonl")
    assert result.report is not None
    assert result.report.machine.world_size == 2


@pytest.mark.slow
def test_a_case_on_fewer_processes_than_asked_for_failed(workplace: Path) -> None:
    write_sweep(workplace, {"world": [2]}, keys={"world": "trainer.max_steps"})
    assert main(["-c", "sweep.yaml", "--out", "out"]) == 1
    (result,) = read_results(workplace / "out/results.jsonl")
    assert (result.status, result.report) == ("failed", None)
    assert "It ran on 1 of 2 processes" in result.reason


def test_a_folder_that_cannot_be_written_is_found_before_anything_runs(workplace: Path) -> None:
    (workplace / "taken").touch()
    write_sweep(workplace, {"kind": ["ok"]})
    with pytest.raises(UserError, match="--out taken: the folder cannot be made"):
        main(["-c", "sweep.yaml", "--out", "taken"])
    assert runs(workplace) == []


@pytest.mark.slow
def test_a_killed_sweep_leaves_nothing_behind_and_goes_on_where_it_was(workplace: Path) -> None:
    write_sweep(workplace, {"kind": ["ok", "slow"]}, limits={"timeout_s": 120})
    sweep = start_bench(workplace, "-c", "sweep.yaml", "--out", "out")
    until("the second case", lambda: len(runs(workplace)) == 2)
    case = int(runs(workplace)[1].split()[0])
    assert is_alive(case)
    sweep.kill()
    sweep.join(timeout=10)
    until("the end of its case", lambda: not is_alive(case), 10)
    with (workplace / "out/results.jsonl").open("a") as file:
        file.write('{"case_id": "none/wor')  # as if it had been killed while it wrote
    (workplace / "go.txt").touch()
    with pytest.warns(UserWarning, match="half a line"):
        assert main(["-c", "sweep.yaml", "--out", "out"]) == 0
    assert [line.split()[1] for line in runs(workplace)] == ["ok", "slow", "slow"]
    assert {each.status for each in read_results(workplace / "out/results.jsonl")} == {"ok"}


@pytest.mark.slow
def test_ctrl_c_ends_the_case_and_the_next_run_tries_it_again(workplace: Path) -> None:
    write_sweep(workplace, {"kind": ["slow"]}, limits={"timeout_s": 120})
    sweep = start_bench(workplace, "-c", "sweep.yaml", "--out", "out")
    until("the case", lambda: len(runs(workplace)) == 1)
    case = int(runs(workplace)[0].split()[0])
    assert sweep.pid is not None
    os.kill(sweep.pid, signal.SIGINT)
    sweep.join(timeout=20)
    assert sweep.exitcode == 130
    assert not is_alive(case)
    assert read_results(workplace / "out/results.jsonl") == []


def test_list_runs_nothing_and_says_what_would_be_skipped(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(workplace, {"technique": ["none", "ACP"], "world": [1, 2]})
    assert main(["-c", "sweep.yaml", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["none/world1", "run"], ["none/world2", "run"], ["ACP/world1", "skip:"], ["ACP/world2", "run"],
    ]  # fmt: skip
    assert lines[-1] == "6 cases: 5 to run, 1 to skip."
    assert not (workplace / "bench_out").exists()


def test_strict_refuses_to_skip_for_want_of_a_gpu(workplace: Path) -> None:
    write_sweep(workplace, {"technique": ["none", "QL"]}, overrides=["--trainer.accelerator=cpu"])
    with pytest.raises(UserError, match=r"--strict: 1 of 3 cases need CUDA, such as QL/world1"):
        main(["-c", "sweep.yaml", "--strict"])


def test_another_sweep_in_the_folder_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuda = {"overrides": ["--trainer.accelerator=cpu"], "rules": {"needs_cuda": ["none", "QL"]}}
    write_sweep(workplace, {"technique": ["QL"]}, **cuda)
    assert main(["-c", "sweep.yaml", "--out", "out"]) == 0
    assert "QL needs CUDA" in capsys.readouterr().out
    write_sweep(workplace, {"technique": ["none"]}, **cuda)
    with pytest.raises(UserError, match="results of another sweep"):
        main(["-c", "sweep.yaml", "--out", "out"])
    assert main(["-c", "sweep.yaml", "--out", "out", "--fresh"]) == 0
    assert len(read_results(workplace / "out/results.old.jsonl")) == 1


def test_report_writes_the_files_again(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(workplace, {"technique": ["QL"]}, overrides=["--trainer.accelerator=cpu"])
    assert main(["-c", "sweep.yaml", "--out", "out"]) == 0
    first = (workplace / "out/results.csv").read_text()
    assert main(["report", "out/results.jsonl", "--out", "again", "--formats", "csv"]) == 0
    assert (workplace / "again/results.csv").read_text() == first
    assert [path.name for path in (workplace / "again").iterdir()] == ["results.csv"]
    with pytest.raises(UserError, match="there is no file"):
        main(["report", "nothing.jsonl"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serv"], r"bench knows no 'serv'\. Did you mean 'serve'\?"),
        (["sweep.yaml"], "It takes -c SWEEP.yaml"),
        (["-c", "bench/quik"], "There is no recipe"),
    ],
)
def test_wrong_words(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "bench KIND" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["-c", "x", "--help"])
    assert "--retry" in capsys.readouterr().out
