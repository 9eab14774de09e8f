from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_efficient.cli.bench.sweep import parse_sweep, read_sweep
from lightning_efficient.cli.errors import UserError
from lightning_efficient.dissect.result import Window

BASE: dict[str, Any] = {"recipe": "bench/llama", "matrix": {"technique": ["none"]}}


def test_what_is_left_out_has_defaults() -> None:
    sweep = parse_sweep(BASE)
    assert sweep.matrix == {"technique": ("none",), "world": (1,)}
    assert sweep.window == Window()
    assert sweep.keys["seq"] == "data.block_size"
    assert "Z2" in sweep.rules.needs_world_2
    assert sweep.control


@pytest.mark.parametrize("name", ["bench/quick", "bench/paper"])
def test_the_shipped_sweeps_can_be_read(name: str) -> None:
    assert read_sweep(name).recipe == "bench/llama"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrx": {}}, r"a sweep has no key 'matrx'\. Did you mean 'matrix'\?"),
        ({"recipe": "bench/llamma"}, r"There is no recipe 'bench/llamma': looked in .*bench/llama"),
        ({"matrix": {"technikue": ["F"]}}, r"matrix\.technikue is an unknown axis\. Did you mean 'technique'\?"),
        ({"matrix": {"lr": [0.1]}}, r"keys: \{lr: model\.init_args\.lr\}"),
        ({"matrix": {"seq": 128}}, r"matrix\.seq is 128: it has to be a list"),
        ({"matrix": {"seq": []}}, r"matrix\.seq has no value"),
        ({"matrix": {"seq": [128, 128]}}, r"matrix\.seq holds 128 twice"),
        ({"matrix": {"seq": [0]}}, r"matrix\.seq is 0: it has to be a whole number, 1 or more"),
        ({"matrix": {"world": [True]}}, r"matrix\.world is True"),
        ({"matrix": {"seq": ["auto"]}}, "only micro_batch can"),
        ({"matrix": {"micro_batch": [1, "auto"]}}, "only micro_batch can, and then alone"),
        ({"matrix": {"model": [7]}}, "quote a number"),
        ({"window": {"clean": 0}}, r"window\.clean is 0: it has to be a whole number, 1 or more"),
        ({"window": {"memory": 2}}, r"window\.memory is 2"),
        ({"window": {"warm": 2}}, r"window has no key 'warm'\. Did you mean 'warmup'\?"),
        ({"limits": {"timeout_s": 0}}, r"limits\.timeout_s is 0"),
        ({"limits": {"memory_gib": "2"}}, r"limits\.memory_gib is '2'"),
        ({"limits": {"threads": 0}}, r"limits\.threads is 0"),
        ({"rules": {"needs_cuda": ["FF"]}}, "there is no such technique"),
        ({"rules": {"exclusive": [["L", "none"]]}}, "there is no such technique"),
        ({"report": {"formats": ["pdf"]}}, "known are md, csv, json, html"),
        ({"control": "maybe"}, "control is 'maybe': it has to be true or false"),
        ({"overrides": "--x"}, "overrides is '--x': it has to be a list"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_the_way_out(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_sweep({**BASE, **changes})


def test_errors_name_the_file(workplace: Path) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump({**BASE, "window": {"clean": -1}}))
    with pytest.raises(UserError, match=r"^mine\.yaml: window\.clean is -1"):
        read_sweep("mine.yaml")
    Path("broken.yaml").write_text("recipe: [")
    with pytest.raises(UserError, match=r"broken\.yaml is no YAML"):
        read_sweep("broken.yaml")
    with pytest.raises(UserError, match="There is no recipe 'bench/quik'"):
        read_sweep("bench/quik")
