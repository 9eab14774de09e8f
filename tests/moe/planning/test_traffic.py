"""The traffic of each schedule: against the closed forms of the research's table, and what the layer really sends."""

import math

import pytest
import torch

from lightning_efficient.moe import MoELayer, MoESizes, MoETopology, Traffic, count_traffic, parallelize
from lightning_efficient.moe.planning import LayerShape, rows, traffic
from lightning_efficient.moe.schedule import schedule_named
from tests.support.ranks import run_ranks

SPLITS = [
    (mp, ep, esp)
    for mp in (1, 2, 4, 8)
    for ep in (1, 2, 4, 8)
    for esp in (1, 2, 4)
    if 8 % mp == 0 and 8 % (ep * esp) == 0
]
LABELS = ["paper", "deepspeed", "s1", "s1/2", "s1/4", "s2", "s2/4", "s2_saa/2", "s1_hier", "s1_hier/4", "s2_hier/2"]
PACKED = ["s1_packed", "s1_hier_packed/2", "s2_packed/2", "s2_hier_packed"]
# Everything divides, hence the table's forms hold without padding.
EVEN = LayerShape(tokens=256, dim=16, hidden=32, num_experts=8, top_k=2, capacity_factor=1.0)


def sent(total: Traffic) -> dict[str, int]:
    """Elements by all-to-all, ESP and MP: the columns of the table."""
    columns = {"A2A": 0, "ESP": 0, "MP": 0}
    for (collective, axis), elements in total.elements.items():
        column = "A2A" if collective == "all_to_all" else axis.upper()
        if (collective, axis) != ("all_reduce", "mp"):  # the auxiliary sums, which the table leaves out
            columns[column] += elements
    return columns


def table(label: str, shape: LayerShape, mp: int, ep: int, esp: int) -> dict[str, float]:
    """Section 2.5, ETM = k f S M slots."""
    BLM = shape.tokens * shape.dim
    ETM = shape.top_k * BLM
    q, Q = ETM / mp, ep * esp
    fused = 2 * esp * q * (Q - 1) / Q
    two_steps = 2 * q * (ep - 1) / ep
    name = label.partition("/")[0]
    return {
        "paper": {
            "A2A": 2 * esp * ETM * (ep - 1) / ep,
            "ESP": (esp - 1) * BLM + 2 * ETM * (esp - 1),
            "MP": 0,
        },
        "deepspeed": {"A2A": two_steps, "ESP": (esp - 1) * q + 2 * q * (esp - 1), "MP": (mp - 1) * q},
        "s1": {"A2A": fused, "ESP": 0, "MP": (mp - 1) * BLM / mp},
        "s2": {"A2A": fused, "ESP": 0, "MP": (mp - 1) * q},
        "s2_saa": {"A2A": fused, "ESP": 0, "MP": (mp - 1) * q},
        "s1_hier": {"A2A": two_steps, "ESP": 2 * (esp - 1) * q, "MP": (mp - 1) * BLM / mp},
        "s2_hier": {"A2A": two_steps, "ESP": 2 * (esp - 1) * q, "MP": (mp - 1) * q},
    }[name]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("split", SPLITS)
def test_traffic_is_that_of_the_table(split, label, backward):
    sizes = MoESizes(*split)
    found = sent(traffic(schedule_named(label), EVEN, sizes, backward=backward))
    expected = table(label, EVEN, *split)
    assert found == expected


@pytest.mark.parametrize("split", [split for split in SPLITS if split[2] > 1])
def test_the_key_identity_between_one_all_to_all_and_two_steps(split):
    # Fused, q (ESP - 1) (1 - 1/EP) elements more travel in an all-to-all than over EP alone, in each direction.
    mp, ep, esp = split
    fused, two_steps = (sent(traffic(schedule_named(name), EVEN, MoESizes(*split))) for name in ("s1", "s1_hier"))
    q = EVEN.top_k * EVEN.tokens * EVEN.dim / mp
    total = sum(fused.values()) - sum(two_steps.values())
    assert total == pytest.approx(0)  # the same number of elements, over other links
    # What leaves the ESP groups: all but 1/EP of a fused all-to-all.
    across = 2 * esp * q * (1 - 1 / ep)
    assert across - two_steps["A2A"] == pytest.approx(2 * q * (esp - 1) * (1 - 1 / ep))


def test_rows_of_experts_and_gate():
    shape = LayerShape(tokens=100, dim=4, hidden=8, num_experts=8, top_k=2, capacity_factor=1.25, min_capacity=4)
    sizes = MoESizes(2, 2, 2)
    before = rows(schedule_named("s1/4"), shape, sizes)
    T = math.ceil(2 * 1.25 * 50 / 8)  # 16
    assert (before.gate, before.own, before.experts) == (50, 8 * T, 2 * 8 * T)
    after = rows(schedule_named("s2/4"), shape, sizes)
    T = 32  # ceil(31.25), a multiple of MP x chunks = 8
    assert (after.gate, after.slots, after.own, after.experts) == (100, 8 * T, 4 * T, 2 * 4 * T)
    # DeepSpeed's order keeps a half of each expert's slots, and gathers the halves of both shards.
    assert rows(schedule_named("deepspeed"), shape, sizes).experts == 8 * T
    paper = rows(schedule_named("paper"), shape, sizes)
    assert (paper.gate, paper.experts) == (200, 2 * 8 * 32)


def test_packed_rows_are_those_of_the_assignments_and_at_most_the_slots():
    shape = LayerShape(tokens=256, dim=4, hidden=8, num_experts=8, top_k=2, capacity_factor=1.25)
    sizes = MoESizes(2, 2, 2)
    assert rows(schedule_named("s1"), shape, sizes).own == 8 * 40
    assert rows(schedule_named("s1_packed"), shape, sizes).own == 2 * 128
    full = LayerShape(tokens=256, dim=4, hidden=8, num_experts=8, top_k=2, capacity_factor=0.5)
    assert rows(schedule_named("s1_packed"), full, sizes).own == rows(schedule_named("s1"), full, sizes).own == 8 * 16


def test_a_small_layer_has_its_least_capacity_and_no_more_slots_than_tokens():
    shape = LayerShape(tokens=2, dim=4, hidden=8, num_experts=8, top_k=1, capacity_factor=1.0, min_capacity=4)
    assert shape.capacity(64) == 8
    assert shape.capacity(16) == 4
    assert shape.capacity(2) == 2
    assert not shape.may_drop


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"top_k": 9}, "top_k is 9 of 8 experts"),
        ({"dtype": "float23"}, "dtype is 'float23'"),
    ],
)
def test_wrong_shapes_are_refused(values, said):
    good = {"tokens": 8, "dim": 4, "hidden": 8, "num_experts": 8, "top_k": 2}
    with pytest.raises(ValueError, match=said):
        LayerShape(**{**good, **values})


def expected_and_counted(rank, world_size, split, cases):
    sizes = MoESizes(*split)
    topology = MoETopology.create(sizes)
    found = []
    for S, f, matrices, dtype, label in cases:
        torch.manual_seed(0)
        activation = "swiglu" if matrices == 2 else "gelu"
        layer = MoELayer(8, 16, 8, 2, capacity_factor=f, activation=activation).to(dtype)
        parallelize(layer, topology)
        # Token s chooses experts s and s + 1 (modulo E): loads are even where S divides by E.
        x_SM = torch.eye(8, dtype=dtype).repeat(S // 8 + 1, 1)[:S].requires_grad_()
        with torch.no_grad():
            layer.router.weight.copy_(2 * torch.eye(8) + torch.eye(8).roll(1, 0))
        schedule, shape = schedule_named(label), LayerShape.of(layer, x_SM)
        with count_traffic() as forward:
            y_SM, stats = layer.run(x_SM, schedule)
        with count_traffic() as backward:
            torch.autograd.grad(y_SM, [x_SM, *layer.parameters()], torch.ones_like(y_SM))
        own = rows(schedule, shape, sizes)
        found.append((label, "rows", own.experts, stats.rows))
        for way, counted in (("forward", forward), ("backward", backward)):
            found.append((label, way, traffic(schedule, shape, sizes, backward=way == "backward"), counted))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("split", [(2, 2, 2), (2, 4, 1), (4, 4, 1), (1, 2, 2), (4, 2, 2), (1, 1, 4), (2, 1, 2)])
def test_the_layer_sends_exactly_what_is_expected(split):
    # 50 tokens and capacity 1.25 leave nothing to divide evenly: all padding is there.
    cases = [
        (S, f, matrices, dtype, label)
        for S, f, matrices, dtype in [
            (64, 1.0, 2, torch.float32),
            (50, 1.25, 1, torch.float32),
            (50, 4.0, 2, torch.bfloat16),
            (3, 1.25, 2, torch.float32),
            (256, None, 2, torch.float32),
            (256, 1.25, 2, torch.float32),
        ]
        for label in LABELS + (PACKED if S == 256 else [])
        if label != "deepspeed" or split[2] in (1, split[0])
    ]
    for of_rank in run_ranks(expected_and_counted, 4, split, cases, timeout=150):
        assert len(of_rank) == 3 * len(cases)
        for label, what, expected, counted in of_rank:
            assert expected == counted, (label, what)
