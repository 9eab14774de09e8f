"""A table as Markdown, CSV, HTML and plain text; its numbers are kept whole and rounded only where they are shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from lightning_efficient.dissect.report.numbers import column, largest, quantity, scale


@dataclass(frozen=True, slots=True)
class Measured:
    """A number with a unit of its own, where those of a column differ by orders of magnitude.

    Attributes:
        value: in the base unit.
        unit: see :func:`lightning_efficient.dissect.report.numbers.scale`.
    """

    value: float
    unit: str


Cell = str | float | int | Measured | None
_NONE = "\u2013"
_LONG = 40  # characters from which a cell on the page may wrap, but not into a thread
_LEAST_NAME = 30  # characters of the first column in plain text


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        name: its head.
        unit: base unit of its numbers, such as ``s`` or ``B``; shown with a prefix that suits the largest of them. See
            :func:`lightning_efficient.dissect.report.numbers.scale`.
        digits: significant digits that are shown.
        bar: whether the page draws a bar behind the numbers.
    """

    name: str
    unit: str = ""
    digits: int = 3
    bar: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts and numbers; None is a cell without a value.

    Attributes:
        columns: their heads; a plain string is a column without unit.
        rows: as many cells as columns each.
        caption: what it shows.
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    heads: tuple[Column, ...] = field(init=False)

    def __post_init__(self) -> None:
        heads = tuple(Column(column) if isinstance(column, str) else column for column in self.columns)
        for row in self.rows:
            if len(row) != len(heads):
                raise ValueError(f"A row of the table has {len(row)} cells, its head {len(heads)}. Give one for each.")
        object.__setattr__(self, "heads", heads)

    def markdown(self) -> str:
        """Return a Markdown table; the caption stands above."""
        heads, rows = self.shown()
        numeric = self._numeric()
        lines = [f"**{self.caption}**", ""] if self.caption else []
        lines.append("| " + " | ".join(_in_markdown(head) for head in heads) + " |")
        lines.append("|" + "|".join("---:" if right else "---" for right in numeric) + "|")
        lines += ["| " + " | ".join(_in_markdown(cell) for cell in row) + " |" for row in rows]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Return comma-separated values with all their digits in base units, which the head names: ``step_s``."""
        names = [head.name.replace(" ", "_") + (f"_{head.unit}" if head.unit else "") for head in self.heads]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(name.replace("_%", "").replace("_x", "") for name in names)
        # None is written as nothing.
        writer.writerows([each.value if isinstance(each, Measured) else each for each in row] for row in self.rows)
        return text.getvalue()

    def html(self) -> str:
        """Return a table that the page's script sorts: numbers stand in ``data-v``, in base units."""
        heads, rows = self.shown()
        numeric = self._numeric()
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        top = "".join(
            f'<th scope="col" aria-sort="none"{_right(right)}><button type="button">{escape(head)}</button></th>'
            for head, right in zip(heads, numeric, strict=True)
        )
        body = "\n".join(
            "<tr>" + "".join(self._cell(row, shown, at, numeric[at]) for at in range(len(heads))) + "</tr>"
            for row, shown in zip(self.rows, rows, strict=True)
        )
        name = escape(self.caption or "table", quote=True)
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
            f'<table class="sortable">{caption}<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
        )

    def text(self, *, width: int | None = None) -> str:
        """Return it in columns of plain text.

        Args:
            width: where a line would exceed it, the last columns are left out, then the first one is cut in the middle.
        """
        heads, rows = self.shown()
        numeric = self._numeric()
        widths = [max(len(line[at]) for line in [heads, *rows]) for at in range(len(heads))]
        if width is not None:
            least = min(widths[0], _LEAST_NAME)
            while len(widths) > 2 and least + sum(widths[1:]) + 2 * (len(widths) - 1) > width:
                widths.pop()
            spare = sum(widths) + 2 * (len(widths) - 1) - width
            widths[0] = max(least, widths[0] - max(0, spare))
        lines = [self.caption] if self.caption else []
        for line in [heads, *rows]:
            cells = [
                cell.rjust(size) if right else _cut(cell, size).ljust(size)
                for cell, size, right in zip(line, widths, numeric, strict=False)  # columns may be left out
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines) + "\n"

    def shown(self) -> tuple[list[str], list[list[str]]]:
        """Return the heads with their units, and the cells as they read."""
        # A tenth of the largest, so that 0.08 s beside 5 s reads 80 ms beside 5 000 ms.
        tops = [largest(row[at] for row in self.rows) for at in range(len(self.heads))]
        scales = [
            scale(top / 10 if head.unit in ("s", "B") else top, head.unit)
            for head, top in zip(self.heads, tops, strict=True)
        ]
        heads = [
            f"{head.name} ({unit})" if unit else head.name for head, (_, unit) in zip(self.heads, scales, strict=True)
        ]
        columns = [
            _texts([row[at] for row in self.rows], factor, head.digits)
            for at, (head, (factor, _)) in enumerate(zip(self.heads, scales, strict=True))
        ]
        return heads, [list(row) for row in zip(*columns, strict=True)]

    def _numeric(self) -> list[bool]:
        return [any(_value(row[at]) is not None for row in self.rows) for at in range(len(self.heads))]

    def _cell(self, row: Sequence[Cell], shown: Sequence[str], at: int, right: bool) -> str:
        value, style = _value(row[at]), ""
        if self.heads[at].bar and value is not None:
            top = largest(_value(each[at]) for each in self.rows)
            style = f' style="--w:{100 * value / top if top else 0:.1f}%"'
        number = f' data-v="{value!r}"' if value is not None else ""
        tag, scope = ("th", ' scope="row"') if at == 0 else ("td", "")
        kind = ' class="t"' if len(shown[at]) > _LONG and not right else _right(right)
        return f"<{tag}{scope}{kind}{number}{style}>{escape(shown[at])}</{tag}>"


def _texts(cells: Sequence[Cell], factor: float, digits: int) -> list[str]:
    numbers = iter(column([cell for cell in cells if isinstance(cell, (int, float))], factor, digits=digits))
    return [next(numbers) if isinstance(cell, (int, float)) else _text(cell) for cell in cells]


def _text(cell: str | Measured | None) -> str:
    if isinstance(cell, Measured):
        return quantity(cell.value, cell.unit)
    return _NONE if cell is None else cell


def _value(cell: Cell) -> float | int | None:
    if isinstance(cell, Measured):
        return cell.value
    return cell if isinstance(cell, (int, float)) else None


def _right(right: bool) -> str:
    return ' class="n"' if right else ""


def _in_markdown(text: str) -> str:
    # A line break would end the row, a bar the cell; `<` of `<loss>` would read as a tag, `*` as emphasis.
    for plain, kept in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("_", "\\_"), ("\n", " ")):
        text = text.replace(plain, kept)
    return text


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}\u2026{text[len(text) - (width - 1 - head) :]}"
