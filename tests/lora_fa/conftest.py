"""Notices of optional packages, printed or warned about once on import, which no test is about."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def _quiet_imports() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("peft", "bitsandbytes"):
            pytest.importorskip(name)
