import json
import os
from pathlib import Path

import pytest

from lightning_efficient.cli.bench.outputs import html_report, markdown_report, write_outputs
from lightning_efficient.cli.bench.summary import costs, is_faster, lead, macro_table, settings
from lightning_efficient.dissect.result import CaseResult, from_json, to_json
from tests.dissect.report import samples
from tests.dissect.report.samples import MIB, case

GOLDEN = Path(__file__).with_name("golden_report.md")
RESULTS = [
    case("none"),
    case("F", tokens_per_s=1210.0, step_s=0.0826),
    case("R+LFA", tokens_per_s=800.0, step_s=0.125, saved=1 * MIB),
    case("ACP", status="skipped", reason="ACP needs 2 processes or more; world is 1."),
    case("EVA", status="oom", reason="Out of memory."),
    case("none", again=True, tokens_per_s=990.0),
]


def said(results: list[CaseResult]) -> list[str]:
    return [sentence.replace("\u00a0", " ") for sentence in lead(results)]


def test_the_verdicts() -> None:
    assert said(RESULTS) == [
        "Fastest: F, 1.21 times none (1 210 against 1 000 tokens/s).",
        "Least memory: R+LFA, 0.42 of none (5 MiB against 12 MiB of training state), at 0.80 times its speed.",
        "A step of none: 35 % is mlp backward, 17 % is mlp forward, 17 % is qkv backward.",
        "4 of 6 cases measured; 1 skipped, 1 oom, each with its reason below.",
    ]


def test_the_report_is_a_pure_function_of_the_json() -> None:
    """`LE_UPDATE_GOLDEN=1` writes the file anew, to be read before it is committed."""
    text = markdown_report(RESULTS, "golden")
    if os.environ.get("LE_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
    again = [from_json(CaseResult, json.loads(json.dumps(to_json(each)))) for each in RESULTS]
    assert markdown_report(again, "golden") == text
    assert html_report(again, "golden") == html_report(RESULTS, "golden")


def test_every_cell_is_filled_or_explained() -> None:
    table = macro_table(RESULTS)
    names = [head.name for head in table.heads]
    for row in table.rows:
        cells = dict(zip(names, row, strict=True))
        assert cells["why"] if cells["status"] != "ok" else cells["speed"]
    assert table.caption == "tiny, seq 128, batch 4, world 1"
    assert names[:3] == ["technique", "run", "status"]


def test_a_difference_within_the_scatter_is_not_called_faster() -> None:
    base = case("none", spread=0.3)
    assert is_faster(case("F", tokens_per_s=1100.0), case("none"))
    assert not is_faster(case("F", tokens_per_s=1100.0), base)  # two standard errors are 13 %
    assert not is_faster(case("F", tokens_per_s=1015.0, spread=0.0), case("none", spread=0.0))  # below 2 %
    assert not is_faster(case("F", tokens_per_s=1100.0), case("none"), drift=0.2)
    sentences = said([base, case("F", tokens_per_s=1100.0)])
    assert sentences[0] == (
        "Fastest: none, 1 000 tokens/s; no technique is faster than it by more than chance (F is at 1.10)."
    )


def test_a_machine_that_changed_meanwhile_is_named() -> None:
    sentences = said([case("none"), case("F", tokens_per_s=1300.0), case("none", again=True, tokens_per_s=500.0)])
    assert sentences[0].startswith("Fastest: none, 1 000 tokens/s; no technique is faster")
    assert "Careful: none, measured again at the end, differs by 100 % from its first run." in " ".join(sentences)


def test_batches_are_one_setting_and_the_fastest_counts() -> None:
    results = [
        case("none", batch=1, tokens_per_s=500.0),
        case("none", batch=2, tokens_per_s=900.0),
        case("none", batch=4, status="oom", reason="no"),
        case("R", batch=1, tokens_per_s=400.0),
        case("R", batch=2, tokens_per_s=700.0),
        case("R", batch=4, tokens_per_s=1100.0),
    ]
    (setting,) = settings(results)
    assert {name: each.axes["micro_batch"] for name, each in setting.best.items()} == {"none": 2, "R": 4}
    assert setting.largest_batch == {"none": 2, "R": 4}
    assert said(results)[0] == ("Fastest: R, 1.22 times none (1 100 at batch 4 against 900 tokens/s at batch 2).")
    assert "Largest batch: 4 with R, 2 with none." in said(results)
    # In the table a cell is compared with none at its own batch, or with nothing.
    ratios = [row[4] for row in macro_table(results).rows]
    assert ratios == [1.0, 1.0, None, 0.8, pytest.approx(7 / 9), None]


def test_memory_is_compared_at_one_batch_even_if_a_technique_is_fastest_at_a_larger_one() -> None:
    results = [
        case("none", batch=1, tokens_per_s=500.0, saved=20 * MIB),
        case("none", batch=2, tokens_per_s=900.0, saved=40 * MIB),
        case("none", batch=4, status="oom", reason="no"),
        case("R", batch=1, tokens_per_s=400.0, saved=10 * MIB),
        case("R", batch=2, tokens_per_s=720.0, saved=16 * MIB),
        case("R", batch=4, tokens_per_s=1100.0, saved=60 * MIB),
        case("F", batch=4, tokens_per_s=1000.0, saved=1 * MIB),  # none never ran there
    ]
    (setting,) = settings(results)
    pairs = {name: [each.axes["micro_batch"] for each in pair] for name, pair in setting.by_memory.items()}
    assert pairs == {"none": [2, 2], "R": [2, 2]}
    state = 4  # MiB of parameters, gradients and optimizer
    ratio = (16 + state) / (40 + state)
    assert said(results)[1] == (
        f"Least memory: R, {ratio:.2f} of none (20 MiB against 44 MiB of training state at batch 2), at 0.80 times its "
        "speed."
    )
    assert "at the largest batch of both" in html_report(results, "memory")


def test_several_settings_have_their_own_verdicts_and_a_mean() -> None:
    results = [
        case(technique, world=world, tokens_per_s=1000.0 * factor)
        for world, factor_of_f in ((1, 2.0), (2, 8.0), (4, 4.0))
        for technique, factor in (("none", 1.0), ("F", factor_of_f))
    ]
    sentences = said(results)
    assert sentences[0] == "tiny, seq 128, world 1: Fastest: F, 2.00 times none (2 000 against 1 000 tokens/s)."
    assert any("Over all 3 settings, speed to none in geometric mean: F 4.00, none 1.00" in each for each in sentences)
    assert not any("world 4:" in each for each in sentences)


def test_without_the_base_nothing_is_compared() -> None:
    sentences = said([case("F"), case("none", status="failed", reason="It fell.")])
    assert sentences[0] == "Fastest: F, 1 000 tokens/s; 'none' did not run, so nothing is compared with it."


def test_nothing_measured_still_reports(tmp_path: Path) -> None:
    results = [case("none", status="failed", reason="It fell.")]
    assert said(results) == ["0 of 1 cases measured; 1 failed, each with its reason below."]
    written = write_outputs(results, tmp_path, ["md", "csv", "json", "html"], title="t")
    assert sorted(path.name for path in written) == ["report.html", "report.json", "report.md", "results.csv"]
    assert "It fell." in (tmp_path / "report.html").read_text()
    assert write_outputs([], tmp_path, ["md"], title="t") == []


def test_the_costs_of_a_step_add_up() -> None:
    assert sum(share for _, share in costs(samples.report())) == pytest.approx(1.0)
