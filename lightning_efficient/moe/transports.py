"""How a chunk of rows travels to the ranks that own its experts, and what they made of it travels back.

Rows here fill a capacity: equally many for each expert, so that all parts are equal. :mod:`.ragged` has the same
transports for rows as many as there are.

Dimension letters: E experts, L experts of a rank, T slots of an expert in the chunk, M model size, R rows of an expert
on its rank, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_efficient.moe import collectives
from lightning_efficient.moe.collectives import Flight, start, wait
from lightning_efficient.moe.experts import Experts, ExpertWeights
from lightning_efficient.moe.schedule import Transport
from lightning_efficient.moe.topology import MoETopology


class ChunkTransport(Protocol):
    """The way of one chunk. ``send`` and ``send_back`` start what the next step waits for.

    Attributes:
        rows: that the experts of this rank have computed.
    """

    rows: int

    def send(self, x_NM: Tensor) -> Flight:
        """Start the way to the experts: rows of all experts, in order."""
        ...

    def compute(self, flight: Flight, weights: ExpertWeights) -> Tensor:
        """Wait, run the experts of this rank, and return what goes back, (N, M)."""
        ...

    def send_back(self, y_NM: Tensor) -> Flight:
        """Start the way back."""
        ...

    def land(self, flight: Flight) -> Tensor:
        """Wait, and return rows as ``send`` took them, (N, M)."""
        ...


class EvenTransport:
    """Rows that fill a capacity.

    Args:
        kind: how they travel.
        topology: the groups.
        experts: what computes.
    """

    def __init__(self, kind: Transport, topology: MoETopology, experts: Experts) -> None:
        self.kind, self.experts = kind, experts
        self.EP, self.ESP = topology.ep.size, topology.esp.size
        self.topology = topology
        self.rows = 0
        self.group = topology.block if kind == "fused" else topology.ep

    def send(self, x_NM: Tensor) -> Flight:
        """Start the all-to-all to the owners of the experts; fused, with a copy for each shard."""
        if self.kind == "fused" and self.ESP > 1:
            x_NM = x_NM.view(self.EP, 1, -1, x_NM.shape[-1]).expand(-1, self.ESP, -1, -1).flatten(0, 2)
        return start(x_NM, self.group, collectives.all_to_all)

    def compute(self, flight: Flight, weights: ExpertWeights, chunks: int = 1) -> Tensor:
        """Gather the rows of the ESP group where need be, run the experts, and add up or scatter the partial sums."""
        x_NM, esp = wait(flight), self.topology.esp
        if self.kind == "hierarchical":
            return collectives.reduce_scatter(self._run(collectives.gather(x_NM, esp), weights), esp)
        if self.kind == "all_reduce":
            rows = collectives.replicated(collectives.merge(x_NM, esp), esp)
            return collectives.split(collectives.sum_shares(self._run(rows, weights), esp), esp)
        y_NM = self._run(x_NM, weights, chunks)
        return collectives.all_reduce(y_NM, esp) if self.kind == "plain" else y_NM

    def send_together(self, pieces: Sequence[Tensor], weights: ExpertWeights) -> list[Flight]:
        """Send the rows of all chunks at once, run the experts, and start the ways back one by one.

        Args:
            pieces: rows of each chunk, as ``send`` takes them.
            weights: of this rank.

        Returns:
            The flights back, by chunk.
        """
        chunks, M = len(pieces), pieces[0].shape[-1]
        x_NM = torch.stack([piece.view(self.EP, -1, M) for piece in pieces], 1).flatten(0, 2)
        y_NM = self.compute(self.send(x_NM), weights, chunks)
        return [self.send_back(y.flatten(0, 1)) for y in y_NM.view(self.group.size, chunks, -1, M).unbind(1)]

    def send_back(self, y_NM: Tensor) -> Flight:
        """Start the all-to-all back."""
        return start(y_NM, self.group, collectives.all_to_all)

    def land(self, flight: Flight) -> Tensor:
        """Wait; fused, add up the partial sums of the shards."""
        y_NM = wait(flight)
        if self.kind != "fused" or self.ESP == 1:
            return y_NM
        return add_shards(y_NM.view(self.EP, self.ESP, -1, y_NM.shape[-1]), 1).flatten(0, 1)

    def _run(self, x_NM: Tensor, weights: ExpertWeights, chunks: int = 1) -> Tensor:
        """Rows by source, chunk and expert -> by expert, through the experts, and back."""
        L, M = weights.into_EMN.shape[0], x_NM.shape[-1]
        self.rows += x_NM.shape[0]
        x_SLTM = x_NM.view(self._sources * chunks, L, x_NM.shape[0] // (self._sources * chunks * L), M)
        y_LRM: Tensor = self.experts(x_SLTM.transpose(0, 1).reshape(L, x_NM.shape[0] // L, M), weights)
        return y_LRM.view(L, *x_SLTM.shape[::2], M).transpose(0, 1).reshape(x_NM.shape)

    @property
    def _sources(self) -> int:
        """Ranks whose rows the experts of this rank see, counted as often as they were gathered."""
        return self.EP if self.kind == "plain" else self.EP * self.ESP


def add_shards(y: Tensor, dim: int) -> Tensor:
    """Add partial sums, in float32 where they are narrower."""
    if y.dtype in (torch.float16, torch.bfloat16):
        return y.sum(dim, dtype=torch.float32).to(y.dtype)
    return y.sum(dim)
