"""What ranks send, and what they compute, is what the table of the research says, to the element.

Letters: S tokens of a rank, M model size, E experts, k choices, T slots per expert, q elements of the slots that an MP
rank sends; P ranks of a group.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_efficient.moe import (
    SCHEDULES,
    FixedSchedule,
    MoELayer,
    MoESizes,
    MoETopology,
    Traffic,
    count_traffic,
    parallelize,
    schedule_named,
)
from lightning_efficient.moe.experts import local
from lightning_efficient.moe.traffic import note, without_counting
from tests.moe._grid import SOME_SPLITS, splits
from tests.support.collectives import count_collectives
from tests.support.ranks import run_ranks

M, H, E = 4, 8, 8
Sent = dict[tuple[str, str], int]


@dataclass(frozen=True, slots=True)
class Tokens:
    """How many there are, and how many slots they fill."""

    S: int
    k: int
    factor: float = 1.0


DIVISIBLE = Tokens(64, 2)
ODD = Tokens(13, 3, 1.3)
PADDED = [name for name, each in SCHEDULES.items() if not each.packed]


@dataclass(slots=True)
class Work:
    """What one rank sent and computed."""

    sizes: MoESizes
    tokens: Tokens
    label: str
    forward: Sent
    backward: Sent
    rows: int
    gate: list[int]
    calls: Counter[str]


def table(sizes: MoESizes, tokens: Tokens, label: str) -> tuple[Sent, Sent, int, list[int]]:
    """Forward, backward, rows of the experts, rows of each call of the gate: section 2.5 of the research."""
    MP, EP, ESP = sizes.model_parallel, sizes.expert_parallel, sizes.expert_sharding
    schedule, Q = schedule_named(label), EP * ESP
    S, c = tokens.S, schedule.chunks
    before = schedule.split == "before"
    part = math.ceil(S / MP)
    T = min(math.ceil(round(tokens.k * tokens.factor * (part if before else S) / E, 6)), part if before else S)
    shares = MP if schedule.split == "after" else 1
    T_sent = c * math.ceil(T / (shares * c))  # slots that this rank sends, of each expert, filled up to whole parts
    q = E * T_sent * M
    forward: Sent = {}
    backward: Sent = {}
    if schedule.split == "gather":
        forward["all_to_all", "ep"] = 2 * ESP * q * (EP - 1) // EP
        forward["all_gather", "esp"] = (ESP - 1) * S * M
        forward["all_reduce", "esp"] = 2 * q * (ESP - 1)
        backward = {**forward, ("reduce_scatter", "esp"): forward["all_gather", "esp"]}
        del backward["all_gather", "esp"]
        rows, gate = Q * E // EP * T_sent, [S] * ESP
    elif schedule.transport == "all_reduce":
        forward["all_to_all", "ep"] = 2 * q * (EP - 1) // EP
        forward["all_gather", "esp"] = (ESP - 1) * q
        forward["all_reduce", "esp"] = 2 * q * (ESP - 1)
        forward["all_gather", "mp"] = (MP - 1) * q
        backward = dict(forward)
    elif schedule.transport == "fused":
        forward["all_to_all", "block"] = 2 * ESP * q * (Q - 1) // Q
        forward["all_gather", "mp"] = (MP - 1) * (part * M if before else q)
        backward = dict(forward)
    else:
        forward["all_to_all", "ep"] = 2 * q * (EP - 1) // EP
        forward["all_gather", "esp"] = forward["reduce_scatter", "esp"] = (ESP - 1) * q
        forward["all_gather", "mp"] = (MP - 1) * (part * M if before else q)
        backward = dict(forward)
    if before:
        forward["all_reduce", "mp"] = round(2 * (2 * E + 1) * (MP - 1) / MP)  # the losses' sums over the tokens
    if schedule.split != "gather":
        rows, gate = Q * E // EP * T_sent, [S]
    return without_zeros(forward), without_zeros(backward), rows, gate


def without_zeros(sent: Sent) -> Sent:
    return {key: elements for key, elements in sent.items() if elements}


def gate_rows(sizes: MoESizes, tokens: Tokens, label: str, rank: int) -> list[int]:
    """S1 routes the own tokens only: the last ranks of a group have fewer where S does not divide."""
    if schedule_named(label).split != "before":
        return table(sizes, tokens, label)[3]
    part = math.ceil(tokens.S / sizes.model_parallel)
    return [min(part, max(0, tokens.S - rank % sizes.model_parallel * part))]


def _work(rank: int, world: int, sizes_of: list[MoESizes], tokens: list[Tokens], labels: list[str]) -> list[Work]:
    found = []
    for sizes in sizes_of:
        topology = MoETopology.create(sizes)
        for each in tokens:
            layer = MoELayer(M, H, E, each.k, capacity_factor=each.factor, min_capacity=1)
            parallelize(layer, topology, check_counts=False)
            gate: list[int] = []
            layer.router.register_forward_pre_hook(lambda _, args, seen=gate: seen.append(len(args[0])))
            with count_collectives() as issued:
                works = [_one(layer, sizes, each, label, gate) for label in labels]
            # gloo's own record: nothing is sent past the counters
            counted = sum((work.calls for work in works), Counter[str]())
            assert Counter(OPS[collective.op] for collective in issued) == counted
            found += works
    return found


def _one(layer: MoELayer, sizes: MoESizes, tokens: Tokens, label: str, gate: list[int]) -> Work:
    gate.clear()
    layer.scheduler = FixedSchedule(schedule_named(label))
    x_SM = torch.randn(tokens.S, M, requires_grad=True)
    with count_traffic() as forward:
        y_SM = layer(x_SM)
    with count_traffic() as backward:
        (y_SM.sum() + layer.aux_loss).backward()
    assert layer.stats is not None
    calls = Counter[str]()
    for (op, _), number in (*forward.calls.items(), *backward.calls.items()):
        calls["all_reduce" if op == "reduce_scatter" else op] += number
    return Work(sizes, tokens, label, sent(forward), sent(backward), layer.stats.rows, list(gate), calls)


OPS = {
    "all_to_all": "all_to_all",
    "_all_gather_base": "all_gather",
    "all_gather": "all_gather",
    "all_reduce": "all_reduce",
}
"""By the names of gloo, which makes a reduce-scatter of an all-reduce."""


def sent(traffic: Traffic) -> Sent:
    losses = ("all_reduce", "mp")  # a fraction of an element, where 2 E + 1 floats do not divide
    assert all(traffic.bytes[key] == 4 * elements for key, elements in traffic.elements.items() if key != losses)
    return without_zeros(dict(traffic.elements))


@pytest.mark.distributed
@pytest.mark.parametrize("tokens", [DIVISIBLE, ODD], ids=["divisible", "odd"])
def test_ranks_send_and_compute_what_the_table_says(tokens: Tokens) -> None:
    sizes = splits(4) if tokens is DIVISIBLE else SOME_SPLITS
    labels = PADDED if tokens is DIVISIBLE else [*PADDED, "s1_hier/3", "s2_saa/2"]
    ranks = run_ranks(_work, 4, sizes, [tokens], labels, timeout=160)
    assert len(ranks[0]) == len(sizes) * len(labels)
    for rank, found in enumerate(ranks):
        for each in found:
            forward, backward, rows, _ = table(each.sizes, each.tokens, each.label)
            assert each.forward == forward, each
            assert each.backward == backward, each
            assert each.rows == rows, each
            assert each.gate == gate_rows(each.sizes, each.tokens, each.label, rank), each
    if tokens is DIVISIBLE:
        assert_formulas_of_the_research(tokens)


def assert_formulas_of_the_research(tokens: Tokens) -> None:
    """Where everything divides, the table above is the research's, with ETM = k f S M and BLM = S M."""
    ETM, BLM = round(tokens.k * tokens.factor * tokens.S * M), tokens.S * M
    for MP, EP, ESP in ((2, 2, 2), (4, 1, 4), (2, 2, 1), (4, 4, 1)):
        sizes, q, Q = MoESizes(MP, EP, ESP), ETM // MP, EP * ESP
        s1, s2, hier, deepspeed = (table(sizes, tokens, label)[0] for label in ("s1", "s2", "s1_hier", "deepspeed"))
        assert s1["all_to_all", "block"] == s2["all_to_all", "block"] == 2 * ESP * q * (Q - 1) // Q
        assert s1["all_gather", "mp"] == (MP - 1) * BLM // MP
        assert s2["all_gather", "mp"] == deepspeed["all_gather", "mp"] == (MP - 1) * q
        assert hier.get(("all_to_all", "ep"), 0) == deepspeed.get(("all_to_all", "ep"), 0) == 2 * q * (EP - 1) // EP
        assert hier.get(("all_gather", "esp"), 0) == deepspeed.get(("all_gather", "esp"), 0) == (ESP - 1) * q


def _packed_work(rank: int, world: int, dropless: bool) -> list[dict[str, Any]]:
    topology = MoETopology.create(MoESizes(2, 2, 2))
    layer = MoELayer(M, H, E, 2, capacity_factor=None if dropless else 0.9, min_capacity=1)
    torch.nn.init.zeros_(layer.router.weight)
    with torch.no_grad():
        layer.router.weight[:2] = 1.0  # with positive tokens: all go to the first two experts
    parallelize(layer, topology, check_counts=False)
    found = []
    for label in ("s1", "s2") if dropless else ("s1_packed", "s2_packed"):
        layer.scheduler = FixedSchedule(schedule_named(label))
        with count_traffic() as traffic:
            layer(torch.rand(16, M) + 0.1)
        assert layer.stats is not None
        found.append({"rows": layer.stats.rows, "sent": dict(traffic.elements)})
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("dropless", [True, False])
def test_no_row_is_sent_or_computed_for_an_empty_slot(dropless: bool) -> None:
    """16 tokens, 2 choices, all of experts 0 and 1, which the first rank of each EP group owns."""
    ranks = run_ranks(_packed_work, 4, dropless, timeout=120)
    for number, split in enumerate(("before", "after")):
        T = math.ceil(2 * 0.9 * (8 if split == "before" else 16) / E)
        kept = 16 if dropless else (2 * T if split == "before" else T)  # rows of each rank
        for rank, found in enumerate(ranks):
            owner = rank < 2
            assert found[number]["rows"] == (4 * kept if owner else 0)
            # To both shards of the owner's EP rank, less what stays here, and back; 4 x 2 x 4 counts of rows.
            there = kept * M * (1 if owner else 2)
            back = 3 * kept * M if owner else 0
            counts = 2 * E * 3 // 4
            assert found[number]["sent"]["all_to_all", "block"] == there + back + counts


def _parameters(rank: int, world: int) -> list[tuple[MoESizes, int, int]]:
    found = []
    for sizes in SOME_SPLITS:
        layer = MoELayer(M, H, E, 2, activation="gelu", bias=True)
        parallelize(layer, MoETopology.create(sizes))
        held = [local(each).untyped_storage().nbytes() for each in layer.experts.parameters()]
        found.append((sizes, sum(held), sum(local(each).nbytes for each in layer.experts.parameters())))
    return found


@pytest.mark.distributed
def test_a_rank_holds_its_share_of_the_experts_only() -> None:
    for found in run_ranks(_parameters, 4, timeout=120):
        assert len(found) == len(SOME_SPLITS)
        for sizes, storage, values in found:
            E_l, H_l = E // sizes.expert_parallel, H // sizes.expert_sharding
            assert storage == values == 4 * E_l * (2 * M * H_l + H_l + M)


def test_counters_count_what_a_ring_sends_and_nest() -> None:
    with count_traffic() as outer:
        note("all_reduce", "mp", 6, 4)
        with count_traffic() as inner, without_counting():
            note("all_reduce", "mp", 100, 4)
        note("all_reduce", "dp", 2, 2)
    note("all_reduce", "mp", 100, 4)
    assert outer.elements == {("all_reduce", "mp"): 6, ("all_reduce", "dp"): 2}
    assert outer.calls == {("all_reduce", "mp"): 1, ("all_reduce", "dp"): 1}
    assert outer.total_bytes == 28
    assert not inner.calls
