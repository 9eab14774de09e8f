"""Settings all tests share: one thread per process, no network, and tests that need special hardware or rights."""

import os
from collections.abc import Iterator

# Before torch is imported, here and in every process the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # lightning 2.6.6 calls a name that jsonargparse renamed

import pytest
import torch

from tests.netlab import why_unavailable


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test puts into the environment (Lightning: `PL_GLOBAL_SEED`, read by later launches) ends with it."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.pop("PL_GLOBAL_SEED", None)  # set by a fixture of a whole module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run and say why; `LE_REQUIRE_NETLAB=1` makes a missing netlab an error."""
    no_netlab = why_unavailable() if any(item.get_closest_marker("netlab") for item in items) else None
    if no_netlab and os.environ.get("LE_REQUIRE_NETLAB") == "1":
        raise pytest.UsageError(f"LE_REQUIRE_NETLAB=1, but netlab cannot run here: {no_netlab}")
    no_gpu = None if torch.cuda.is_available() else "needs a CUDA device"
    for item in items:
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=no_gpu))
        if no_netlab and item.get_closest_marker("netlab"):
            item.add_marker(pytest.mark.skip(reason=no_netlab))
