"""What the collectives of MoE layers send, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lightning_efficient.moe.topology import Axis


@dataclass(slots=True)
class Traffic:
    """Elements and bytes that this rank sent, and how often, by collective and group.

    A collective counts as what a ring sends: (n - 1) / n of the buffer for an all-to-all and a reduce-scatter,
    (n - 1) times the own part for an all-gather, and 2 (n - 1) / n of the buffer for an all-reduce.
    """

    elements: Counter[tuple[str, Axis]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, Axis]] = field(default_factory=Counter)
    calls: Counter[tuple[str, Axis]] = field(default_factory=Counter)

    def add(self, collective: str, axis: Axis, elements: float, element_size: int) -> None:
        """Count one call.

        Args:
            collective: ``all_to_all``, ``all_gather``, ``reduce_scatter`` or ``all_reduce``.
            axis: the group.
            elements: that this rank sent.
            element_size: bytes of one.
        """
        self.elements[collective, axis] += round(elements)
        self.bytes[collective, axis] += round(elements * element_size)
        self.calls[collective, axis] += 1

    @property
    def total_bytes(self) -> int:
        """Bytes over all collectives."""
        return sum(self.bytes.values())


_COUNTING: list[Traffic] = []


@contextmanager
def count_traffic(traffic: Traffic | None = None) -> Iterator[Traffic]:
    """Count what is sent while the context is open, forward and backward, by this process.

    Args:
        traffic: to which is added; None: a new one.
    """
    traffic = Traffic() if traffic is None else traffic
    _COUNTING.append(traffic)
    try:
        yield traffic
    finally:
        _COUNTING[:] = [each for each in _COUNTING if each is not traffic]  # equal ones may count on


@contextmanager
def without_counting() -> Iterator[None]:
    """Keep what is sent while the context is open from all counters: it is no part of what they count."""
    counting, _COUNTING[:] = list(_COUNTING), []
    try:
        yield
    finally:
        _COUNTING[:] = counting


def note(collective: str, axis: Axis, elements: float, element_size: int) -> None:
    """Tell all open counters of one call."""
    for traffic in _COUNTING:
        traffic.add(collective, axis, elements, element_size)
