"""What one dissection looks like: as plain text at the end of training, and as sections of a page."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace

from lightning_efficient.dissect.report.html import Section
from lightning_efficient.dissect.report.numbers import quantity
from lightning_efficient.dissect.report.svg import bar_chart, stacked_bar_chart
from lightning_efficient.dissect.report.tables import Cell, Column, Table
from lightning_efficient.dissect.result import PHASES, Breakdown, DissectReport, Row

TOP = 15
"""Modules that a table shows before the row ``rest``."""
_TOP_OPERATORS = 12
_OF_MODULES = ("forward", "recompute", "backward")


def render_text(report: DissectReport, *, width: int | None = None) -> str:
    """Return a dissection as plain text.

    Args:
        report: the dissection.
        width: columns of the terminal; asked from it when None.
    """
    columns = width or shutil.get_terminal_size((120, 24)).columns
    parts = [*summary_lines(report), ""]
    for section in _sections(report, in_page=False):
        parts += [section.title, section.text] if section.text else [section.title]
        parts += [table.text(width=columns) for table in section.tables]
    return "\n".join(parts).rstrip() + "\n"


def dissection_sections(report: DissectReport) -> list[Section]:
    """Return a dissection as sections of a page: where the step goes, modules, roles, collectives, operators, ranks."""
    return [Section("Summary", "\n\n".join(summary_lines(report))), *_sections(report, in_page=True)]


def summary_lines(report: DissectReport) -> list[str]:
    """Return the sentences that say what was measured, where, and what stands out."""
    machine, step = report.machine, report.throughput.step_s
    lines = [
        f"{machine.device} ({machine.accelerator}), {_count(machine.world_size, 'process', 'processes')} of "
        f"{_count(machine.threads, 'thread', 'threads')}, {machine.strategy}, "
        f"{machine.precision}, torch {machine.torch}, lightning {machine.lightning}.",
        f"Step {quantity(step.p50, 's')} (median; 90 % within {quantity(step.p90, 's')}) over {step.count} clean steps "
        f"after {report.window.warmup} of warm-up{_rates(report)}.",
        f"Memory of a rank: {_memory(report)}.",
    ]
    if flops := _flops(report):
        lines.append(flops)
    if breakdown := main_breakdown(report):
        lines.append(f"Where a step goes: {_shares(breakdown)}.")
    if late := report.straggler:
        lines.append(
            f"Rank {late.rank} is slow: busy {quantity(late.behind_s, 's')} longer than the median of the others, of "
            f"which {quantity(late.row_behind_s, 's')} in {late.row}."
        )
    return lines


def main_breakdown(report: DissectReport) -> Breakdown | None:
    """Return the breakdown that tells the time best: the GPU's where there is one, else the host's, or None."""
    return report.device or report.host


def phase_seconds(breakdown: Breakdown) -> dict[str, float]:
    """Return the seconds of each phase that took any, in the order of :data:`PHASES`."""
    seconds = {phase: breakdown.phase_s(phase) for phase in PHASES}
    return {phase: value for phase, value in seconds.items() if value > 0}


def role_seconds(breakdown: Breakdown) -> dict[str, float]:
    """Return the seconds by role of the modules, and of the rows beside them by their names; largest first."""
    seconds: dict[str, float] = {}
    for row in breakdown.rows:
        key = row.role if row.is_module else row.name
        seconds[key] = seconds.get(key, 0.0) + row.total_s
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def collapse(rows: Sequence[Row]) -> list[Row]:
    """Return one row for modules that differ only in the indices of their paths, such as ``layers.*.mlp x4``.

    Args:
        rows: of a breakdown.

    Returns:
        Sums, largest first. A path without a twin keeps its index.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name) if row.is_module else row.name
        groups.setdefault((pattern, row.cls), []).append(row)
    merged = [
        _sum(members, f"{pattern} x{len(members)}" if len(members) > 1 else members[0].name)
        for (pattern, _), members in groups.items()
    ]
    return sorted(merged, key=lambda row: -row.total_s)


def module_table(breakdown: Breakdown, *, top: int | None = TOP, saved: Breakdown | None = None) -> Table:
    """Return the table of modules, collapsed over layers; what is beyond ``top`` is summed in the row ``rest``.

    Args:
        breakdown: the dissected step.
        top: rows to show; all of them when None.
        saved: breakdown with the saved bytes, where another one has the times.
    """
    rows = collapse(breakdown.rows)
    if saved is not None and saved is not breakdown:
        n_bytes = {row.name: row.saved_bytes for row in collapse(saved.rows)}
        rows = [_with_saved(row, n_bytes.get(row.name)) for row in rows]
    if top is not None and len(rows) > top + 1:
        rows = [*rows[:top], _sum(rows[top:], f"rest ({len(rows) - top} rows)")]
    # The other phases have rows of their own, beside the modules: their total says it all.
    phases = [phase for phase in _OF_MODULES if any(getattr(row, f"{phase}_s") for row in rows)]
    columns: list[Column | str] = ["module", "role", Column("total", "s", bar=True), Column("share", "%", digits=2)]
    columns += [Column(phase, "s") for phase in phases]
    optional: list[tuple[Column, Callable[[Row], Cell]]] = [
        (Column("calls"), lambda row: row.calls or None),
        (Column("saved", "B"), lambda row: row.saved_bytes),
        (Column("work", "FLOP"), lambda row: row.flops),
    ]
    shown = [(column, value) for column, value in optional if any(value(row) for row in rows)]
    return Table(
        [*columns, *(column for column, _ in shown)],
        [
            [
                row.name,
                row.role,
                row.total_s,
                row.total_s / breakdown.step_s if breakdown.step_s else None,
                *(getattr(row, f"{phase}_s") for phase in phases),
                *(value(row) for _, value in shown),
            ]
            for row in rows
        ],
        caption=f"One step by the {breakdown.clock}'s clock, {quantity(breakdown.step_s, 's')} while profiled",
    )


def _sections(report: DissectReport, *, in_page: bool) -> list[Section]:
    sections: list[Section] = []
    if breakdown := main_breakdown(report):
        sections += _step_sections(report, breakdown, in_page=in_page)
    if report.collectives:
        sections.append(Section("Collectives", tables=[_collectives(report)]))
    if report.operators:
        sections.append(Section("Operators", tables=[_operators(report)]))
    if len(report.ranks) > 1:
        sections.append(Section("Ranks", tables=[_ranks(report)]))
    if report.notes:
        notes = "\n\n".join(report.notes) if in_page else "\n".join(f"- {note}" for note in report.notes)
        sections.append(Section("Notes", notes))
    return sections


def _step_sections(report: DissectReport, breakdown: Breakdown, *, in_page: bool) -> list[Section]:
    charts = []
    if in_page and phase_seconds(breakdown):
        charts = [
            stacked_bar_chart(
                {each.clock: phase_seconds(each) for each in (report.device, report.host) if each},
                title="Phases",
                unit="s",
                order=PHASES,
            ),
            bar_chart(dict(list(role_seconds(breakdown).items())[:TOP]), title="By role", unit="s"),
        ]
    phases = Table(
        ["phase", Column("time", "s", bar=True), Column("share", "%", digits=2)],
        [
            [phase, s, s / breakdown.step_s if breakdown.step_s else None]
            for phase, s in phase_seconds(breakdown).items()
        ],
    )
    roles = Table(
        ["role", Column("time", "s", bar=True), Column("share", "%", digits=2)],
        [[role, s, s / breakdown.step_s if breakdown.step_s else None] for role, s in role_seconds(breakdown).items()],
    )
    return [
        Section("Phases", charts=charts[:1], tables=[phases]),
        Section("Modules", tables=[module_table(breakdown, saved=report.host)]),
        Section("Roles", charts=charts[1:], tables=[roles]),
    ]


def _collectives(report: DissectReport) -> Table:
    return Table(
        [
            "operation",
            Column("size", "B"),
            Column("calls"),
            Column("time of a call", "s"),
            Column("time", "s", bar=True),
        ],
        [[each.op, each.n_bytes, each.calls, each.seconds, each.calls * each.seconds] for each in report.collectives],
        caption="Collectives of a step",
    )


def _operators(report: DissectReport) -> Table:
    rows: list[list[Cell]] = [
        [each.name, each.kind, each.calls, each.seconds] for each in report.operators[:_TOP_OPERATORS]
    ]
    if rest := report.operators[_TOP_OPERATORS:]:
        rows.append([f"rest ({len(rest)} rows)", "", sum(each.calls for each in rest), sum(o.seconds for o in rest)])
    return Table(
        ["operator", "kind", Column("calls"), Column("time", "s", bar=True)],
        rows,
        caption="Operators, own time of a step",
    )


def _ranks(report: DissectReport) -> Table:
    return Table(
        [Column("rank"), Column("step", "s"), Column("busy", "s", bar=True), *(Column(phase, "s") for phase in PHASES)],
        [[r.rank, r.step_s, r.busy_s, *(getattr(r, f"{phase}_s") for phase in PHASES)] for r in report.ranks],
        caption="Ranks; communication includes waiting for others",
    )


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _rates(report: DissectReport) -> str:
    t = report.throughput
    rates = []
    if t.tokens_per_s is not None:
        rates.append(quantity(t.tokens_per_s, "tokens/s"))
        if t.padded_tokens_per_s is not None and t.padded_tokens_per_s > 1.001 * t.tokens_per_s:
            rates.append(f"{quantity(t.padded_tokens_per_s, 'tokens/s')} with padding")
    if t.samples_per_s is not None:
        rates.append(quantity(t.samples_per_s, "samples/s"))
    return f": {', '.join(rates)}" if rates else ""


def _memory(report: DissectReport) -> str:
    m = report.memory
    parts = []
    if m.peak_bytes is not None:
        parts.append(f"peak {quantity(m.peak_bytes, 'B')}")
    if m.peak_reserved_bytes is not None:
        parts.append(f"{quantity(m.peak_reserved_bytes, 'B')} reserved")
    for name, value in (
        ("parameters", m.parameter_bytes),
        ("gradients", m.gradient_bytes),
        ("optimizer state", m.optimizer_bytes),
        ("saved for backward", m.saved_bytes),
    ):
        if value is not None:
            parts.append(f"{name} {quantity(value, 'B')}")
    return ", ".join(parts) + (f" ({m.note})" if m.note else "")


def _flops(report: DissectReport) -> str:
    f = report.flops
    parts = [f"{quantity(f.model_per_step, 'FLOP')} a step by the model"] if f.model_per_step else []
    if f.hardware_per_step and f.hardware_per_step != f.model_per_step:
        parts.append(f"{quantity(f.hardware_per_step, 'FLOP')} as run")
    parts += [f"{name} {quantity(value, '%')}" for name, value in (("MFU", f.mfu), ("HFU", f.hfu)) if value is not None]
    if not parts and not f.note:
        return ""
    return f"Work: {', '.join(parts) or 'not counted'}" + (f" ({f.note})." if f.note else ".")


def _shares(breakdown: Breakdown) -> str:
    seconds = phase_seconds(breakdown)
    total = breakdown.step_s or sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{phase} {quantity(spent / total, '%', digits=2)}" for phase, spent in parts)


def _sum(rows: Sequence[Row], name: str) -> Row:
    def total(attribute: str) -> float:
        return sum(float(getattr(row, attribute)) for row in rows)

    def known(values: Iterable[int | None]) -> int | None:
        numbers = [value for value in values if value is not None]
        return sum(numbers) if numbers else None

    times = {each.name: total(each.name) for each in fields(Row) if each.name.endswith("_s")}
    return Row(
        name=name,
        role=rows[0].role if len({row.role for row in rows}) == 1 else "",
        cls=rows[0].cls,
        calls=total("calls"),
        saved_bytes=known(row.saved_bytes for row in rows),
        flops=known(row.flops for row in rows),
        **times,
    )


def _with_saved(row: Row, n_bytes: int | None) -> Row:
    return row if n_bytes is None else replace(row, saved_bytes=n_bytes)
