"""What the MoE layers of a model did in training, added up without waiting for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.moe.layer import MoELayer, moe_layers
from lightning_efficient.moe.topology import Axis
from lightning_efficient.moe.traffic import Traffic, count_traffic


@dataclass(slots=True)
class MoEStats:
    """What one rank did.

    Args:
        steps: backward passes whose gradients were synced.
        rows: rows that the experts of this rank computed in forward.
        assignments: of this rank's tokens to experts.
        layers: what the layers sent.
        gradients: what the sync of gradients sent.
        buckets: of gradients that were sent.
        overlapped: those of them that left while backward ran.
        forwards: of all layers.
    """

    steps: int = 0
    rows: int = 0
    assignments: int = 0
    layers: Traffic = field(default_factory=Traffic)
    gradients: Traffic = field(default_factory=Traffic)
    buckets: int = 0
    overlapped: int = 0
    forwards: int = 0
    _dropped: Tensor | None = None
    _peaks: Tensor | None = None

    @property
    def dropped(self) -> int:
        """Assignments that found no slot. Reading it waits for the device."""
        return 0 if self._dropped is None else int(self._dropped)

    @property
    def dropped_share(self) -> float:
        """Share of the assignments that found no slot. Reading it waits for the device."""
        return self.dropped / max(1, self.assignments)

    @property
    def peaks(self) -> float:
        """Sum over the forwards of the busiest expert's load over the mean load, of the tokens of the rank's MP group.

        Reading it waits for the device.
        """
        return 0.0 if self._peaks is None else float(self._peaks)

    @property
    def bytes_sent(self) -> int:
        """By layers and the sync of gradients."""
        return self.layers.total_bytes + self.gradients.total_bytes

    @property
    def bytes_by_axis(self) -> dict[Axis, int]:
        """The same by group of ranks."""
        sent: Counter[Axis] = Counter()
        for traffic in (self.layers, self.gradients):
            for (_, axis), n_bytes in traffic.bytes.items():
                sent[axis] += n_bytes
        return dict(sent)

    def add_forward(self, layer: MoELayer) -> None:
        """Count the last forward of a layer."""
        if layer.stats is None:
            return
        self.rows += layer.stats.rows
        self.assignments += layer.stats.assignments
        self.forwards += 1
        counts_E = layer.router.counts(layer.stats.load)
        peak = counts_E.max() / counts_E.mean().clamp_min(1e-9)  # 0 where there are no tokens
        self._dropped = layer.stats.dropped if self._dropped is None else self._dropped + layer.stats.dropped
        self._peaks = peak if self._peaks is None else self._peaks + peak


class Meter:
    """Counts forwards in training and, while :meth:`counting`, what they and backward send.

    Args:
        module: with MoE layers.
        stats: to which is added.
    """

    def __init__(self, module: nn.Module, stats: MoEStats) -> None:
        self.stats = stats
        self._open = False
        self._hooks = [layer.register_forward_hook(self._count) for _, layer in moe_layers(module)]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what layers send while the context is open; one within another changes nothing."""
        if self._open:
            yield
            return
        self._open = True
        try:
            with count_traffic(self.stats.layers):
                yield
        finally:
            self._open = False

    def _count(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if layer.training and torch.is_grad_enabled():
            assert isinstance(layer, MoELayer)
            self.stats.add_forward(layer)
