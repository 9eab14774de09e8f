"""The files of a sweep's report: Markdown, CSV, JSON and one page, as pure functions of the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lightning_efficient.cli.bench.summary import (
    Setting,
    lead,
    macro_table,
    memory,
    rate,
    relative_speed,
    settings,
    technique_table,
)
from lightning_efficient.cli.bench.techniques import NONE
from lightning_efficient.dissect.report import (
    Section,
    Table,
    bar_chart,
    markdown,
    page,
    scatter_chart,
    stacked_bar_chart,
)
from lightning_efficient.dissect.report.dissection import dissection_sections, main_breakdown, phase_seconds
from lightning_efficient.dissect.result import PHASES, CaseResult, to_json

_OPEN_SETTINGS = 2


def write_outputs(results: Sequence[CaseResult], out: Path, formats: Sequence[str], *, title: str) -> list[Path]:
    """Write the report.

    Args:
        results: of a sweep; nothing is written where there is none.
        out: folder.
        formats: of ``md``, ``csv``, ``json``, ``html``.
        title: of the report.

    Returns:
        The files.
    """
    texts = {
        "html": ("report.html", html_report),
        "md": ("report.md", markdown_report),
        "csv": ("results.csv", lambda each, title: macro_table(each).csv()),
        "json": ("report.json", json_report),
    }
    written = []
    for name, (file, render) in texts.items():
        if name in formats and results:
            part = out / f"{file}.part"
            out.mkdir(parents=True, exist_ok=True)
            part.write_text(render(results, title), encoding="utf-8")
            written.append(part.replace(out / file))
    return written


def html_report(results: Sequence[CaseResult], title: str) -> str:
    """Return the page: verdicts, plots by setting, the table of all cases, and the dissection of each."""
    everything = settings(results)
    plots = [
        _plots(setting, collapsed=at >= _OPEN_SETTINGS)
        for at, setting in enumerate(each for each in everything if each.best)
    ]
    cases = Section("Cases", "One measured case each; open it.", children=[_case(result) for result in results])
    sections = [*plots, _all_cases(results), _glossary(results), cases]
    return page(_headline(title), lead(results), sections)


def markdown_report(results: Sequence[CaseResult], title: str) -> str:
    """Return verdicts and tables as Markdown."""
    sections = [_all_cases(results), _glossary(results)]
    return markdown(_headline(title), lead(results), sections)


def json_report(results: Sequence[CaseResult], title: str) -> str:
    """Return verdicts and results as JSON."""
    data = {"title": title, "lead": lead(results), "results": [to_json(result) for result in results]}
    return json.dumps(data, indent=1) + "\n"


def _headline(title: str) -> str:
    return f"What pays: {title}"


def _plots(setting: Setting, *, collapsed: bool) -> Section:
    best = setting.best
    machine = next(iter(best.values())).report
    assert machine is not None  # `best` holds measured cases
    charts = [_scatter(best), *_relative(setting), *_steps(best)]
    if setting.largest_batch:
        charts.append(bar_chart(setting.largest_batch, title="Largest batch that ran"))
    where = f"{machine.machine.device}, {machine.machine.precision}; each technique at its fastest batch."
    return Section(setting.name or "Techniques", where, charts=[each for each in charts if each], collapsed=collapsed)


def _scatter(best: dict[str, CaseResult]) -> str:
    points, unit, what = {}, "", ""
    for name, result in best.items():
        speed, used = rate(result), memory(result)
        if speed and used:
            points[name] = (float(used[0]), speed[0])
            unit, what = speed[1], used[1]
    if not points:
        return ""
    return scatter_chart(
        points, title="Speed over memory: up and left is better", x_label=what, y_label="speed", x_unit="B", y_unit=unit
    )


def _relative(setting: Setting) -> list[str]:
    best = setting.best
    base = best.get(NONE)
    if base is None:
        return []
    speeds = {name: ratio for name, each in best.items() if (ratio := relative_speed(each, base)) is not None}
    charts = [bar_chart(speeds, title="Speed, none = 1", unit="x", reference=1.0)]
    used, what = {}, ""
    for name, pair in setting.by_memory.items():
        (own, what), (other, _) = (memory(each) or (0, "") for each in pair)
        used[name] = own / other
    if used:
        title = f"{what.capitalize()}, none = 1{', at the largest batch of both' if setting.at(base) else ''}"
        charts.append(bar_chart(used, title=title, unit="x", reference=1.0))
    return charts


def _steps(best: dict[str, CaseResult]) -> list[str]:
    """Where a step goes, each scaled to the clean step: the dissected one is longer, for it is profiled."""
    bars = {}
    for name, result in best.items():
        breakdown = main_breakdown(result.report) if result.report else None
        if result.report and breakdown and breakdown.step_s:
            scale = result.report.throughput.step_s.p50 / breakdown.step_s
            bars[name] = {phase: seconds * scale for phase, seconds in phase_seconds(breakdown).items()}
    title = "Where a step goes: shares of the profiled step, length of the clean one"
    return [stacked_bar_chart(bars, title=title, unit="s", order=PHASES)] if bars else []


def _all_cases(results: Sequence[CaseResult]) -> Section:
    missing = [[each.case_id, each.status, each.reason] for each in results if each.status != "ok"]
    unmeasured = [Table(["case", "status", "why"], missing, caption="Not measured")] if missing else []
    return Section("All cases", tables=[macro_table(results), *unmeasured])


def _glossary(results: Sequence[CaseResult]) -> Section:
    text = (
        "Speed is from the clean steps, in which nothing is hooked or profiled. 'Training state' is parameters, "
        "gradients, optimizer state and what a forward pass keeps for backward; 'process peak' is the resident memory "
        "of a process, Python and torch included. 'Spread' is the standard deviation of a step over its mean. 'By "
        "none' is the ratio to none at the same batch. A technique is called faster where it is by 2 %, by two "
        "standard errors, and by more than the base differs between the begin and the end of the sweep."
    )
    return Section("What the words mean", text, tables=[technique_table(results)])


def _case(result: CaseResult) -> Section:
    title = f"{result.case_id}: {result.status}"
    if result.report is None:
        return Section(title, result.reason, collapsed=True)
    return Section(title, children=dissection_sections(result.report), collapsed=True)
