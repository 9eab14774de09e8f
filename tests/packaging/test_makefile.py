"""The Makefile's targets exist, install once, and say clearly what a machine lacks."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("quickstart", "test", "test-all", "lint", "docs", "bench", "clean", "help")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A make that runs these tests must not pass its own flags on to the make under test.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def fake_python(folder: Path, script: str) -> str:
    path = folder / "fakepython"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_help_lists_every_target() -> None:
    listed = {line.split()[1] for line in make("help").stdout.splitlines()}
    assert set(TARGETS) <= listed


@pytest.mark.parametrize(
    ("script", "message"),
    [
        pytest.param('[ "$1" = --version ] && { echo Python 3.9.2; exit; }; exit 1', "is Python 3.9.2", id="old"),
        pytest.param('case "$*" in *ensurepip*) exit 1;; esac; exit 0', "has no venv module", id="no-venv"),
    ],
)
def test_an_unfit_python_is_refused(script: str, message: str, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    done = make("test", f"VENV={venv}", f"PYTHON={fake_python(tmp_path, script)}")
    assert done.returncode != 0
    assert message in done.stderr
    assert not venv.exists()


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    done = make("test", f"VENV={tmp_path / 'venv'}", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "no 'no-such-python' on this machine" in done.stderr


def test_installation_happens_once_and_again_when_a_pin_changes(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    for stamp in (".created", ".installed-core"):
        (venv / stamp).touch()
    assert "pip install" not in make("--dry-run", "quickstart", f"VENV={venv}").stdout
    os.utime(venv / ".installed-core", (0, 0))
    planned = make("--dry-run", "quickstart", f"VENV={venv}").stdout
    assert "pip install -c constraints.txt" in planned
    assert "-m venv" not in planned
