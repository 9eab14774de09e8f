"""Sets of times as sorted, disjoint intervals of integers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union, sorted and disjoint."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def overlap(start: int, end: int, disjoint: list[Interval]) -> int:
    """Return the length of ``[start, end)`` that lies in a union."""
    first = max(bisect_right(disjoint, (start, 0)) - 1, 0)
    total = 0
    for low, high in disjoint[first:]:
        if low >= end:
            break
        total += max(0, min(end, high) - max(start, low))
    return total


def length(disjoint: list[Interval]) -> int:
    """Return the length of a union."""
    return sum(end - start for start, end in disjoint)
