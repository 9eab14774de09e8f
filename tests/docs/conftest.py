"""One build of the documentation for the tests of this folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.snippets import ROOT


@pytest.fixture(scope="session")
def built_docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the HTML, built with warnings as errors and every reference checked."""
    folder = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-E", "-b", "html"]
    doctrees = tmp_path_factory.mktemp("doctrees")
    done = subprocess.run(
        [*command, "-d", str(doctrees), str(ROOT / "docs"), str(folder)], capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    return folder
