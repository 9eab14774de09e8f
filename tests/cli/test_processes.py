"""The console script with two ranks: it trains, and no rank outlives the others."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from lightning_efficient.cli.processes import end_processes

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [str(Path(sys.executable).with_name("lightning-efficient"))]
MODULE = [sys.executable, "-m", "lightning_efficient"]
FIT = [
    "fit",
    "--model=tests.cli.toys.ToyModel",
    "--data=tests.cli.toys.ToyData",
    "--data.num_batches=400",
    "--trainer.accelerator=cpu",
    "--trainer.devices=2",
    "--trainer.strategy=ddp",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_model_summary=false",
]

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of the command line; whatever the test does, it is gone afterwards."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    # A program started in the background ignores Ctrl-C, and so would all it starts; one with a handler passes on none.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True) as run:
        signal.signal(signal.SIGINT, ours)
        try:
            yield run
        finally:
            if run.poll() is None:
                for process in psutil.Process(run.pid).children(recursive=True):
                    process.kill()
                run.kill()


def wait_for_no_process(processes: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        process.kill()
    assert not alive, "a rank outlived the others"


def test_two_ranks_train_from_the_module_and_what_they_say_is_news(workplace: Path) -> None:
    with started([*MODULE, *FIT, "--trainer.max_steps=2"], workplace) as run:
        _, err = run.communicate(timeout=120)

    assert run.returncode == 0, err
    assert "Starting with 2 processes" in err
    assert "OptimizerGuard: 2 trainable parameters" in err
    assert "Traceback" not in err
    assert "Tip" not in err


def test_when_rank_1_dies_rank_0_fails_and_nothing_is_left(workplace: Path) -> None:
    with started([*SCRIPT, *FIT, "--model.rank_1_dies_at_step=2"], workplace) as run:
        _, err = run.communicate(timeout=120)

    assert run.returncode != 0
    assert "Connection" in err or "terminated with code 7" in err


@contextmanager
def in_training(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A run whose two ranks are in the middle of training, and the ranks that rank 0 launched."""
    with started([*SCRIPT, *FIT, "--model.step_seconds=0.2"], folder) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "training has started\n"
        ranks = psutil.Process(run.pid).children()
        assert len(ranks) == 1
        yield run, ranks


def test_ctrl_c_ends_every_rank(workplace: Path) -> None:
    with in_training(workplace) as (run, ranks):
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)

        assert run.returncode != 0
        wait_for_no_process(ranks, seconds=10)


def test_when_rank_0_is_killed_the_others_end_too(workplace: Path) -> None:
    with in_training(workplace) as (run, ranks):
        run.kill()

        wait_for_no_process(ranks, seconds=30)


def test_children_are_awaited_then_killed() -> None:
    quick = subprocess.Popen([sys.executable, "-c", "pass"])
    stuck = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    before = time.monotonic()

    end_processes([quick, stuck], grace=2.0)

    assert quick.returncode == 0
    assert stuck.returncode == -signal.SIGKILL
    assert time.monotonic() - before < 30
