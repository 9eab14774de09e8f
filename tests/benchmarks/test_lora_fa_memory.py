"""The claims of the memory benchmark, at half its width: bytes and peaks are exact, so they are asserted."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from tests.benchmarks._lora_fa_cases import LEAN, LEAN_ALL, LORA, PEFT_FA
from tests.benchmarks.lora_fa_memory import (
    LLAMA,
    OTHERS,
    TARGETS,
    Figure,
    Results,
    Target,
    measure,
    peak_bytes,
    ratios,
    worse_than_peft_fa,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers
]

SHAPE = {"width": 256, "ffn": 688, "tokens": 256, "r": 8}
CELLS = {cell.name: cell for cell in LLAMA if not cell.name.startswith("large")}
OTHER_CELLS = {cell.name: cell.but(layers=1) for cell in OTHERS}
# Cells whose every setting (types, dropouts, checkpointing, sizes, family) another cell has as well.
SETTINGS_SEEN_ELSEWHERE = {
    "fp32, dropout .05",
    "bf16, fp32 adapters, dropout .05",
    "fp32, checkpointing",
    "RoBERTa",
    "RoBERTa, own dropout .1",
    "T5, ReLU, own dropout .1",
    "T5, gated GELU",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def figure(cell_name: str, method: str) -> Figure:
    cell = {**CELLS, **OTHER_CELLS}[cell_name]
    ffn = 4 * SHAPE["width"] if cell_name in OTHER_CELLS else SHAPE["ffn"]
    return measure(cell.but(**{**SHAPE, "ffn": ffn, "vocab": min(cell.vocab, 4000)}), method)


def results_of(cell_name: str) -> Results:
    return {cell_name: {method: figure(cell_name, method) for method in (LORA, PEFT_FA, LEAN, LEAN_ALL)}}


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_saved_bytes_reach_the_target(target: Target) -> None:
    saved, _ = ratios(results_of(target.cell), target.cell, target.method)
    assert saved >= target.least


@pytest.mark.parametrize(
    "cell_name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if name in SETTINGS_SEEN_ELSEWHERE else [])
        for name in (*CELLS, *OTHER_CELLS)
    ],
)
def test_never_above_peft_lora_fa_peak_included(cell_name: str) -> None:
    assert worse_than_peft_fa(results_of(cell_name)) == []


def test_peak_is_the_most_that_was_held_at_once() -> None:
    def step() -> None:
        first, second = torch.empty(1000), torch.empty(2000)
        del first
        third = torch.empty(500)
        del second, third

    assert 12_000 <= peak_bytes(step) <= 12_000 + 256
