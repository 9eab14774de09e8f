"""The parts that plots share: colours, text that fits, ticks, scales and the frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from lightning_efficient.dissect.report.numbers import number, quantity, scale, scaled

# Okabe and Ito's palette: told apart with any colour vision, and visible on white and on black.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c8c8c", "#f0e442")
WIDTH = 720.0
FONT = 12.0
_CHARACTER = 0.66 * FONT  # wider than the mean glyph of the usual sans-serif faces
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


def text_width(text: str) -> float:
    """Return an upper estimate of a text's width in pixels at :data:`FONT`."""
    return _CHARACTER * len(text)


def shorten(text: str, width: float) -> str:
    """Return the text, cut in the middle with an ellipsis where it would be wider than ``width`` pixels."""
    room = max(3, int(width / _CHARACTER))
    if len(text) <= room:
        return text
    head = (room - 1) // 2
    return f"{text[:head]}\u2026{text[len(text) - (room - 1 - head) :]}"


def colour(index: int) -> str:
    """Return the colour of a series; they repeat after eight."""
    return PALETTE[index % len(PALETTE)]


def ink(background: str) -> str:
    """Return black or white, whichever contrasts more with a colour such as ``#0072b2``."""
    channels = [int(background[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"


def label(x: float, y: float, text: str, *, anchor: str = "start", extra: str = "") -> str:
    """Return a text element; its content is escaped."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def drawing(height: float, title: str, body: Sequence[str], *, kind: str) -> str:
    """Return the SVG element that holds a plot.

    Args:
        height: in pixels at the full width.
        title: shown above, and read aloud.
        body: the elements.
        kind: class of the element, such as ``bars``.
    """
    name = escape(title, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart {kind}" role="img" aria-label="{name}" '
        f'viewBox="0 0 {WIDTH:g} {height:.0f}" width="100%" style="max-width:{WIDTH:g}px" '
        f'font-family="system-ui, sans-serif" font-size="{FONT:g}" fill="currentColor">\n'
        f"<title>{escape(title)}</title>\n"
        + label(0, 16, shorten(title, WIDTH * FONT / 14), extra=' font-size="14" font-weight="600"')
        + "\n"
        + "\n".join(body)
        + "\n</svg>"
    )


def legend(names: Sequence[str], *, left: float, top: float, shape: Callable[[int, float, float], str]) -> list[str]:
    """Return the elements of a legend, wrapped to the width; :func:`legend_height` says how high it is."""
    return [
        element
        for index, (x, y, text) in enumerate(_legend_places(names, left=left))
        for element in (shape(index, left + x + 6, top + y - 4), label(left + x + 16, top + y, text))
    ]


def legend_height(names: Sequence[str], *, left: float) -> float:
    """Return the height of :func:`legend` in pixels."""
    return (_legend_places(names, left=left)[-1][1] if names else 0.0) + 6


def _legend_places(names: Sequence[str], *, left: float) -> list[tuple[float, float, str]]:
    places, x, y = [], 0.0, FONT
    for name in names:
        text = shorten(name, 200)
        width = 16 + text_width(text) + 14
        if x and left + x + width > WIDTH:
            x, y = 0.0, y + 18
        places.append((x, y, text))
        x += width
    return places


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a plot.

    Attributes:
        name: what stands beside it.
        ticks: values and their texts.
        low: value at its start.
        high: value at its end.
        log: whether equal lengths are equal ratios.
    """

    name: str
    ticks: tuple[tuple[float, str], ...]
    low: float
    high: float
    log: bool

    def at(self, value: float) -> float:
        """Return where a value lies, 0 at the start and 1 at the end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis(values: Sequence[float], name: str, *, log: bool = False, unit: str = "", from_zero: bool = False) -> Axis:
    """Return an axis that holds the values, with round ticks.

    Args:
        values: finite; above 0 on a logarithmic axis.
        name: what stands beside it.
        log: whether it is logarithmic.
        unit: of the values; see :func:`lightning_efficient.dissect.report.numbers.scale`.
        from_zero: whether a linear axis of positive values starts at 0.

    Raises:
        ValueError: no values, one that is not finite, or one not above 0 on a logarithmic axis.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(
            f"The axis '{name}' cannot be drawn ({'no values' if not values else 'a value is not finite'}): a plot "
            "needs finite numbers. Leave out what was not measured, and the plot where nothing was."
        )
    low, high = min(values), max(values)
    if log:
        if low <= 0:
            raise ValueError(f"The axis '{name}' holds {low}: a logarithm needs values above 0. Draw it linearly.")
        return _log_axis(low, high, name, unit)
    if from_zero and low > 0:
        low = 0.0
    if low == high:
        low, high = (low - 1, high + 1) if low == 0 else (min(low, 0.0), max(high, 0.0))
    factor, shown_unit = scale(max(abs(low), abs(high)), unit)
    rounded = [tick * factor for tick in _linear_ticks(low / factor, high / factor)]
    texts = tuple((tick, scaled(tick, factor, digits=4)) for tick in rounded)
    return Axis(f"{name} ({shown_unit})" if unit else name, _plain(texts), rounded[0], rounded[-1], False)


def _plain(ticks: tuple[tuple[float, str], ...]) -> tuple[tuple[float, str], ...]:
    """Drop zeros after the point that no tick needs: 0.500, 1.000 read 0.5, 1."""
    texts = [text for _, text in ticks]
    while all(text.endswith("0") for text in texts if "." in text) and any("." in text for text in texts):
        texts = [(text[:-1].rstrip(".") if "." in text else text) for text in texts]
    return tuple((value, text) for (value, _), text in zip(ticks, texts, strict=True))


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in _STEPS if step * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_axis(low: float, high: float, name: str, unit: str) -> Axis:
    base = 2.0 if unit == "B" else 10.0
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    last = max(last, first + 1)
    values = [base**power for power in range(first, last + 1, max(1, math.ceil((last - first) / 8)))]
    if base == 10.0 and last - first <= 2:
        values = [digit * base**power for power in range(first, last) for digit in (1, 2, 5)] + [base**last]
    return Axis(name, tuple((value, _tick(value, unit)) for value in values), base**first, base**last, True)


def _tick(value: float, unit: str) -> str:
    if unit:
        return quantity(value, unit)
    if value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    factor, prefix = scale(value, "") if value >= 1e5 else (1.0, "")
    return f"{number(round(value / factor, 9), digits=1)}{prefix}"


@dataclass(frozen=True, slots=True)
class Frame:
    """The rectangle that a plot with two axes draws in.

    Attributes:
        x: the axis below.
        y: the axis at the left.
        left: pixels.
        top: pixels.
        right: pixels.
        bottom: pixels.
    """

    x: Axis
    y: Axis
    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def of(cls, x: Axis, y: Axis, *, top: float, height: float) -> Frame:
        """Return a frame with room for the texts of its axes; its plot is ``height`` pixels high."""
        left = max(text_width(text) for _, text in y.ticks) + 32
        return cls(x, y, left, top, WIDTH - max(16.0, text_width(x.ticks[-1][1]) / 2 + 4), top + height)

    @property
    def height(self) -> float:
        """Pixels from the top of the drawing to the end of the axis's name."""
        return self.bottom + 44

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixels of a point."""
        return (
            self.left + self.x.at(x) * (self.right - self.left),
            self.bottom - self.y.at(y) * (self.bottom - self.top),
        )

    def draw(self) -> list[str]:
        """Return grid, ticks and names."""
        parts, ends = [], -math.inf
        for value, text in self.x.ticks:
            x, _ = self.place(value, self.y.low)
            parts.append(_line(x, self.top, x, self.bottom))
            if x - text_width(text) / 2 > ends:  # a tick whose text would touch the last one stays without
                parts.append(label(x, self.bottom + 17, text, anchor="middle"))
                ends = x + text_width(text) / 2 + 4
        for value, text in self.y.ticks:
            _, y = self.place(self.x.low, value)
            parts.append(_line(self.left, y, self.right, y))
            parts.append(label(self.left - 6, y + 4, text, anchor="end"))
        middle = (self.top + self.bottom) / 2
        name = shorten(self.y.name, self.bottom - self.top)
        parts.append(label((self.left + self.right) / 2, self.bottom + 36, self.x.name, anchor="middle"))
        parts.append(label(14, middle, name, anchor="middle", extra=f' transform="rotate(-90 14 {middle:.1f})"'))
        return parts


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" stroke-opacity="0.15"/>'
    )
