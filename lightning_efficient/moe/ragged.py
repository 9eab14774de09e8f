"""The transports of :mod:`.transports` for rows as many as there are: no capacity, nothing is dropped or padded.

All-to-alls have parts of unequal sizes. Collectives over ESP need equal ones: rows are padded to the most that a rank
of the group has, and taken out again by an index that also brings them into the order of experts.

Dimension letters: E experts, L experts of a rank, N rows, M model size, P ranks of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_efficient.moe import collectives
from lightning_efficient.moe.collectives import Collective, Flight, Raw, start, wait
from lightning_efficient.moe.experts import Experts, ExpertWeights
from lightning_efficient.moe.schedule import Transport
from lightning_efficient.moe.topology import Group, MoETopology
from lightning_efficient.moe.traffic import note
from lightning_efficient.moe.transports import add_shards


def uneven_all_to_all(send: Sequence[int], receive: Sequence[int]) -> Collective:
    """Return an all-to-all of parts of these sizes, rows to and from each rank."""
    return Collective(_raw_uneven(send, receive), _raw_uneven(receive, send))


def _raw_uneven(send: Sequence[int], receive: Sequence[int]) -> Raw:
    def run(x: Tensor, group: Group, asynchronous: bool) -> tuple[Tensor, Any]:
        out = x.new_empty((sum(receive), *x.shape[1:]))
        note("all_to_all", group.axis, (sum(send) - send[group.rank]) * math.prod(x.shape[1:]), x.element_size())
        work = dist.all_to_all_single(
            out, x, list(receive), list(send), group=group.process_group, async_op=asynchronous
        )
        return out, work

    return run


def exchange_counts(counts_CE: Tensor, topology: MoETopology, kind: Transport) -> list[RaggedCounts]:
    """Tell the owners of experts how many rows will come, for all chunks at once.

    Args:
        counts_CE: rows of this rank by chunk and expert, on the host.
        topology: the groups.
        kind: how rows travel.

    Returns:
        By chunk: what the transport needs to know.
    """
    C, E = counts_CE.shape
    EP, ESP = topology.ep.size, topology.esp.size
    device = "cpu" if topology.mesh is None else topology.mesh.device_type
    by_owner = counts_CE.view(C, EP, E // EP).transpose(0, 1).contiguous().to(device)
    if kind == "fused":
        by_owner = by_owner[:, None].expand(-1, ESP, -1, -1).flatten(0, 1)
        arriving = collectives.all_to_all(by_owner, topology.block)
    else:
        arriving = collectives.all_to_all(by_owner, topology.ep)
    gathers = kind in ("hierarchical", "all_reduce")
    gathered = collectives.merge(arriving, topology.esp).cpu() if gathers else None
    arriving = arriving.cpu()
    gathered = arriving if gathered is None else gathered
    return [RaggedCounts(counts_CE[chunk], arriving[:, chunk], gathered[:, chunk]) for chunk in range(C)]


@dataclass(frozen=True, slots=True)
class RaggedCounts:
    """Rows of a chunk, on the host.

    Args:
        sent_E: of this rank, by expert.
        arriving_PL: to this rank, by source and expert here.
        gathered_PL: to all ranks of the ESP group, where their rows are gathered; else the same.
    """

    sent_E: Tensor
    arriving_PL: Tensor
    gathered_PL: Tensor


class RaggedTransport:
    """Rows as many as there are.

    Args:
        kind: how they travel.
        topology: the groups.
        experts: what computes.
        counts: of the chunk.
        device: where the rows are.
    """

    def __init__(
        self, kind: Transport, topology: MoETopology, experts: Experts, counts: RaggedCounts, device: torch.device
    ) -> None:
        self.kind, self.topology, self.experts = kind, topology, experts
        EP, ESP = topology.ep.size, topology.esp.size
        self.sent = int(counts.sent_E.sum())
        to_owner = counts.sent_E.view(EP, -1).sum(1).tolist()
        if kind == "fused":
            self.group = topology.block
            send = [rows for rows in to_owner for _ in range(ESP)]
            self.copies = _places_of_copies(to_owner, ESP).to(device) if ESP > 1 else None
        else:
            self.group, send, self.copies = topology.ep, to_owner, None
        receive = counts.arriving_PL.sum(1).tolist()
        self.arriving = sum(receive)
        self.there, self.back = uneven_all_to_all(send, receive), uneven_all_to_all(receive, send)
        # Rows of all sources in the order of experts; sources of other ESP ranks begin after padding.
        blocks = ESP if kind in ("hierarchical", "all_reduce") else 1
        per_block = counts.gathered_PL.view(blocks, -1, counts.gathered_PL.shape[-1])
        self.padded = int(per_block.sum((1, 2)).max())
        self.order = _by_expert(per_block, self.padded).to(device)
        self.counts = counts.gathered_PL.sum(0).tolist()
        self.rows = sum(self.counts)

    def send(self, x_NM: Tensor) -> Flight:
        """Start the all-to-all to the owners of the experts; fused, with a copy for each shard."""
        x_NM = x_NM[: self.sent]
        if self.copies is not None:
            x_NM = x_NM.index_select(0, _rows_of_copies(self.copies))
        return start(x_NM, self.group, self.there)

    def compute(self, flight: Flight, weights: ExpertWeights) -> Tensor:
        """Gather the rows of the ESP group where need be, run the experts, and add up or scatter the partial sums."""
        x_NM, esp = wait(flight), self.topology.esp
        if self.kind == "hierarchical":
            gathered = collectives.gather(_pad(x_NM, self.padded), esp)
            return collectives.reduce_scatter(self._run(gathered, weights), esp)[: self.arriving]
        if self.kind == "all_reduce":
            gathered = collectives.replicated(collectives.merge(_pad(x_NM, self.padded), esp), esp)
            return collectives.split(collectives.sum_shares(self._run(gathered, weights), esp), esp)[: self.arriving]
        y_NM = self._run(x_NM, weights)
        return collectives.all_reduce(y_NM, esp) if self.kind == "plain" else y_NM

    def send_back(self, y_NM: Tensor) -> Flight:
        """Start the all-to-all back."""
        return start(y_NM, self.group, self.back)

    def land(self, flight: Flight) -> Tensor:
        """Wait; fused, add up the partial sums of the shards."""
        y_NM = wait(flight)
        if self.copies is None:
            return y_NM
        return add_shards(y_NM.index_select(0, self.copies.flatten()).view(*self.copies.shape, y_NM.shape[1]), 0)

    def _run(self, x_NM: Tensor, weights: ExpertWeights) -> Tensor:
        y_NM = self.experts(x_NM.index_select(0, self.order), weights, self.counts)
        return torch.zeros_like(x_NM).index_copy_(0, self.order, y_NM)


def _pad(x_NM: Tensor, rows: int) -> Tensor:
    missing = rows - x_NM.shape[0]
    return torch.cat((x_NM, x_NM.new_zeros(missing, x_NM.shape[1]))) if missing else x_NM


def _places_of_copies(to_owner: Sequence[int], ESP: int) -> Tensor:
    """Return (ESP, N): where copy s of row n lies, if the rows of each owner are sent ESP times in a row."""
    sizes = torch.tensor(to_owner)
    begins = sizes.cumsum(0) - sizes
    within_N = torch.arange(int(sizes.sum())) - begins.repeat_interleave(sizes)
    first_N = (begins * ESP).repeat_interleave(sizes) + within_N
    return first_N + torch.arange(ESP)[:, None] * sizes.repeat_interleave(sizes)


def _rows_of_copies(places_SN: Tensor) -> Tensor:
    """Return which row lies at each place."""
    rows = torch.empty(places_SN.numel(), dtype=torch.int64, device=places_SN.device)
    rows[places_SN.flatten()] = torch.arange(places_SN.shape[1], device=rows.device).repeat(places_SN.shape[0])
    return rows


def _by_expert(counts_BPL: Tensor, block: int) -> Tensor:
    """Return the rows in the order of experts, of blocks that hold rows by source and expert, and then padding."""
    by_source = counts_BPL.flatten(1)
    begins = by_source.cumsum(1) - by_source + block * torch.arange(counts_BPL.shape[0])[:, None]
    sizes = counts_BPL.permute(2, 0, 1).flatten()
    begins = begins.view(counts_BPL.shape).permute(2, 0, 1).flatten()
    ends = sizes.cumsum(0)
    return (begins - (ends - sizes)).repeat_interleave(sizes) + torch.arange(int(ends[-1]))
