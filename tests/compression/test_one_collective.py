"""One all-reduce per bucket and synchronised backward, started while backward runs and from its own thread."""

import threading
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.compression import ACPSGD, Compressor, PowerSGD, register_compressor
from tests.compression.harness import batch, close, make_model
from tests.compression.reference import compressed_shapes, initial_basis
from tests.support.collectives import Collective, count_collectives
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CAPS_MB = [0.002, 0.01, 1, 25, 1000]
MAKERS = {"acp_sgd": partial(ACPSGD, rank=2), "power_sgd": partial(PowerSGD, rank=2), "plain": None}


def _collectives(rank: int, world_size: int) -> dict[tuple[str, float], dict[str, Any]]:
    results = {}
    for cap in CAPS_MB:
        for kind, make in MAKERS.items():
            ddp = DistributedDataParallel(make_model(), bucket_cap_mb=cap)
            compressor = register_compressor(ddp, make()) if make else None
            per_backward: list[list[Collective]] = []
            # Step 0 has one bucket, in step 1 DDP rebuilds them, step 2 accumulates without communication.
            for step, synced in enumerate([True, True, False, True, True]):
                x, y = batch(step, rank, world_size)
                with nullcontext() if synced else ddp.no_sync():
                    loss = F.cross_entropy(ddp(x), y)  # the forward pass may rebuild the buckets: a broadcast
                    with count_collectives() as seen:
                        loss.backward()
                per_backward.append(seen)
            results[kind, cap] = {
                "seen": per_backward,
                "thread": threading.get_ident(),
                "stats": compressor.stats.as_dict() if compressor else None,
            }
    return results


@pytest.fixture(scope="module")
def counted() -> list[dict[tuple[str, float], dict[str, Any]]]:
    return run_ranks(_collectives, 2)


def _buckets(by_run: Any, cap: float) -> list[int]:
    """Buckets per backward: what DDP's own reducer all-reduces without a hook."""
    return [len(seen) for seen in by_run["plain", cap]["seen"]]


@pytest.mark.parametrize("cap", CAPS_MB)
def test_one_all_reduce_per_bucket_and_synced_backward_and_none_in_no_sync(counted: Any, cap: float) -> None:
    for by_run in counted:
        buckets = _buckets(by_run, cap)
        assert buckets[0] == 1
        assert buckets[2] == 0
        assert (buckets[3] > 1) == (cap < 1)
        seen = by_run["acp_sgd", cap]["seen"]
        assert [len(s) for s in seen] == buckets
        assert {c.op for s in seen for c in s} == {"all_reduce"}


@pytest.mark.parametrize("cap", CAPS_MB)
def test_power_sgd_needs_two_all_reduces_per_bucket(counted: Any, cap: float) -> None:
    for by_run in counted:
        seen = by_run["power_sgd", cap]["seen"]
        assert [len(s) for s in seen] == [2 * n for n in _buckets(by_run, cap)]
        assert {c.op for s in seen for c in s} == {"all_reduce"}


@pytest.mark.parametrize("kind", ["acp_sgd", "power_sgd"])
def test_collectives_are_started_by_the_thread_of_backward_and_no_other(counted: Any, kind: str) -> None:
    for by_run in counted:
        for cap in CAPS_MB:
            run = by_run[kind, cap]
            assert {c.thread_id for s in run["seen"] for c in s} == {run["thread"]}


@pytest.mark.parametrize("kind", ["acp_sgd", "power_sgd"])
def test_every_rank_starts_the_same_collectives_in_the_same_order(counted: Any, kind: str) -> None:
    for cap in CAPS_MB:
        orders = [[[(c.op, c.numel) for c in s] for s in by_run[kind, cap]["seen"]] for by_run in counted]
        assert orders[0] == orders[1]


@pytest.mark.parametrize("kind", ["acp_sgd", "power_sgd"])
@pytest.mark.parametrize("cap", CAPS_MB)
def test_the_counters_tell_what_the_backend_saw(counted: Any, kind: str, cap: float) -> None:
    for by_run in counted:
        run = by_run[kind, cap]
        seen = [c for s in run["seen"] for c in s]
        dense = [c for s in by_run["plain", cap]["seen"] for c in s]
        assert run["stats"]["collectives"] == len(seen)
        assert run["stats"]["bytes_sent"] == sum(c.nbytes for c in seen)
        assert run["stats"]["buckets"] == len(dense)
        assert run["stats"]["bytes_dense"] == sum(c.nbytes for c in dense)
        assert run["stats"]["steps"] == 4
        assert run["stats"]["ratio"] == pytest.approx(run["stats"]["bytes_dense"] / run["stats"]["bytes_sent"])


@pytest.mark.parametrize("cap", CAPS_MB)
def test_bytes_on_the_wire_equal_the_formula(counted: Any, cap: float) -> None:
    model = make_model()
    shapes = compressed_shapes(model, rank=2)
    raw = sum(p.numel() for n, p in model.named_parameters() if n not in shapes)
    p = sum(rows * r for rows, _, r in shapes.values())
    q = sum(cols * r for _, cols, r in shapes.values())
    flags = len(shapes)
    for by_run in counted:
        # Phases of the four synced steps: P, Q, P, Q. Sizes in float64.
        sent = [sum(c.nbytes for c in s) for s in by_run["acp_sgd", cap]["seen"]]
        assert sent == [8 * n for n in (p + raw + flags, q + raw + flags, 0, p + raw + flags, q + raw + flags)]
        both = 8 * (p + q + raw + flags)
        assert [sum(c.nbytes for c in s) for s in by_run["power_sgd", cap]["seen"]] == [both, both, 0, both, both]


# ---- overlap ---------------------------------------------------------------------------------------------------------


def _overlap(rank: int, world_size: int, make: Any) -> tuple[list[int], list[int]]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    ready: list[int] = []
    for p in model.parameters():
        p.register_hook(lambda grad: ready.append(time.time_ns()))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01)
    register_compressor(ddp, make())
    started = []
    for _ in range(3):
        ready.clear()
        loss = ddp(torch.ones(4, 64)).sum()
        with count_collectives() as seen:
            loss.backward()
        started = [c.time_ns for c in seen]
    return started, sorted(ready)


@pytest.mark.parametrize("kind", ["acp_sgd", "power_sgd"])
def test_the_first_all_reduce_starts_before_the_last_gradient_is_ready(kind: str) -> None:
    for started, ready in run_ranks(_overlap, 2, MAKERS[kind]):
        assert len(started) >= 4
        assert started[0] < ready[-1]
        # Not only the first: as many are under way as there are full buckets behind the first layers.
        assert sum(t < ready[-1] for t in started) >= len(started) / 2


# ---- the random state of the process ---------------------------------------------------------------------------------


def _random_state(rank: int, world_size: int) -> bool:
    ddp = DistributedDataParallel(make_model())
    x, y = batch(0, rank, world_size)
    before = torch.get_rng_state()
    compressor: Compressor = register_compressor(ddp, ACPSGD(rank=2, warmup_steps=1))
    for _ in range(3):
        F.cross_entropy(ddp(x), y).backward()
    compressor.load_state_dict(compressor.state_dict())
    return torch.equal(before, torch.get_rng_state())


def test_the_global_random_state_is_left_alone() -> None:
    assert run_ranks(_random_state, 2) == [True, True]


def _first_factors(rank: int, world_size: int) -> torch.Tensor:
    torch.manual_seed(rank)  # seeds that differ, as users set them for dropout
    ddp = DistributedDataParallel(make_model())
    return register_compressor(ddp, ACPSGD(rank=2)).state_dict()["parameters"]["0.weight"]["Q"]


def test_the_first_factors_depend_neither_on_a_ranks_seed_nor_on_its_string_hashes() -> None:
    one, other = run_ranks(_first_factors, 2)
    assert torch.equal(one, other)
    # Computed in this process, whose hash() of a string differs from that of the ranks.
    close(one.T, initial_basis("0.weight", 20, 2), 1e-15)
