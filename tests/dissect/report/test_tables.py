import csv
import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_efficient.dissect.report import Column, Measured, Table

TABLE = Table(
    ["module", Column("time", "s", bar=True), Column("calls")],
    [["<loss> a|b", 0.012, 4], ["layers.*.mlp", 0.0031, None], ["skipped", None, 12]],
    caption="One & all",
)


def test_markdown_has_units_in_the_head_and_escapes() -> None:
    assert TABLE.markdown() == (
        "**One & all**\n\n"
        "| module | time (ms) | calls |\n"
        "|---|---:|---:|\n"
        "| &lt;loss> a\\|b | 12.0 | 4 |\n"
        "| layers.\\*.mlp | 3.1 | \u2013 |\n"
        "| skipped | \u2013 | 12 |\n"
    )


def test_csv_has_base_units_and_all_digits() -> None:
    assert TABLE.csv() == "module,time_s,calls\n<loss> a|b,0.012,4\nlayers.*.mlp,0.0031,\nskipped,,12\n"


def test_html_carries_numbers_for_the_script_and_escapes() -> None:
    text = TABLE.html()
    assert re.findall(r'data-v="([^"]*)"', text) == ["0.012", "4", "0.0031", "12"]
    assert "&lt;loss&gt; a|b" in text
    assert "<loss>" not in text
    assert text.count('aria-sort="none"') == 3
    assert "--w:100.0%" in text
    assert "--w:25.8%" in text


def test_text_keeps_to_the_width_by_leaving_out_the_last_columns() -> None:
    wide = Table(["name", *(Column(f"number {n}") for n in range(9))], [["x" * 60, *range(9)]])
    lines = wide.text(width=70).splitlines()
    assert max(map(len, lines)) <= 70
    assert "number 0" in lines[0]
    assert "number 8" not in lines[0]
    assert "x\u2026x" in lines[1]
    assert "number 8" in wide.text()


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 cells, its head 2"):
        Table(["a", "b"], [["x"]])


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("td", "th"):
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data


CELL = st.one_of(
    st.none(), st.integers(-(10**9), 10**9), st.text(st.characters(codec="utf-8", exclude_categories=["C"]))
)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_any_cells_come_back_from_csv_and_html(rows: list[tuple[str | int | None, str | int | None]]) -> None:
    table = Table(["a", "b"], rows)
    back = list(csv.reader(io.StringIO(table.csv(), newline="")))[1:]
    assert back == [["" if cell is None else str(cell) for cell in row] for row in rows]
    parser = _Cells()
    parser.feed(table.html())
    shown = [cell for row in table.shown()[1] for cell in row]
    assert [text.strip() for text in parser.texts[2:]] == [cell.strip() for cell in shown]


def test_numbers_with_units_of_their_own_sort_by_what_they_are() -> None:
    table = Table(["latency", "p50"], [["TTFT", Measured(1.2, "s")], ["ITL", Measured(0.0618, "s")], ["none", None]])
    assert re.findall(r'data-v="([^"]*)"', table.html()) == ["1.2", "0.0618"]
    assert table.csv() == "latency,p50\nTTFT,1.2\nITL,0.0618\nnone,\n"
    _, rows = table.shown()
    assert [cell.replace("\u00a0", " ") for _, cell in rows] == ["1.20 s", "61.8 ms", "\u2013"]
