"""`parm plan`: real processes on this machine, what it prints and writes, and wrong values."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_efficient.cli import parm
from lightning_efficient.cli.errors import UserError
from lightning_efficient.cli.main import main as command_line
from lightning_efficient.cli.parm import main
from lightning_efficient.moe import schedule_named
from lightning_efficient.moe.planning import Plan

SMALL = ["--tokens", "64", "--dim", "32", "--hidden", "64", "--trials", "1"]


def run(*command: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *command, "plan", *SMALL], capture_output=True, text=True, timeout=170, cwd=cwd, env=env
    )


@pytest.mark.distributed
@pytest.mark.slow
def test_it_measures_and_writes_what_it_prints(tmp_path: Path) -> None:
    done = run("-m", "lightning_efficient", "parm", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Two processes, over which the experts are spread, as ParmStrategy would.
    assert "for 64 tokens: " in done.stdout
    assert "all-to-all" in done.stdout
    assert "expert_parallel_size: 2" in done.stdout


@pytest.mark.distributed
@pytest.mark.slow
def test_it_joins_what_torchrun_started(tmp_path: Path) -> None:
    words = ["--expert_parallel_size", "2", "--json", "plan.json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m",
        "lightning_efficient", "parm", "plan", *SMALL, *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "plan.json").read_text())
    plan = Plan.from_dict(written["plan"])
    (choice,) = plan.choices.values()
    assert plan.links is not None
    assert {axis for _, axis in plan.links.fits} == {"block", "ep"}
    assert choice.schedule == schedule_named(written["schedule"]).with_chunks(written["chunks"])
    assert done.stdout.count(written["reason"]) == 1  # one rank speaks
    assert "all-to-all" in done.stdout
    assert f"> │ {choice.schedule.label}" in done.stdout  # marked in the table
    settings = yaml.safe_load(written["yaml"])["trainer"]["strategy"]["init_args"]
    assert settings["expert_parallel_size"] == 2
    assert settings["schedule"] == written["schedule"]
    assert written["yaml"] in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices", "1"], "--devices 1: one process has nobody"),
        (["--devices", "4", "--expert_parallel_size", "3"], "does not divide the 4 ranks"),
        (["--devices", "4", "--expert_parallel_size", "4", "--num_experts", "6"], "6 experts, not divisible"),
        (["--expert_sharding_size", "2", "--hidden", "7"], "hidden size 7, not divisible"),
        (["--model_parallel_size", "0"], "model_parallel_size is 0"),
        (["--tokens", "0"], "tokens is 0"),
        (["--min_capacity", "0"], "min_capacity is 0"),
        (["--expert_parallel_size", "some"], "--expert_parallel_size some: it is a number of ranks, or auto"),
        (["--top_k", "9"], "top_k is 9 of 8 experts"),
        (["--capacity_factor", "-1"], "--capacity_factor -1"),
        (["--capacity_factor", "much"], "--capacity_factor much"),
        (["--trials", "-1"], "--trials -1"),
        (["--chunks", "0"], "--chunks 0"),
        (["--timeout", "0"], "--timeout 0"),
        (["--backend", "nccl", "--devices", "64"], "64 processes on this machine need a CUDA device each"),
    ],
)
def test_wrong_values_are_refused_before_anything_starts(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        main(["plan", *words])


def test_a_misspelt_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line(["parm", "plan", "--activation", "swigluu"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Did you mean 'swiglu'?" in said


def test_help_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line(["parm", "plan", "--help"])
    said = capsys.readouterr().out
    assert "--expert_sharding_size" in said
    assert "torchrun" in said
    assert "sequences in its micro-batch times their length" in said


@pytest.mark.parametrize(
    ("words", "size"), [([], 4), (["--expert_parallel_size", "auto"], 4), (["--expert_sharding_size", "2"], 2)]
)
def test_experts_are_spread_over_all_ranks_as_the_strategy_does(words: list[str], size: int) -> None:
    options = parm._parser().parse_args(["plan", "--devices", "4", *words])
    parm._check(options)
    assert options.expert_parallel_size == size
