from pathlib import Path

import pytest

from lightning_efficient.cli.bench.runner import _verdict, last_error


@pytest.mark.parametrize(
    ("code", "log", "status", "reason"),
    [
        (0, "", "ok", ""),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.", "oom", "Tried to allocate 2 GiB"),
        (1, "x\n[rank1]: torch.OutOfMemoryError: CUDA out of memory.", "oom", "Out of memory: torch.OutOfMemoryError"),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "oom", "can't allocate"),
        (1, "MemoryError", "oom", "MemoryError"),
        (-6, "terminate called after throwing an instance of 'std::bad_alloc'", "oom", "std::bad_alloc"),
        (-9, "training", "oom", "Killed by signal 9"),
        (137, "training", "oom", "Killed by signal 9"),
        (-11, "Fatal Python error", "failed", "Ended by SIGSEGV: Fatal Python error"),
        (2, "Seed set\nerror: there is no recipe.\nbye", "failed", "there is no recipe."),
        (1, "Traceback\n  File x\nmy.own.StrangeError: odd\n", "failed", "my.own.StrangeError: odd"),
        (3, "no error at all", "failed", "exit code 3, last line: no error at all"),
    ],
)
def test_how_a_case_ended(tmp_path: Path, code: int, log: str, status: str, reason: str) -> None:
    path = tmp_path / "log.txt"
    path.write_text(log)
    found, why = _verdict(code, path, None)
    assert found == status
    assert reason in why
    assert "\n" not in why


def test_a_rank_that_the_kernel_killed_ended_for_memory(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("RuntimeError: [rank0] Connection closed by peer")
    assert _verdict(1, path, None)[0] == "failed"
    found, why = _verdict(1, path, None, killed_for_memory=True)
    assert found == "oom"
    assert "The kernel killed a process" in why


def test_the_last_error_of_a_log_is_without_its_rank() -> None:
    log = [
        "[rank0]: ValueError: first",
        "  ValueError: quoted in code",
        "[rank: 1] Seed set to 0",
        "[rank1]: KeyError: 'x'",
    ]
    assert last_error(log) == "KeyError: 'x'"
    assert last_error(["all is well"]) == ""
