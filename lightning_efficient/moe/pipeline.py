"""A mixture-of-experts layer by a schedule: split, send, compute, send back, merge, in chunks that overlap.

Dimension letters: S tokens of a rank, M model size, E experts, N slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from typing_extensions import override

from lightning_efficient.moe import collectives
from lightning_efficient.moe.collectives import start, wait
from lightning_efficient.moe.experts import Experts
from lightning_efficient.moe.layout import Layout, lay_out, lay_out_together
from lightning_efficient.moe.ops import invert, permute, unpermute
from lightning_efficient.moe.ragged import RaggedTransport, exchange_counts
from lightning_efficient.moe.router import Router, Routing
from lightning_efficient.moe.schedule import Schedule
from lightning_efficient.moe.topology import Group, MoETopology
from lightning_efficient.moe.transports import ChunkTransport, EvenTransport


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What a layer did.

    Args:
        schedule: in which order it communicated.
        load: ``Routing.load`` over all tokens of the MP group.
        tokens: how many those are.
        assignments: of this rank's tokens to experts: of its part of them, where they are split before the gate.
        dropped: those of them that found no slot, a scalar tensor.
        rows: rows that the experts of this rank computed.
    """

    schedule: Schedule
    load: Tensor
    tokens: int
    assignments: int
    dropped: Tensor
    rows: int


def run_schedule(
    x_SM: Tensor,
    router: Router,
    experts: Experts,
    *,
    topology: MoETopology,
    schedule: Schedule,
    seed: int | None = None,
) -> tuple[Tensor, LayerStats]:
    """Run the layer.

    The gradient of the router's weight is a share: the sum over the MP group is the whole one, whatever the schedule.

    Args:
        x_SM: the tokens, equal on all ranks of an MP group.
        router: equal on all ranks.
        experts: those of this rank.
        topology: the groups.
        schedule: in which order.
        seed: of the router's noise, equal on an MP group; None: no noise.

    Returns:
        (S, M), equal on an MP group, and what was done.
    """
    run = _Run(router, experts, topology, schedule)
    noisy_SM = x_SM if seed is None else router.noise(x_SM, seed)
    if schedule.split == "before":
        return run.split_before_gate(x_SM, noisy_SM)
    if schedule.split == "after":
        return run.split_after_gate(x_SM, noisy_SM)
    return run.with_gathered_tokens(x_SM)


class _Run:
    """One pass of a layer."""

    def __init__(self, router: Router, experts: Experts, topology: MoETopology, schedule: Schedule) -> None:
        self.router, self.experts, self.topology, self.schedule = router, experts, topology, schedule
        self.rows = 0

    def split_before_gate(self, x_SM: Tensor, noisy_SM: Tensor) -> tuple[Tensor, LayerStats]:
        """S1: each rank of an MP group routes its part of the tokens, with the capacity of that part."""
        mp, S = self.topology.mp, x_SM.shape[0]
        part = -(-S // mp.size)
        mine = min(part, max(0, S - mp.rank * part))  # less on the last ranks, where S does not divide

        def own(tokens: Tensor) -> Tensor:
            return collectives.split(_pad_rows(tokens, part * mp.size), mp)[:mine]

        x_sM = own(x_SM)
        routing = self.router(x_sM if noisy_SM is x_SM else own(noisy_SM), slots_for=part)
        load = start(routing.load, mp, collectives.sum_shares)
        layout = lay_out(routing, chunks=self.schedule.chunks, packed=self.schedule.packed)
        y_NM = self._through_experts(permute(x_sM, layout.slot_Sk, layout.source_N, dtype=_dtype(x_SM)), layout)
        y_sM = unpermute(y_NM, routing.weight_Sk, layout.slot_Sk, layout.source_N)
        y_SM = collectives.merge(_pad_rows(y_sM, part), mp)[:S]
        return y_SM, self._stats(wait(load), S, layout.slot_Sk)

    def split_after_gate(self, x_SM: Tensor, noisy_SM: Tensor) -> tuple[Tensor, LayerStats]:
        """S2, and the order of DeepSpeed: all ranks of an MP group route all tokens, and each sends its slots."""
        routing = self._route(noisy_SM)
        shares, chunks, packed = self.topology.mp.size, self.schedule.chunks, self.schedule.packed
        layout = lay_out(routing, chunks=chunks, shares=shares, packed=packed)
        y_NM = self._through_experts(permute(x_SM, layout.slot_Sk, layout.source_N, dtype=_dtype(x_SM)), layout)
        y_SM = unpermute(y_NM, routing.weight_Sk, layout.slot_Sk, layout.source_N)
        return y_SM, self._stats(routing.load, x_SM.shape[0], layout.slot_Sk)

    def with_gathered_tokens(self, x_SM: Tensor) -> tuple[Tensor, LayerStats]:
        """The paper's baseline: all ranks of an ESP group route the tokens of all, and all MP ranks do so alike."""
        esp = self.topology.esp
        x_GSM = collectives.gather(x_SM, esp).view(esp.size, *x_SM.shape)
        routings = []
        for rank, tokens in enumerate(x_GSM):
            with torch.set_grad_enabled(torch.is_grad_enabled() and rank == esp.rank):  # own tokens teach the gate
                routings.append(self._route(tokens))
        mine = routings[esp.rank]
        layouts = lay_out_together(routings)
        rows_NM = permute(x_GSM.flatten(0, 1), layouts.slot_Sk, layouts.source_N, dtype=_dtype(x_SM))
        y_NM = self._through_experts(rows_NM, layouts)
        slot_Sk = layouts.slot_Sk.view(esp.size, x_SM.shape[0], -1)[esp.rank]
        y_SM = unpermute(y_NM, mine.weight_Sk, slot_Sk, invert(slot_Sk, y_NM.shape[0]))
        return y_SM, self._stats(mine.load, x_SM.shape[0], slot_Sk)

    def _route(self, x_SM: Tensor) -> Routing:
        """Route tokens that all ranks of the MP group have: each gives its share of the gradient."""
        routing: Routing = self.router(x_SM, _share_of_gradient(self.router.weight, self.topology.mp.size))
        return routing

    def _through_experts(self, rows_NM: Tensor, layout: Layout) -> Tensor:
        """Send the buffer to the experts, chunk by chunk, and return what they made of it, in the same places."""
        schedule, after = self.schedule, self.schedule.split == "after"
        mp = self.topology.mp if after else Group("mp")
        weights = self.experts.weights(rows_NM.dtype)
        if schedule.split == "gather":  # all MP ranks send the same rows
            weights = weights.map(lambda weight: _share_of_gradient(weight, self.topology.mp.size))
        ways = self._ways(layout, rows_NM.device)
        pieces = rows_NM.split(layout.chunk_sizes)
        shares = [start(piece, mp, collectives.split) for piece in pieces]
        if schedule.overlap == "merge" and isinstance(ways[0], EvenTransport):
            back = ways[0].send_together([wait(share) for share in shares], weights)
        else:
            there = [way.send(wait(share)) for way, share in zip(ways, shares, strict=True)]
            back = [way.send_back(way.compute(flight, weights)) for way, flight in zip(ways, there, strict=True)]
        merged = []
        for way, flight, piece in zip(ways, back, pieces, strict=True):
            y_NM = _pad_rows(way.land(flight), piece.shape[0] // mp.size)
            merged.append(start(y_NM, mp, collectives.merge))
        parts = [wait(flight) for flight in merged]
        self.rows = sum(way.rows for way in ways)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _ways(self, layout: Layout, device: torch.device) -> Sequence[ChunkTransport]:
        kind = self.schedule.transport
        if layout.slots is not None:
            return [EvenTransport(kind, self.topology, self.experts) for _ in range(layout.chunks)]
        share = self.topology.mp.rank if self.schedule.split == "after" else 0
        sent_CE = torch.tensor([chunk[share] for chunk in layout.counts])
        counts = exchange_counts(sent_CE, self.topology, kind)
        return [RaggedTransport(kind, self.topology, self.experts, each, device) for each in counts]

    def _stats(self, load: Tensor, tokens: int, slot_Sk: Tensor) -> LayerStats:
        return LayerStats(self.schedule, load, tokens, slot_Sk.numel(), (slot_Sk < 0).sum(), self.rows)


def _pad_rows(x_NM: Tensor, rows: int) -> Tensor:
    missing = rows - x_NM.shape[0]
    return F.pad(x_NM, (0, 0, 0, missing)) if missing else x_NM


def _dtype(x: Tensor) -> torch.dtype:
    """What autocast would compute in, or what there is."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _share_of_gradient(weight: Tensor, ranks: int) -> Tensor:
    """Return the weight; its gradient is divided among ranks that compute the same."""
    if ranks == 1:
        return weight
    shared: Tensor = _DivideGradient.apply(weight, ranks)  # type: ignore[no-untyped-call]
    return shared


class _DivideGradient(Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, by: int) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] / ctx.by, None
