"""Results as tables, plots and one self-contained page: pure functions of the results."""

from lightning_efficient.dissect.report.dissection import dissection_sections, render_text
from lightning_efficient.dissect.report.html import Section, markdown, page
from lightning_efficient.dissect.report.numbers import quantity
from lightning_efficient.dissect.report.svg import bar_chart, line_chart, scatter_chart, stacked_bar_chart
from lightning_efficient.dissect.report.tables import Column, Measured, Table

__all__ = [
    "Column",
    "Measured",
    "Section",
    "Table",
    "bar_chart",
    "dissection_sections",
    "line_chart",
    "markdown",
    "page",
    "quantity",
    "render_text",
    "scatter_chart",
    "stacked_bar_chart",
]
