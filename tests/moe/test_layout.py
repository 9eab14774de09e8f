"""Each kept assignment has one slot, in the block of its expert; blocks are as the layout says."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_efficient.moe import Capacity, Router, Routing
from lightning_efficient.moe.layout import Layout, lay_out, lay_out_together, slots_of_a_part


def routing_of(S: int, E: int, k: int, factor: float | None, seed: int) -> Routing:
    torch.manual_seed(seed)
    routing: Routing = Router(3, E, k, capacity=Capacity(factor, minimum=1))(torch.randn(S, 3))
    return routing


def kept(routing: Routing) -> list[tuple[int, int]]:
    """Assignments that have a slot."""
    T = routing.capacity
    return [
        (s, j)
        for s, row in enumerate(routing.position_Sk.tolist())
        for j, place in enumerate(row)
        if T is None or place < T
    ]


def blocks(layout: Layout, E: int) -> dict[tuple[int, int, int], range]:
    """The slots of each chunk, share and expert, by the words of the documentation."""
    found, begin = {}, 0
    for chunk in range(layout.chunks):
        size = layout.chunk_sizes[chunk] // layout.shares
        for share in range(layout.shares):
            at = begin
            for e in range(E):
                rows = layout.slots if layout.slots is not None else layout.counts[chunk][share][e]
                found[chunk, share, e] = range(at, at + rows)
                at += rows
            assert at <= begin + size
            begin += size
    assert begin == layout.source_N.shape[0]
    return found


SIZES = st.tuples(st.integers(0, 17), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))


@given(SIZES, st.sampled_from([None, 0.5, 1.0, 8.0]), st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_each_kept_assignment_has_a_slot_of_its_expert(
    sizes: tuple[int, ...], factor: float | None, packed: bool, data: st.DataObject
) -> None:
    S, E, chunks, shares, seed = sizes
    k = data.draw(st.integers(1, E))
    routing = routing_of(S, E, k, factor, seed)
    layout = lay_out(routing, chunks=chunks, shares=shares, packed=packed)
    slot = layout.slot_Sk.tolist()
    mine = kept(routing)
    assert {(s, j) for s in range(S) for j in range(k) if slot[s][j] >= 0} == set(mine)
    assert len({slot[s][j] for s, j in mine}) == len(mine)
    source = layout.source_N.tolist()
    assert all(source[slot[s][j]] == s * k + j for s, j in mine)
    assert sum(each >= 0 for each in source) == len(mine)
    by_block = blocks(layout, E)
    queues: dict[int, list[tuple[int, tuple[int, int], int]]] = {e: [] for e in range(E)}
    for (chunk, share, e), slots in by_block.items():
        for n in slots:
            if source[n] >= 0:
                s, j = divmod(source[n], k)
                assert int(routing.expert_Sk[s, j]) == e
                queues[e].append((int(routing.position_Sk[s, j]), (share, chunk), n))
    for queue in queues.values():
        queue.sort()
        assert [place for place, *_ in queue] == list(range(len(queue)))
        assert [part for _, part, _ in queue] == sorted(part for _, part, _ in queue)  # shares take a run of the queue
    if layout.slots is None:  # no more slots than rows, and rows spread evenly
        for e in range(E):
            rows = [len(by_block[chunk, share, e]) for chunk in range(chunks) for share in range(shares)]
            assert sum(rows) == len(queues[e])
            assert max(rows) - min(rows) <= 1
    else:
        assert layout.slots == slots_of_a_part(routing.capacity or 0, chunks * shares)


@pytest.mark.parametrize("factor", [None, 0.7, 4.0])
def test_groups_of_tokens_lie_together_by_expert(factor: float | None) -> None:
    E, k, S = 4, 2, 9
    routings = [routing_of(S, E, k, factor, seed) for seed in range(3)]
    layout = lay_out_together(routings)
    slots = layout.slot_Sk.view(3, S, k).tolist()
    order = []
    for g, routing in enumerate(routings):
        assert {(s, j) for s, j in itertools.product(range(S), range(k)) if slots[g][s][j] >= 0} == set(kept(routing))
        order += [
            (slots[g][s][j], (int(routing.expert_Sk[s, j]), g, int(routing.position_Sk[s, j])))
            for s, j in kept(routing)
        ]
    assert len({slot for slot, _ in order}) == len(order)
    assert [key for _, key in sorted(order)] == sorted(key for _, key in order)
    if factor is None:
        assert [slot for slot, _ in sorted(order)] == list(range(len(order)))
        assert sum(layout.counts[0][0]) == 3 * S * k
    else:
        assert layout.slots == 3 * (routings[0].capacity or 0)
        for slot, (e, g, place) in order:
            assert slot == e * layout.slots + g * (routings[0].capacity or 0) + place
