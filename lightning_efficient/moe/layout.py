"""Where each assignment lies in the buffer that is sent: by chunk, MP rank, expert, and place in the expert's queue.

The buffer of N slots is cut into chunks that are sent one after the other, and each chunk into equal blocks, one for
each MP rank that sends a share of it (one block where tokens were split before the gate). A block has rows of expert
0, then of expert 1, ...: equally many (T slots, filled or not), or as many as there are (without a capacity, or
packed).

Dimension letters: S tokens, k choices per token, E experts, T slots per expert, N slots of the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_efficient.moe.ops import invert
from lightning_efficient.moe.router import Routing


@dataclass(frozen=True, slots=True)
class Layout:
    """The slots of a buffer.

    Args:
        slot_Sk: of each assignment; -1 where it was dropped.
        source_N: the assignment s * k + j of each slot, -1 where it is empty.
        chunks: into how many parts the buffer is cut, of equal size where there is a capacity.
        shares: blocks of each chunk.
        slots: T of a block and chunk; None where rows are as many as there are.
        counts: rows by chunk, share and expert, on the host, where rows are as many as there are.
    """

    slot_Sk: Tensor
    source_N: Tensor
    chunks: int
    shares: int
    slots: int | None = None
    counts: tuple[tuple[tuple[int, ...], ...], ...] = ()

    @property
    def chunk_sizes(self) -> list[int]:
        """Rows of each chunk."""
        N = self.source_N.shape[0]
        if self.slots is not None:
            return [N // self.chunks] * self.chunks
        return [self.shares * block_size(shares) for shares in self.counts]


def lay_out(routing: Routing, *, chunks: int = 1, shares: int = 1, packed: bool = False) -> Layout:
    """Give each assignment a slot.

    Args:
        routing: what goes where.
        chunks: parts that are sent one after the other.
        shares: blocks of each, one for each rank that sends one.
        packed: no slots that stay empty.
    """
    if routing.capacity is None or packed:
        return _ragged(routing, chunks, shares)
    E, T = routing.counts_E.shape[0], slots_of_a_part(routing.capacity, chunks * shares)
    place_Sk = routing.position_Sk
    # Queue position -> (share, chunk, slot), the first T * chunks positions to share 0, as a slice of the slots.
    share_Sk, rest_Sk = place_Sk // (T * chunks), place_Sk % (T * chunks)
    block_Sk = rest_Sk // T * shares + share_Sk
    slot_Sk = (block_Sk * E + routing.expert_Sk) * T + rest_Sk % T
    slot_Sk = slot_Sk.masked_fill(place_Sk >= routing.capacity, -1)
    return Layout(slot_Sk, invert(slot_Sk, chunks * shares * E * T), chunks, shares, slots=T)


def lay_out_together(routings: Sequence[Routing]) -> Layout:
    """Give the assignments of several groups of tokens slots in one buffer: by expert, then group.

    Args:
        routings: of the groups, which have equally many tokens.

    Returns:
        The layout of all tokens, group after group.
    """
    counts_GE = torch.stack([each.counts_E for each in routings])
    capacity = routings[0].capacity
    sizes_GE = counts_GE if capacity is None else torch.full_like(counts_GE, capacity)
    sizes_E = sizes_GE.sum(0)
    first_GE = (sizes_E.cumsum(0) - sizes_E) + sizes_GE.cumsum(0) - sizes_GE
    slots = []
    for first_E, each in zip(first_GE, routings, strict=True):
        slot_Sk = first_E[each.expert_Sk] + each.position_Sk
        slots.append(slot_Sk if capacity is None else slot_Sk.masked_fill(each.position_Sk >= capacity, -1))
    slot_Sk = torch.cat(slots)
    if capacity is not None:
        T = capacity * len(routings)
        return Layout(slot_Sk, invert(slot_Sk, T * counts_GE.shape[1]), 1, 1, slots=T)
    counts = tuple(sizes_E.tolist())
    return Layout(slot_Sk, invert(slot_Sk, sum(counts)), 1, 1, counts=((counts,),))


def slots_of_a_part(capacity: int, parts: int) -> int:
    """Return the slots of an expert in each part of a buffer: T / parts, rounded up."""
    return -(-capacity // parts)


def block_size(shares: tuple[tuple[int, ...], ...]) -> int:
    """Return the rows of a block of a chunk: those of its largest share."""
    return max(sum(counts) for counts in shares)


def _ragged(routing: Routing, chunks: int, shares: int) -> Layout:
    """Part p of P of each queue of n holds the positions from floor(p n / P) on; parts count shares first."""
    parts, T = chunks * shares, routing.capacity
    counts_E = routing.counts_E if T is None else routing.counts_E.clamp(max=T)
    counts = counts_E.tolist()  # waits for the device: sizes of what is sent must be known to the host
    begins_PE = torch.tensor([[part * n // parts for n in counts] for part in range(parts + 1)])
    sizes_PE = begins_PE.diff(dim=0)
    # Part number share * chunks + chunk lies at block chunk * shares + share.
    order = torch.arange(parts).view(shares, chunks).T.flatten()
    by_chunk = sizes_PE[order].view(chunks, shares, -1)
    blocks = tuple(tuple(tuple(one) for one in chunk) for chunk in by_chunk.tolist())
    sizes = [block_size(chunk) for chunk in blocks for _ in range(shares)]
    ends = torch.tensor(sizes).cumsum(0)
    first_in_block_PE = by_chunk.flatten(0, 1).cumsum(1) - by_chunk.flatten(0, 1)
    first_PE = torch.empty_like(sizes_PE)
    first_PE[order] = first_in_block_PE + (ends - torch.tensor(sizes))[:, None]

    device = routing.position_Sk.device
    begins_PE, first_PE = begins_PE.to(device), first_PE.to(device)
    expert_Sk, place_Sk = routing.expert_Sk, routing.position_Sk
    n_Sk = counts_E[expert_Sk]
    # The part p with floor(p n / P) <= place < floor((p + 1) n / P).
    part_Sk = (((place_Sk + 1) * parts - 1) // n_Sk).clamp(max=parts - 1)
    slot_Sk = first_PE[part_Sk, expert_Sk] + place_Sk - begins_PE[part_Sk, expert_Sk]
    slot_Sk = slot_Sk.masked_fill(place_Sk >= n_Sk, -1)
    return Layout(slot_Sk, invert(slot_Sk, int(ends[-1])), chunks, shares, counts=blocks)
