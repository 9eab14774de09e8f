"""The benchmark of layers goes on where it stopped, its grid covers what it should, and its arithmetic is right."""

import json
from pathlib import Path

import pytest

from lightning_efficient.moe import SCHEDULES, MoESizes
from tests.benchmarks import parm_layers
from tests.benchmarks._parm_cells import EXPERTS, GRID, PEER, QUICK, SHAPES, Cell, candidates, cells
from tests.benchmarks._parm_deepspeed import why_no_deepspeed
from tests.benchmarks._parm_rank import CellResult
from tests.benchmarks._parm_report import HEADLINE, Row, network_table, targets

FAST, SLOW = (
    Cell("slow_inter@200mbit", MoESizes(2, 2, 2), SHAPES["C"]),
    Cell("unlimited", MoESizes(1, 2, 2), SHAPES["F"]),
)


def _row(cell: Cell, auto: str | None, **seconds: float) -> Row:
    rounds = {label.replace("_over_", "/"): [value, 10 * value, value / 10] for label, value in seconds.items()}
    return Row(cell, CellResult(cell.name, rounds, {"s1": 1e-6}, auto=auto, model=auto and "s1"))


ROWS = [
    _row(FAST, "s1/4", DeepSpeed=0.6, paper=2.0, deepspeed=0.5, s1=0.4, s1_over_2=0.3, s1_over_4=0.32),
    _row(SLOW, "s1", paper=0.05, deepspeed=0.02, s1=0.02, s1_over_2=0.01),
]


@pytest.mark.netlab
@pytest.mark.distributed
@pytest.mark.slow
def test_quick_measures_writes_both_files_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--quick", "--out", str(tmp_path), "--work", str(tmp_path), "--cells"]
    assert parm_layers.main([*words, "slow_inter@50mbit"]) == 0
    with (tmp_path / "quick.jsonl").open("a") as file:
        file.write('{"cell": "cut o')  # killed while it wrote
    capsys.readouterr()
    assert parm_layers.main([*words, "50mbit|200mbit 4,4,1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("(from before)") == 1
    assert len((tmp_path / "quick.jsonl").read_text().splitlines()) == 2
    (data,) = tmp_path.glob("parm_layers_*.json")
    raw = json.loads(data.read_text())
    assert len(raw["cells"]) == 2
    for cell in raw["cells"]:
        assert {"paper", "deepspeed", "s1", "s2/4"} <= set(cell["seconds"])
        assert (PEER in cell["seconds"]) == (why_no_deepspeed() is None)
        assert max(cell["differences"].values()) < 1e-5
        assert cell["auto"] in cell["seconds"]
    assert "## slow_inter@50mbit" in data.with_suffix(".md").read_text()


def test_the_grid_covers_each_value_and_the_cell_that_is_asked_for() -> None:
    grid = cells(GRID)
    assert len({cell.name for cell in grid}) == len(grid) == 43
    assert {cell.network for cell in grid} == set(GRID)
    assert {cell.topology for cell in grid} == {"2,2,2", "2,4,1", "4,4,1", "1,2,2", "4,2,2"}
    for letter, values in {"S": {128, 512, 1024}, "M": {128, 256, 512}, "k": {1, 2}, "f": {1, 1.25, 2}}.items():
        assert {getattr(cell.shape, letter) for cell in grid} == values
    assert HEADLINE in {cell.name for cell in grid}
    assert {cell.topology for cell in cells(QUICK)} == {cell.topology for cell in grid}
    assert [cell.name for cell in cells(GRID, "50mbit 2,2,2 S512 M512")] == ["slow_inter@50mbit 2,2,2 S512 M512 k1 f2"]
    for cell in grid:
        cell.sizes.check_world(4)
        cell.sizes.check_experts(EXPERTS, cell.shape.M)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 4, 1), (1, 2, 2), (4, 2, 2)])
def test_candidates_hold_the_baselines_and_every_schedule_that_differs(sizes: tuple[int, int, int]) -> None:
    labels = candidates(MoESizes(*sizes))
    assert len(set(labels)) == len(labels)
    assert labels[:2] == ["paper", "deepspeed"]
    names = {label.partition("/")[0] for label in labels}
    mp, _, esp = sizes
    assert {"s1"} <= names <= set(SCHEDULES)
    assert ("s1_hier" in names) == (esp > 1)
    assert ("s2" in names) == (mp > 1)
    assert "s2_saa" not in labels


def test_times_are_medians_and_the_paper_is_not_among_the_best() -> None:
    assert ROWS[0].seconds("paper") == 2.0
    assert (ROWS[0].best, ROWS[0].fastest_of("s1"), ROWS[0].fastest_of("s2")) == ("s1/2", "s1/2", None)
    assert ROWS[0].ratio(PEER, "s1/2") == pytest.approx(2.0)
    assert ROWS[1].ratio(PEER, "s1/2") is None
    assert (ROWS[0].layer_s, ROWS[1].layer_s) == (0.6, 0.02)
    assert _row(SLOW, None, paper=0.01, deepspeed=0.02).best == "deepspeed"


def test_targets_are_computed_over_the_cells_they_name() -> None:
    found = {target.claim: target.value for target in targets(ROWS)}
    assert found["`paper` over `auto`, best"] == pytest.approx(2.0 / 0.32)
    assert found["`paper` over `auto`, geometric mean"] == pytest.approx((2.0 / 0.32 * 0.05 / 0.02) ** 0.5)
    assert found["`paper` over the best candidate, least"] == pytest.approx(5.0)
    assert found[f"DeepSpeed over `auto`, {HEADLINE}"] == pytest.approx(0.6 / 0.32)
    assert found["our `deepspeed` order's time over DeepSpeed's, geometric mean"] == pytest.approx(0.5 / 0.6)
    # The second layer takes less than 50 ms.
    assert found["share of layers of 50 ms and more in which `auto` is within 10 % of the best"] == 1.0
    assert found["time of `auto` over the best, layers of 50 ms and more, geometric mean"] == pytest.approx(0.32 / 0.3)
    claim = "time of what its model alone would take over the best, layers of 50 ms and more, geometric mean"
    assert found[claim] == pytest.approx(0.4 / 0.3)


def test_without_planner_and_peer_their_targets_are_not_measured() -> None:
    alone = [_row(FAST, None, paper=2.0, deepspeed=0.5, s1=0.4)]
    verdicts = {target.claim: target.verdict for target in targets(alone)}
    assert all(verdict == "not measured" for claim, verdict in verdicts.items() if "auto" in claim or PEER in claim)
    assert verdicts["`paper` over the best candidate, best"] == "met"


def test_the_table_shows_the_best_number_of_chunks() -> None:
    line = network_table(ROWS[:1]).splitlines()[-1]
    assert "| 2000 | 500 | 600 | 300 /2 | - |" in line
    assert line.endswith("| `s1/2` | 2.00 | 6.67 | `s1/4` | 1.07 |")
