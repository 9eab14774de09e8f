"""How a number reads: the one place that chooses prefixes, digits and spaces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

_SPACE = "\u00a0"  # a number and its unit stay on one line
_PREFIXES: dict[str, tuple[tuple[float, str], ...]] = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "\u00b5s"), (1e-9, "ns")),
    "B": ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "%": ((1e-2, "%"),),
    "x": ((1.0, "\u00d7"),),
}
_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_LARGEST_PLAIN = 1e5  # 3 412 tokens/s reads better than 3.41 k tokens/s


def scale(largest: float, unit: str) -> tuple[float, str]:
    """Return the factor and the name of the unit that suit a value.

    Args:
        largest: in the base unit; the largest where several values share a unit.
        unit: ``s``, ``B`` (bytes), ``%`` or ``x`` (of ratios), ``""`` (no unit), or any other word, such as
            ``tokens/s`` or ``FLOP``, which gets a decimal prefix.

    Returns:
        The factor to divide by, and the unit to write, such as ``(1e-3, "ms")``.
    """
    size = abs(largest)
    if unit in _PREFIXES:
        steps = _PREFIXES[unit]
        return next((step for step in steps if size >= step[0]), steps[0] if not size else steps[-1])
    if size < _LARGEST_PLAIN:
        return 1.0, unit
    factor, prefix = next(step for step in _DECIMAL if size >= step[0])
    joint = " " if "/" in unit and prefix == "k" else ""
    return factor, f"{prefix}{joint}{unit}" if unit else prefix


def number(value: float, *, digits: int = 3) -> str:
    """Return a number with so many significant digits, without an exponent, thousands set apart.

    Args:
        value: any number; whole numbers keep all their digits.
        digits: significant digits of the others.
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}" if value != int(value) else f"{int(value):,}"
    return text.replace(",", _SPACE)


def quantity(value: float | None, unit: str = "", *, digits: int = 3) -> str:
    """Return a value with the unit that suits it, such as ``12.3 ms``, ``1.5 MiB`` or ``3 412 tokens/s``.

    Args:
        value: in the base unit; None reads as a dash.
        unit: see :func:`scale`.
        digits: significant digits.
    """
    if value is None:
        return "\u2013"
    if not math.isfinite(value):
        return f"{value}{_SPACE}{unit}".rstrip()
    factor, name = scale(value, unit)
    text = f"{value:.2f}" if unit == "x" else scaled(value, factor, digits=digits)
    joint = "" if unit == "x" or (not unit and name) else _SPACE
    return f"{text}{joint}{name}".rstrip()


def scaled(value: float, factor: float, *, digits: int = 3) -> str:
    """Return the number of a value whose unit stands elsewhere, such as in a table's head."""
    shown = value / factor
    if factor == 1.0 and isinstance(value, int):
        return number(value)
    return number(round(shown) if abs(shown) >= 10 ** (digits - 1) else shown, digits=digits)


def column(values: Sequence[float], factor: float, *, digits: int = 3) -> list[str]:
    """Return the numbers of a column with the same decimals: ``digits`` significant ones for the largest.

    Args:
        values: in the base unit.
        factor: of the unit in the column's head.
        digits: significant digits of the largest; a small value keeps one at least, and whole numbers have no decimals.
    """
    shown = [value / factor for value in values]
    whole = all(math.isfinite(value) and value == int(value) for value in shown)
    top = largest(shown)
    decimals = 0 if whole or not top else max(0, digits - 1 - math.floor(math.log10(top)))
    texts = []
    for value in shown:
        needed = -math.floor(math.log10(abs(value))) if math.isfinite(value) and value else 0
        text = f"{value:,.{max(decimals, needed)}f}" if value and math.isfinite(value) else number(value)
        texts.append(text.replace(",", _SPACE))
    return texts


def largest(values: Iterable[object]) -> float:
    """Return the largest finite magnitude among the numbers of a mixed sequence, 0 if there is none."""
    numbers = (abs(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value))
    return float(max(numbers, default=0.0))
