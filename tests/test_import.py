"""What `import lightning_efficient` does and does not do, in fresh interpreters."""

import subprocess
import sys
import time

import pytest

import lightning_efficient


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_import_adds_nothing_heavy_registers_the_names_and_is_nearly_free() -> None:
    code = """
import sys, time
import lightning.pytorch
from lightning.pytorch.strategies import StrategyRegistry
before, start = set(sys.modules), time.perf_counter()
import lightning_efficient
seconds = time.perf_counter() - start
import torch.distributed as dist
assert not dist.is_initialized()
heavy = {"triton", "transformers", "sklearn", "matplotlib", "scipy", "flwr", "torchvision", "jsonargparse"}
assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)
for name in ("acp_sgd", "power_sgd", "top_k", "sign_sgd"):
    assert name in StrategyRegistry.available_strategies(), name
print(seconds)
"""
    start = time.perf_counter()
    run = python(code)
    total = time.perf_counter() - start

    assert run.returncode == 0, run.stderr
    # Importing lightning takes seconds. Ours may add a fifth of the whole, and measures about a twentieth.
    assert float(run.stdout) < 0.2 * total


def test_only_pytorch_lightning_in_use_is_an_error_that_says_what_to_write() -> None:
    # A stand-in module: what counts is which of the two packages the program has imported, and importing the real
    # pytorch_lightning takes seconds.
    code = "import sys, types; sys.modules['pytorch_lightning'] = types.ModuleType('pytorch_lightning')\n"

    run = python(code + "import lightning_efficient")

    assert run.returncode != 0
    assert run.stderr.strip().splitlines()[-1].startswith("ImportError: This program uses 'pytorch_lightning'")
    assert "import lightning.pytorch as pl" in run.stderr


def test_a_program_that_uses_lightning_too_is_fine() -> None:
    code = "import sys, types; sys.modules['pytorch_lightning'] = types.ModuleType('pytorch_lightning')\n"

    run = python(code + "import lightning.pytorch, lightning_efficient")

    assert run.returncode == 0, run.stderr


def test_without_lightning_the_error_names_it() -> None:
    run = python("import sys; sys.modules['lightning'] = None\nimport lightning_efficient")

    assert run.returncode != 0
    assert "'lightning'" in run.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", [name for name in lightning_efficient.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(lightning_efficient, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ACPSDG'"):
        lightning_efficient.ACPSDG  # noqa: B018
