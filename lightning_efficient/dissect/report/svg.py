"""Plots as inline SVG: no dependency, no script; they take the page's text colour, so they suit light and dark.

Every mark has a tooltip with its exact name and value, and names are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from lightning_efficient.dissect.report.axes import (
    FONT,
    WIDTH,
    Frame,
    axis,
    colour,
    drawing,
    ink,
    label,
    legend,
    legend_height,
    shorten,
    text_width,
)
from lightning_efficient.dissect.report.numbers import quantity

_ROW = 26.0  # pixels from one bar to the next
_BAR = 18.0
_TOP = 30.0  # below the title
_WIDEST_NAME = 250.0
_HALO = ' stroke="var(--back, #fff)" stroke-width="3" paint-order="stroke"'
_PLOT = 300.0  # height of a plot with two axes


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_unit: str = "",
    y_unit: str = "",
) -> str:
    """Return lines through points, one line a series.

    Args:
        series: name to points ``(x, y)``, in the order of x.
        title: shown above, and read aloud.
        x_label: what x is.
        y_label: what y is.
        log_x: whether the x axis is logarithmic.
        log_y: whether the y axis is logarithmic.
        x_unit: base unit of x, such as ``B``: ticks then carry a fitting unit; see
            :func:`lightning_efficient.dissect.report.numbers.scale`.
        y_unit: likewise of y.

    Raises:
        ValueError: no points, one that is not finite, or one not above 0 on a logarithmic axis.
    """
    points = [point for each in series.values() for point in each]
    top = _TOP + legend_height(list(series), left=0) + 12
    frame = Frame.of(
        axis([x for x, _ in points], x_label, log=log_x, unit=x_unit),
        axis([y for _, y in points], y_label, log=log_y, unit=y_unit, from_zero=True),
        top=top,
        height=_PLOT,
    )
    body = legend(list(series), left=0, top=_TOP, shape=lambda index, x, y: _mark(index, x, y))
    body += frame.draw()
    for index, (name, line) in enumerate(series.items()):
        places = [frame.place(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="6 3"' if index >= 8 else ""  # the colours repeat
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour(index)}" stroke-width="2"{dash}/>')
        for (x, y), (px, py) in zip(line, places, strict=True):
            tip = f"{name}: {quantity(x, x_unit)}, {quantity(y, y_unit)}"
            body.append(_mark(index, px, py, tip=tip))
    return drawing(frame.height, title, body, kind="lines")


def scatter_chart(
    points: Mapping[str, tuple[float, float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_unit: str = "",
    y_unit: str = "",
) -> str:
    """Return points with their names beside them; a name without room is left to the tooltip.

    Args:
        points: name to ``(x, y)``.
        title: shown above, and read aloud.
        x_label: what x is.
        y_label: what y is.
        x_unit: base unit of x, as in :func:`line_chart`.
        y_unit: likewise of y.

    Raises:
        ValueError: no points, or one that is not finite.
    """
    xs, ys = [x for x, _ in points.values()], [y for _, y in points.values()]
    frame = Frame.of(
        axis(xs, x_label, unit=x_unit, from_zero=_shows_zero(xs)),
        axis(ys, y_label, unit=y_unit, from_zero=_shows_zero(ys)),
        top=_TOP,
        height=_PLOT,
    )
    places = {name: frame.place(x, y) for name, (x, y) in points.items()}
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places.values()]
    body = frame.draw()
    for name, (x, y) in places.items():
        tip = f"{name}: {x_label} {quantity(points[name][0], x_unit)}, {y_label} {quantity(points[name][1], y_unit)}"
        body.append(_mark(0, x, y, tip=tip))
        text = shorten(name, 160)
        for left, baseline in _label_places(x, y, text_width(text)):
            box = (left, baseline - FONT, left + text_width(text), baseline + 3)
            if _inside(box, frame) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                body.append(label(left, baseline, text))
                break
    return drawing(frame.height, title, body, kind="scatter")


def bar_chart(values: Mapping[str, float], *, title: str, unit: str = "", reference: float | None = None) -> str:
    """Return horizontal bars with their values.

    Args:
        values: name to a number, 0 or more.
        title: shown above, and read aloud.
        unit: base unit; see :func:`lightning_efficient.dissect.report.numbers.scale`.
        reference: value to mark by a dashed line, such as 1 where the bars are ratios.

    Raises:
        ValueError: no bars, or a number that is negative or not finite.
    """
    return _bars({name: {"": value} for name, value in values.items()}, title, unit, reference, palette={})


def stacked_bar_chart(
    bars: Mapping[str, Mapping[str, float]], *, title: str, unit: str = "", order: Sequence[str] = ()
) -> str:
    """Return horizontal bars of several parts, with a legend; the totals stand beside them.

    Args:
        bars: name to the parts' names and numbers, 0 or more.
        title: shown above, and read aloud.
        unit: base unit; see :func:`lightning_efficient.dissect.report.numbers.scale`.
        order: all parts that there can be, so that a part has the same colour in every plot.

    Raises:
        ValueError: no bars, or a number that is negative or not finite.
    """
    there = dict.fromkeys(key for parts in bars.values() for key, value in parts.items() if value)
    palette = {key: colour(index) for index, key in enumerate(dict.fromkeys([*order, *there]))}
    return _bars(bars, title, unit, None, palette={key: paint for key, paint in palette.items() if key in there})


def _bars(
    bars: Mapping[str, Mapping[str, float]],
    title: str,
    unit: str,
    reference: float | None,
    *,
    palette: Mapping[str, str],
) -> str:
    keys = list(palette)
    totals = {name: _total(name, parts) for name, parts in bars.items()}
    if not totals:
        raise ValueError(f"The plot '{title}' has no bars: nothing was measured. Leave it out.")
    longest = max(*totals.values(), reference or 0.0) or 1.0
    left = min(_WIDEST_NAME, max(text_width(name) for name in totals)) + 8
    width = WIDTH - left - max(text_width(quantity(total, unit)) for total in totals.values()) - 10
    top = _TOP + (legend_height(keys, left=0) + 4 if keys else 0.0)
    body = legend(keys, left=0, top=_TOP, shape=lambda index, x, y: _box(x - 6, y - 5, 11, 11, palette[keys[index]]))
    amounts: list[str] = []  # above the line that marks the reference
    for row, (name, parts) in enumerate(bars.items()):
        y = top + row * _ROW
        body.append(label(left - 8, y + 13, shorten(name, _WIDEST_NAME), anchor="end"))
        x = left
        for key, value in parts.items():
            length = width * value / longest
            paint = palette.get(key, colour(0))
            tip = f"{name}, {key}: {quantity(value, unit)}" if key else f"{name}: {quantity(value, unit)}"
            if value:
                body.append(_box(x, y, length, _BAR, paint, tip=tip))
            share = f"{value / totals[name]:.0%}" if key and value else ""
            if share and length > text_width(share) + 6:
                style = f' fill="{ink(paint)}" font-size="11" pointer-events="none"'
                body.append(label(x + length / 2, y + 13, share, anchor="middle", extra=style))
            x += length
        amounts.append(label(x + 6, y + 13, quantity(totals[name], unit), extra=_HALO))
    bottom = top + len(bars) * _ROW
    if reference is not None:
        x = left + width * reference / longest
        body.append(
            f'<line x1="{x:.1f}" y1="{top - 4:.1f}" x2="{x:.1f}" y2="{bottom - 4:.1f}" stroke="currentColor" '
            'stroke-opacity="0.6" stroke-dasharray="4 3" pointer-events="none"/>'
        )
    return drawing(bottom + 4, title, body + amounts, kind="bars")


def _total(name: str, parts: Mapping[str, float]) -> float:
    for value in parts.values():
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"The bar '{name}' has the value {value}: a bar has a length. Leave out what has none.")
    return sum(parts.values())


def _box(x: float, y: float, width: float, height: float, paint: str, *, tip: str = "") -> str:
    shape = f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:g}" fill="{paint}"'
    return f'{shape} class="mark"><title>{escape(tip)}</title></rect>' if tip else f"{shape}/>"


def _mark(index: int, x: float, y: float, *, tip: str = "") -> str:
    """A point; its form differs from series to series, as its colour does."""
    corners = ((), ((-5, -5), (5, -5), (5, 5), (-5, 5)), ((0, -6), (6, 5), (-6, 5)), ((0, -6), (6, 0), (0, 6), (-6, 0)))
    form = corners[index % len(corners)]
    attributes = f'fill="{colour(index)}"' + (' class="mark"' if tip else "")
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    if not form:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {attributes}>{inner}</circle>'
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in form)
    return f'<polygon points="{path}" {attributes}>{inner}</polygon>'


def _shows_zero(values: Sequence[float]) -> bool:
    """Whether an axis may begin at 0 and its points still use half of it."""
    return bool(values) and min(values) < 0.5 * max(values)


def _label_places(x: float, y: float, width: float) -> list[tuple[float, float]]:
    """Left end and baseline of a label: beside the point, above, below, then further away."""
    near = [(x + 9, y + 4), (x - 9 - width, y + 4), (x - width / 2, y - 10), (x - width / 2, y + 19)]
    return near + [(x + dx, y + 4 + dy) for dy in (-14, 16, -24, 28) for dx in (6, -6 - width)]


def _inside(box: tuple[float, float, float, float], frame: Frame) -> bool:
    return box[0] > frame.left and box[2] < frame.right and box[1] > frame.top and box[3] < frame.bottom


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
