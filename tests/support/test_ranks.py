"""The helper that all multi-rank tests stand on must itself be able to fail."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import gone
from tests.support.ranks import RankError, StartMethod, rank_outcomes, run_ranks

pytestmark = pytest.mark.distributed


def _sum(rank: int, world_size: int, scale: float) -> torch.Tensor:
    x = torch.full((2,), float(rank + 1)) * scale
    dist.all_reduce(x)
    return x


def _facts(rank: int, world_size: int) -> tuple[int, int, int, str, int]:
    return os.getpid(), torch.get_num_threads(), dist.get_world_size(), os.environ["RANK"], hash("a string")


def _mutate(rank: int, world_size: int, x: torch.Tensor) -> torch.Tensor:
    x += rank + 1
    dist.barrier()
    return x


def _one_fails(rank: int, world_size: int) -> None:
    print(f"a last word from {rank}", flush=True)
    if rank == 1:
        raise ValueError("only rank 1 knows this")
    dist.barrier()


def _one_hangs(rank: int, world_size: int) -> None:
    if rank == 1:
        _a_telling_name()


def _a_telling_name() -> None:
    time.sleep(600)


def _one_is_killed(rank: int, world_size: int) -> str:
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return "unreachable"


def _starts_a_child_and_fails(rank: int, world_size: int, folder: str) -> None:
    child = subprocess.Popen(["sleep", "600"])
    Path(folder, f"pid{rank}").write_text(str(child.pid))
    dist.barrier()
    raise ValueError("leaves a child behind")


def _writes_pid_and_hangs(rank: int, world_size: int, folder: str) -> None:
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    time.sleep(600)


def _not_picklable(rank: int, world_size: int) -> object:
    return lambda: None


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_ranks_are_distinct_processes_that_really_communicate(start_method: StartMethod) -> None:
    sums = run_ranks(_sum, 2, 2.0, start_method=start_method)
    assert [s.tolist() for s in sums] == [[6.0, 6.0]] * 2


def test_each_rank_is_a_process_with_one_thread_and_a_launchers_environment() -> None:
    facts = run_ranks(_facts, 3)
    assert len({pid for pid, *_ in facts} | {os.getpid()}) == 4
    assert [rest[:3] for _, *rest in facts] == [[1, 3, "0"], [1, 3, "1"], [1, 3, "2"]]


def test_spawned_ranks_have_string_hashes_of_their_own() -> None:
    hashes = {facts[-1] for facts in run_ranks(_facts, 3, start_method="spawn")}
    assert len(hashes) == 3


def test_arguments_are_copied_not_shared_between_ranks() -> None:
    x = torch.zeros(1)
    assert [y.item() for y in run_ranks(_mutate, 2, x)] == [1.0, 2.0]
    assert x.item() == 0.0


def test_a_rank_that_raises_fails_the_test_with_its_traceback_and_output() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match="only rank 1 knows this") as error:
        run_ranks(_one_fails, 3, timeout=60)
    assert "rank 1 raised" in str(error.value)
    assert "_one_fails" in str(error.value)
    assert "a last word from 1" in str(error.value)
    assert time.monotonic() - began < 30, "the other ranks must be killed, not waited for"


def test_a_hanging_rank_is_killed_at_the_timeout_and_its_stack_is_told() -> None:
    with pytest.raises(RankError, match="_a_telling_name") as error:
        run_ranks(_one_hangs, 2, timeout=3)
    assert "rank 1 did not end" in str(error.value)


def test_a_killed_rank_is_reported_and_the_others_end_with_an_error() -> None:
    survivor, victim = rank_outcomes(_one_is_killed, 2, timeout=30)
    assert (victim.status, victim.exitcode) == ("died", -signal.SIGKILL)
    assert survivor.status == "raised"
    assert survivor.seconds < 30


def test_a_killed_rank_fails_run_ranks() -> None:
    with pytest.raises(RankError, match="rank 1 died with exit code -9"):
        run_ranks(_one_is_killed, 2, timeout=30)


def test_what_a_rank_started_dies_with_it(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="leaves a child behind"):
        run_ranks(_starts_a_child_and_fails, 2, str(tmp_path))
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    assert gone(pids)


def test_a_result_that_cannot_travel_is_an_error_not_a_silence() -> None:
    with pytest.raises(RankError, match=r"[Pp]ickle"):
        run_ranks(_not_picklable, 1)


def test_a_function_that_cannot_travel_is_refused() -> None:
    with pytest.raises(TypeError, match="module level"):
        run_ranks(lambda rank, world_size: None, 1)


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_no_rank_outlives_a_killed_test_process(tmp_path: Path, start_method: StartMethod) -> None:
    main = tmp_path / "main.py"
    main.write_text(
        "from tests.support.ranks import run_ranks\n"
        "from tests.support.test_ranks import _writes_pid_and_hangs\n"
        "if __name__ == '__main__':\n"
        f"    run_ranks(_writes_pid_and_hangs, 2, {str(tmp_path)!r}, start_method={start_method!r})\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, str(main)], env={**os.environ, "PYTHONPATH": str(root)})
    try:
        until = time.monotonic() + 60
        files = [tmp_path / f"pid{rank}" for rank in range(2)]
        while not all(f.exists() and f.read_text() for f in files):
            assert time.monotonic() < until, "the ranks did not start"
            assert process.poll() is None, "the test process ended early"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert gone([int(f.read_text()) for f in files])
