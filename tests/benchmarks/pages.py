"""Where the figures of a benchmark go."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import describe_machine


def write_page(out: Path, text: str, runs: Sequence[Any]) -> None:
    """Write a page, and beside it what it was made of.

    Args:
        out: without an ending; ``.md`` and ``.json`` are added.
        text: of the page.
        runs: dataclasses.
    """
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    raw = {"machine": describe_machine(), "runs": [asdict(run) for run in runs]}
    out.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
