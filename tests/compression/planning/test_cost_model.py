"""The cost model against closed forms, timelines worked out by hand, torch's own bucketing, and published shapes."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_efficient.compression.planning.cost_methods import (
    ACPCost,
    DenseCost,
    LowRankCost,
    Method,
    PowerCost,
    SignCost,
    TopKCost,
)
from lightning_efficient.compression.planning.cost_model import (
    MIB,
    DeviceModel,
    LinkModel,
    Workload,
    assign_buckets,
)
from lightning_efficient.compression.planning.timeline import estimate_step
from tests.benchmarks.published_models import PUBLISHED

# A second per message and one per 1000 bytes: timelines below can be followed by hand.
SLOW = LinkModel(alpha_s=1.0, beta_s_per_byte=0.001)
FREE = LinkModel(alpha_s=0.0, beta_s_per_byte=0.0)
KIB_250 = (250,)  # 1000 bytes of float32
WAIT_FREE_METHODS: list[Method] = [
    DenseCost(),
    DenseCost(wire_itemsize=2),
    ACPCost(rank=2),
    PowerCost(rank=2, schedule="wait_free"),
    TopKCost(density=0.01),
    SignCost(),
]


# ---- collectives ----------------------------------------------------------------------------------------------------


def test_ring_all_reduce_costs_two_rounds_of_w_minus_one_messages():
    # W = 4, N = 1000: 6 messages of alpha = 1 s; 6/4 * 1000 bytes at 1 ms each.
    assert SLOW.all_reduce_s(1000, world_size=4) == pytest.approx(6 + 1.5)


def test_ring_all_gather_costs_one_message_from_each_other_rank():
    assert SLOW.all_gather_s(1000, world_size=4) == pytest.approx(3 * (1 + 1.0))


def test_one_rank_communicates_for_free():
    assert SLOW.all_reduce_s(1e9, world_size=1) == SLOW.all_gather_s(1e9, world_size=1) == 0.0


def test_link_from_rate_moves_that_many_bits():
    link = LinkModel.from_rate(100e6, latency_s=2e-4)
    assert link.bits_per_s == pytest.approx(100e6)
    # With W = 2 a ring all-reduce sends each byte once: 12.5 MB take a second.
    assert link.all_reduce_s(12.5e6, world_size=2) == pytest.approx(1.0 + 2 * 2e-4)


def test_all_gather_grows_with_the_ranks_and_all_reduce_saturates():
    gather = [SLOW.all_gather_s(1e6, world_size=w) for w in (8, 64)]
    reduce = [LinkModel(0.0, 0.001).all_reduce_s(1e6, world_size=w) for w in (8, 64)]
    assert gather[1] / gather[0] == pytest.approx(63 / 7)
    assert reduce[1] / reduce[0] == pytest.approx((63 / 64) / (7 / 8))


# ---- buckets --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    numels=st.lists(st.integers(1, 400_000), min_size=1, max_size=30),
    cap=st.one_of(st.none(), st.sampled_from([0.01, 0.5, 1.0, 2.0, 25.0])),
)
def test_buckets_equal_those_of_torch(numels, cap):
    limits = [MIB, 25 * MIB] if cap is None else [int(cap * MIB)]
    theirs, _ = dist._compute_bucket_assignment_by_size([torch.empty(n, device="meta") for n in numels], limits)
    assert [list(bucket) for bucket in assign_buckets([4 * n for n in numels], bucket_cap_mb=cap)] == theirs


def test_default_first_bucket_is_one_mebibyte_and_an_explicit_cap_holds_for_all():
    assert [len(b) for b in assign_buckets([MIB] * 60)] == [1, 25, 25, 9]
    assert [len(b) for b in assign_buckets([MIB] * 60, bucket_cap_mb=25)] == [25, 25, 10]


# ---- timelines worked out by hand -----------------------------------------------------------------------------------


def test_second_bucket_waits_for_the_link_not_for_backward():
    # Two gradients of 1000 bytes, ready after 5 s and 10 s; W = 2: an all-reduce takes 2 * 1 + 1000 * 0.001 = 3 s
    # and so hides the first, and exposes the second.
    workload = Workload.from_work([KIB_250, KIB_250], forward_s=4.0, backward_s=10.0)
    step = estimate_step(DenseCost(), workload, SLOW, world_size=2, bucket_cap_mb=1e-6)
    assert step.buckets == step.collectives == 2
    assert step.step_s == pytest.approx(4 + 10 + 3)
    assert step.exposed_s == pytest.approx(3)
    # A slower link: the first ends at 5 + 12 = 17, the second right after.
    slower = LinkModel(alpha_s=5.5, beta_s_per_byte=0.001)
    step = estimate_step(DenseCost(), workload, slower, world_size=2, bucket_cap_mb=1e-6)
    assert step.step_s == pytest.approx(4 + 5 + 12 + 12)


def test_one_big_bucket_hides_nothing():
    workload = Workload.from_work([KIB_250, KIB_250], forward_s=4.0, backward_s=10.0)
    step = estimate_step(DenseCost(), workload, SLOW, world_size=2, bucket_cap_mb=25)
    assert step.step_s == pytest.approx(4 + 10 + 2 + 2)


def test_rounds_of_power_sgd_depend_on_each_other_and_acp_sends_one():
    # One 100 x 50 matrix at rank 2, W = 2: P is 800 bytes (2.8 s), Q 400 bytes (2.4 s).
    workload = Workload.from_work([(100, 50)], forward_s=1.0, backward_s=1.0)
    qr_only = DeviceModel(orthogonalize_s=0.5)
    power = PowerCost(rank=2, used_flags=False, schedule="wait_free")
    step = estimate_step(power, workload, SLOW, world_size=2, device=qr_only)
    assert step.step_s == pytest.approx(2 + 2.8 + 0.5 + 2.4)
    step = estimate_step(ACPCost(rank=2, used_flags=False), workload, SLOW, world_size=2, device=qr_only)
    assert step.step_s == pytest.approx(2 + (2.8 + 2.4) / 2 + 0.5)
    assert (step.collectives, step.payload_bytes) == (1, 600)


def test_link_serves_the_next_bucket_while_power_sgd_computes_q():
    # Two equal matrices, ready after 1 s and 2 s. P takes 2.8 s, Q 2.4 s, the QR between them 10 s. Link: P1 1-3.8,
    # P2 3.8-6.6. Device: QR1 3.8-13.8, QR2 13.8-23.8. Link: Q1 13.8-16.2, Q2 23.8-26.2.
    workload = Workload.from_work([(100, 50), (100, 50)], forward_s=0.0, backward_s=2.0)
    power = PowerCost(rank=2, used_flags=False, schedule="wait_free")
    device = DeviceModel(orthogonalize_s=10.0)
    step = estimate_step(power, workload, SLOW, world_size=2, bucket_cap_mb=1e-6, device=device)
    assert step.step_s == pytest.approx(26.2)


def test_blocking_hook_stalls_backward_and_after_backward_fuses_all():
    # A matrix ready after 10 s, one element after 15 s, a matrix after 20 s. The element shares the second's bucket.
    workload = Workload.from_work([(100, 50), (1,), (100, 50)], forward_s=0.0, backward_s=20.0, work=[5, 5, 10])
    times = {}
    for schedule in ("wait_free", "blocking", "after_backward"):
        method = PowerCost(rank=2, used_flags=False, schedule=schedule)
        times[schedule] = estimate_step(method, workload, SLOW, world_size=2, bucket_cap_mb=0.01).step_s
    # Wait-free exposes the last bucket's 5.204 s (the first one's Q leaves between two gradients, at 15 s); blocking
    # exposes both buckets; fused saves the latencies of one of them (2 x 2 s).
    assert times == pytest.approx({"wait_free": 25.204, "blocking": 30.404, "after_backward": 26.404})


def test_compression_delays_backward_and_decompression_ends_the_step():
    workload = Workload.from_work([(100, 50), (100, 50)], forward_s=0.0, backward_s=2.0)
    device = DeviceModel(per_op_s=1.0)  # each operation takes a second: ACP has 2 before and 3 after the collective
    step = estimate_step(ACPCost(rank=2), workload, FREE, world_size=2, bucket_cap_mb=1e-6, device=device)
    assert step.compression_s == pytest.approx(10)
    assert step.step_s == pytest.approx(12)
    assert step.exposed_s == pytest.approx(0)


# ---- invariants -----------------------------------------------------------------------------------------------------

shapes_strategy = st.lists(
    st.one_of(st.tuples(st.integers(1, 300)), st.tuples(st.integers(1, 90), st.integers(1, 90))),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(
    shapes=shapes_strategy,
    method=st.sampled_from(WAIT_FREE_METHODS),
    world_size=st.integers(1, 16),
    cap=st.sampled_from([1e-4, 1e-2, 25.0]),
    alpha=st.floats(0, 1e-2),
    beta=st.floats(0, 1e-5),
)
def test_step_is_at_least_each_resource_and_at_most_their_sum(shapes, method, world_size, cap, alpha, beta):
    workload = Workload.from_work(shapes, forward_s=0.01, backward_s=0.02)
    link = LinkModel(alpha, beta)
    device = DeviceModel(1e9, 1e9, 1e-5, 1e-4)
    step = estimate_step(method, workload, link, world_size=world_size, bucket_cap_mb=cap, device=device)
    # Any collective of the method costs the link its messages plus its bytes on the wire.
    messages = (world_size - 1) * (1 if isinstance(method, TopKCost | SignCost) else 2)
    link_s = step.collectives * messages * alpha + step.wire_bytes * beta
    slack = 1e-9 * (step.compute_s + link_s)
    assert max(step.compute_s, link_s) - slack <= step.step_s <= step.compute_s + link_s + slack


@pytest.mark.parametrize("method", WAIT_FREE_METHODS, ids=lambda m: m.name)
def test_free_link_leaves_compute_alone(method):
    workload = Workload.from_work([(64, 32)] * 5, forward_s=0.1, backward_s=0.2)
    step = estimate_step(method, workload, FREE, world_size=8, bucket_cap_mb=0.01, device=DeviceModel(1e9, 1e9, 1e-5))
    assert step.step_s == pytest.approx(step.compute_s)
    assert step.compute_s == pytest.approx(0.3 + step.compression_s)


def test_payload_of_each_method_is_its_formula():
    shapes = [(40, 30), (20, 10, 3), (7,), ()]
    raw = 7 + 1
    acp = ACPCost(rank=2, used_flags=True)
    assert acp.payload_bytes(shapes, phase=0) == 4 * (2 * (40 + 20) + raw + 2)
    assert acp.payload_bytes(shapes, phase=1) == 4 * (2 * (30 + 30) + raw + 2)
    power = PowerCost(rank=2, used_flags=False)
    assert power.payload_bytes(shapes) == 4 * (2 * (40 + 20 + 30 + 30) + raw)
    d = 40 * 30 + 600 + 8
    assert DenseCost().payload_bytes(shapes) == 4 * d
    assert DenseCost(wire_itemsize=2).payload_bytes(shapes) == 2 * d
    assert SignCost(used_flags=False).payload_bytes(shapes) == math.ceil(d / 8)
    assert SignCost().payload_bytes(shapes) == math.ceil(d / 8) + len(shapes) + 1
    assert TopKCost(density=0.01).payload_bytes(shapes) == 8 * (12 + 6 + 1 + 1)  # per parameter, at least one


def test_matrices_that_would_not_shrink_are_sent_raw():
    compressed, raw = LowRankCost.split(ACPCost(rank=4), [(100, 100), (2, 1000), (1, 5), (0, 3), (3,)])
    assert compressed == [(100, 100, 4)]
    assert raw == 2000 + 5 + 0 + 3


def test_wire_bytes_follow_the_ring():
    workload = Workload.from_work([(1000,)], forward_s=0.1, backward_s=0.1)
    assert estimate_step(DenseCost(), workload, FREE, world_size=4).wire_bytes == pytest.approx(1.5 * 4000)
    assert estimate_step(SignCost(used_flags=False), workload, FREE, world_size=4).wire_bytes == 3 * 125


def test_gradients_become_ready_in_reverse_by_their_share_of_work():
    workload = Workload.from_work([(1,), (3,), (6,)], forward_s=0.0, backward_s=10.0)
    assert workload.ready_s == pytest.approx((10.0, 9.0, 6.0))
    assert workload.ready_order() == (2, 1, 0)
    assert Workload.from_work([(1,), (3,)], forward_s=0, backward_s=1, work=[3, 1]).ready_s == pytest.approx((1, 0.25))


# ---- the published models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions", "gradients_mib", "p_q_raw_mib", "power", "acp_p", "acp_q", "acp_mean"),
    [
        ("ResNet-50", 25.6, "97.5", ("0.42", "0.84", "0.21"), "66.5", "155", "93", "117"),
        ("ResNet-152", 60.2, "229.6", ("1.17", "2.59", "0.58"), "52.9", "131", "72", "93"),
        ("BERT-Base", 110.1, "420.0", ("14.1", "10.5", "0.59"), "16.7", "28.6", "37.8", "32.6"),
        ("BERT-Large", 336.2, "1282.6", ("31.0", "27.5", "1.36"), "21.4", "39.6", "44.4", "41.9"),
    ],
)
def test_compression_ratios_of_the_published_models_match_to_the_printed_digits(
    name, millions, gradients_mib, p_q_raw_mib, power, acp_p, acp_q, acp_mean
):
    def like(printed: str, value: float) -> str:
        return f"{value:.{len(printed.partition('.')[2])}f}"

    model = PUBLISHED[name]()
    assert round(model.parameters / 1e6, 1) == millions
    gradients = 4 * model.parameters
    assert like(gradients_mib, gradients / MIB) == gradients_mib
    # The reference compresses every matrix and sends no flags.
    settings = {"rank": model.rank, "min_compression_rate": 0.0, "used_flags": False}
    acp, power_sgd = ACPCost(**settings), PowerCost(**settings)
    compressed, raw = acp.split(model.shapes)
    parts = (sum(n * r for n, _, r in compressed), sum(m * r for _, m, r in compressed), raw)
    assert tuple(like(printed, 4 * part / MIB) for printed, part in zip(p_q_raw_mib, parts, strict=True)) == p_q_raw_mib
    p_bytes, q_bytes = (acp.payload_bytes(model.shapes, phase=phase) for phase in (0, 1))
    assert like(power, gradients / power_sgd.payload_bytes(model.shapes)) == power
    assert like(acp_p, gradients / p_bytes) == acp_p
    assert like(acp_q, gradients / q_bytes) == acp_q
    assert like(acp_mean, gradients / ((p_bytes + q_bytes) / 2)) == acp_mean


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinkModel(-1.0, 0.0), r"bad link \(alpha_s=-1\.0\)"),
        (lambda: LinkModel(0.0, math.nan), r"bad link \(beta_s_per_byte=nan\)"),
        (lambda: LinkModel.from_rate(0.0), r"bad link rate \(0\.0 bit/s\)"),
        (lambda: DeviceModel(flops_per_s=0), "bad device"),
        (lambda: ACPCost(rank=0), r"bad rank \(0\)"),
        (lambda: TopKCost(density=0.0), r"bad density \(0\.0\)"),
        (lambda: assign_buckets([4], bucket_cap_mb=0), r"bad bucket cap \(0 MiB\)"),
        (lambda: Workload((), (), 1.0, 1.0), r"bad workload \(0 shapes, 0 ready times\)"),
        (lambda: Workload(((4,),), (2.0,), 1.0, 1.0), r"bad workload \(gradients ready between 2\.0 and 2\.0 s"),
        (
            lambda: Workload.from_work([(4,)], forward_s=0, backward_s=1, work=[1, 2]),
            r"bad work \(2 costs for 1 shapes",
        ),
        (
            lambda: estimate_step(DenseCost(), Workload(((4,),), (1.0,), 1.0, 1.0), FREE, world_size=0),
            r"bad world size \(0\)",
        ),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
