"""What `bench serve` says: two tables, one sentence, and a page with the distribution of latencies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_efficient.dissect.report import (
    Column,
    Measured,
    Section,
    Table,
    bar_chart,
    line_chart,
    markdown,
    page,
    quantity,
)
from lightning_efficient.dissect.result import write_json
from lightning_efficient.dissect.serving import CdfPoint, ServingReport, ServingResult

_CURVE = 60  # points of a plotted distribution
_NOISE = 0.05  # a second run may differ by as much
_LATENCIES = {"TTFT": "ttft", "ITL": "itl", "TPOT": "tpot", "E2E": "e2e"}
_DEFINITIONS = """\
TTFT: from a request's arrival to its first token, waiting included. ITL: the gaps between its tokens. TPOT: (E2E - \
TTFT) / (tokens - 1). E2E: from arrival to the last token.

Percentiles are by linear interpolation. Occupancy is the share of the batch's places that held an unfinished request, \
over the decoding steps. Static batching ends a batch with its longest request; continuous batching gives a free place \
to the next request at once."""


def summary_table(reports: Sequence[ServingReport]) -> Table:
    """Throughput, and what it took."""
    return Table(
        [
            "batching",
            "finished",
            "failed",
            Column("output", "tokens/s"),
            Column("total", "tokens/s"),
            Column("occupancy", "%"),
            Column("KV cache", "B"),
            Column("wall", "s"),
        ],
        [
            [
                each.batching,
                each.finished,
                each.failed,
                each.output_tokens_per_s,
                each.total_tokens_per_s,
                each.occupancy,
                each.cache_bytes,
                each.wall_s,
            ]
            for each in reports
        ],
        caption="Throughput",
    )


def latency_table(reports: Sequence[ServingReport]) -> Table:
    """Percentiles of each latency; each row has its own unit, as they differ by orders of magnitude."""
    rows = []
    for name, field in _LATENCIES.items():
        for report in reports:
            found = getattr(report, field)
            values: list[float | None] = [None] * 4 if found is None else [found.p50, found.p90, found.p99, found.max]
            rows.append(
                [f"{name}, {report.batching}", *(None if value is None else Measured(value, "s") for value in values)]
            )
    return Table(["latency", "p50", "p90", "p99", "max"], rows, caption="Latencies")


def headline(reports: Sequence[ServingReport]) -> list[str]:
    """Return what a hurried reader needs: the comparison, what served, and what failed."""
    lines = []
    # Of a run that was cut off the early requests alone were finished: its figures compare with nothing.
    by_name = {each.batching: each for each in reports if each.finished and not each.failed}
    static, continuous = by_name.get("static"), by_name.get("continuous")
    if static and continuous and static.e2e and continuous.e2e and static.ttft and continuous.ttft:
        gain = continuous.output_tokens_per_s / static.output_tokens_per_s
        compared = (
            f"Continuous batching gives {gain:.2f} times the output tokens/s of static batching"
            if abs(gain - 1) >= _NOISE
            else "Continuous and static batching give the same output tokens/s within 5 %"
        )
        lines.append(
            f"{compared}; the median latency is {quantity(continuous.e2e.p50, 's')} instead of "
            f"{quantity(static.e2e.p50, 's')}, the median time to first token {quantity(continuous.ttft.p50, 's')} "
            f"instead of {quantity(static.ttft.p50, 's')}."
        )
    else:
        for each in by_name.values():
            assert each.e2e is not None
            lines.append(
                f"{each.batching.capitalize()} batching gives {quantity(each.output_tokens_per_s, 'tokens/s')} of "
                f"output; the median latency is {quantity(each.e2e.p50, 's')}."
            )
    lines += [
        f"{each.batching.capitalize()} batching: {each.failed} of {each.failed + each.finished} requests were not "
        "finished in time and are in no figure, so it is compared with nothing. Give a longer --timeout, or a smaller "
        "load."
        for each in reports
        if each.failed
    ]
    first = reports[0]
    lines.append(
        f"{first.model}, {first.dtype}, {first.device}; {first.arrivals}, at most {first.max_batch} in a batch."
    )
    return [*lines, *first.notes]


def report_sections(reports: Sequence[ServingReport]) -> list[Section]:
    """Return the parts of the page."""
    done = [each for each in reports if each.e2e_cdf]
    charts = []
    if done:
        charts = [
            line_chart(
                {each.batching: curve(each.e2e_cdf) for each in done},
                title="Share of requests answered within a time",
                x_label="end-to-end latency",
                y_label="requests",
                x_unit="s",
                y_unit="%",
            ),
            bar_chart({each.batching: each.output_tokens_per_s for each in done}, title="Output", unit="tokens/s"),
        ]
    tables = [summary_table(reports), latency_table(reports)]
    return [Section("Latency and throughput", charts=charts, tables=tables), Section("Definitions", text=_DEFINITIONS)]


def curve(points: Sequence[CdfPoint]) -> list[tuple[float, float]]:
    """Return a distribution as points of a plot, thinned evenly; the last one stays."""
    step = max(1, -(-len(points) // _CURVE))
    return [(each.seconds, each.share) for each in reversed(points[::-1][::step])]


def write_report(result: ServingResult, folder: Path) -> Path:
    """Write `serve.json`, `serve.md` and `serve.html`.

    Args:
        result: what was measured.
        folder: is made.

    Returns:
        The path of the page.
    """
    write_json(result, folder / "serve.json")
    title, lead, sections = "Serving", headline(result.reports), report_sections(result.reports)
    (folder / "serve.md").write_text(markdown(title, lead, sections), encoding="utf-8")
    (folder / "serve.html").write_text(page(title, lead, sections), encoding="utf-8")
    return folder / "serve.html"
