from lightning_efficient.dissect.report import dissection_sections, markdown, page, render_text
from lightning_efficient.dissect.report.dissection import TOP, collapse, module_table, phase_seconds, role_seconds
from lightning_efficient.dissect.report.html import Section
from lightning_efficient.dissect.result import Breakdown, DissectReport, Row, from_json, to_json
from tests.dissect.report import samples


def test_layers_collapse_into_one_row_and_time_is_kept() -> None:
    whole = samples.breakdown()
    rows = {row.name: row for row in collapse(whole.rows)}
    assert set(rows) == {
        "model.layers.*.mlp.up_proj x4", "model.layers.*.attn.q_proj x4", "model.embed", "<optimizer AdamW>", "<data>",
    }  # fmt: skip
    assert abs(rows["model.layers.*.mlp.up_proj x4"].total_s - 0.024) < 1e-12
    assert rows["model.layers.*.mlp.up_proj x4"].saved_bytes == 4 * samples.MIB
    assert abs(sum(row.total_s for row in rows.values()) - whole.step_s) < 1e-12


def test_one_layer_keeps_its_index_and_other_classes_stay_apart() -> None:
    rows = [Row("layers.0", cls="Linear"), Row("layers.1", cls="ReLU"), Row("layers.2", cls="Linear")]
    assert [row.name for row in collapse(rows)] == ["layers.* x2", "layers.1"]


def test_the_module_table_ends_with_the_rest_and_its_times_add_up() -> None:
    rows = tuple(Row(f"part{n}", forward_s=1.0 + n) for n in range(40))
    table = module_table(Breakdown("host", 820.0, rows))
    assert len(table.rows) == TOP + 1
    assert table.rows[-1][0] == "rest (25 rows)"
    assert sum(float(row[2] or 0) for row in table.rows) == 820.0


def test_phases_and_roles_add_up_to_the_step() -> None:
    whole = samples.breakdown()
    assert abs(sum(phase_seconds(whole).values()) - whole.step_s) < 1e-12
    assert abs(sum(role_seconds(whole).values()) - whole.step_s) < 1e-12
    assert next(iter(role_seconds(whole))) == "mlp"


def test_the_text_says_what_matters_and_keeps_to_the_terminal() -> None:
    text = render_text(samples.report(world=2), width=90).replace("\u00a0", " ")
    for said in (
        "Step 100 ms (median; 90 % within 101 ms) over 20 clean steps after 5 of warm-up: 1 000 tokens/s",
        "saved for backward 8 MiB",
        "Rank 1 is slow: busy 5 ms longer than the median of the others, of which 4 ms in model.layers.3.mlp.up_proj.",
        "no peak is known",
        "model.layers.*.mlp.up_proj x4",
        "all_reduce",
        "aten::addmm",
        "- A note.",
    ):
        assert said in text
    tables = [line for line in text.splitlines() if "  " in line]
    assert max(map(len, tables)) <= 90


def test_a_report_without_dissected_steps_still_reads() -> None:
    bare = samples.report()
    short = DissectReport(bare.machine, bare.window, bare.throughput)
    assert "Step 100" in render_text(short)
    assert [section.title for section in dissection_sections(short)] == ["Summary"]


def test_a_page_is_a_pure_function_of_the_json() -> None:
    whole = samples.report(world=2)
    again = from_json(DissectReport, to_json(whole))
    assert page("t", ["l"], dissection_sections(whole)) == page("t", ["l"], dissection_sections(again))
    assert render_text(whole, width=100) == render_text(again, width=100)


def test_a_page_loads_nothing_and_escapes() -> None:
    text = page("<title> & co", ["a < b"], [Section("x <y>", "p & q", children=dissection_sections(samples.report()))])
    assert "<title>&lt;title&gt; &amp; co</title>" in text
    assert "a &lt; b" in text
    assert "Test &lt;processor&gt; &amp; co" in text
    without_svg = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http" not in without_svg
    assert "src=" not in text
    assert "@import" not in text


def test_markdown_has_headings_sentences_and_tables() -> None:
    text = markdown("T", ["Fastest: F."], [Section("S", "words", children=dissection_sections(samples.report()))])
    assert text.startswith("# T\n\n- Fastest: F.\n")
    assert "### Modules" in text
    assert "| model.layers.\\*.mlp.up\\_proj x4 |" in text
