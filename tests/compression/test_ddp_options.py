"""DDP's own options change nothing, and neither do the tools that go with it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.compression import ACPSGD, Compressor, PowerSGD, TopK, register_compressor
from tests.compression.harness import (
    batch,
    close,
    equal,
    errors,
    flat_weights,
    make_model,
    prescribed,
    random_gradients,
    recorded_warnings,
    step,
    total,
    train,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

MAKERS: dict[str, Callable[..., Compressor]] = {
    "acp_sgd": partial(ACPSGD, 2),
    "power_sgd": partial(PowerSGD, 2),
    "top_k": partial(TopK, 0.1),
}
LOW_RANK = ["acp_sgd", "power_sgd"]
STEPS = 8


def _weights(
    rank: int,
    world_size: int,
    make: Callable[[], Compressor],
    ddp_kwargs: dict[str, Any] | None = None,
    *,
    wrap: Callable[[Any], Any] = lambda ddp: ddp,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    micro_batches: int = 1,
) -> tuple[list[Tensor], dict[str, float]]:
    model = make_model()
    ddp = DistributedDataParallel(model, **(ddp_kwargs or {"bucket_cap_mb": 0.01}))
    compressor = register_compressor(ddp, make())
    forward = wrap(ddp)
    sgd = optimizer(model.parameters(), lr=0.05, momentum=0.9)
    weights = []
    for t in range(STEPS):
        x, y = batch(t, rank, world_size)
        sgd.zero_grad()
        chunks = list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True))
        for i, (x_part, y_part) in enumerate(chunks):
            with nullcontext() if i == len(chunks) - 1 else ddp.no_sync():
                (F.cross_entropy(forward(x_part), y_part) / micro_batches).backward()
        sgd.step()
        weights.append(flat_weights(model))
    return weights, compressor.stats.as_dict()


OPTIONS: dict[str, dict[str, Any]] = {
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.01},
    "find_unused_parameters": {"find_unused_parameters": True, "bucket_cap_mb": 0.01},
    "static_graph": {"static_graph": True, "bucket_cap_mb": 0.01},
    "static_graph and bucket view": {"static_graph": True, "gradient_as_bucket_view": True},
    "broadcast_buffers off": {"broadcast_buffers": False},
}


def _all_options(rank: int, world_size: int) -> dict[tuple[str, str], Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit at import

    results = {}
    for method, make in MAKERS.items():
        results[method, "plain"] = _weights(rank, world_size, make)
        if method in LOW_RANK:
            for name, kwargs in OPTIONS.items():
                results[method, name] = _weights(rank, world_size, make, kwargs)
        results[method, "accumulation"] = _weights(rank, world_size, make, micro_batches=4)
        view = {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.01}
        results[method, "accumulation in the bucket"] = _weights(rank, world_size, make, view, micro_batches=4)
        results[method, "ZeroRedundancyOptimizer"] = _weights(
            rank, world_size, make, optimizer=partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD)
        )
    return results


@pytest.fixture(scope="module")
def runs() -> list[dict[tuple[str, str], Any]]:
    return run_ranks(_all_options, 2)


@pytest.mark.parametrize("method", LOW_RANK)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_ddp_does_not_change_the_training(runs: Any, method: str, option: str) -> None:
    for results in runs:
        close(results[method, option][0], results[method, "plain"][0], 1e-12)
        assert results[method, option][1]["steps"] == STEPS


@pytest.mark.parametrize("method", MAKERS)
@pytest.mark.parametrize("kind", ["accumulation", "accumulation in the bucket"])
def test_accumulation_equals_the_big_batch_and_communicates_once(runs: Any, method: str, kind: str) -> None:
    for results in runs:
        close(results[method, kind][0], results[method, "plain"][0], 1e-12)
        assert results[method, kind][1] == results[method, "plain"][1]


@pytest.mark.parametrize("method", MAKERS)
def test_zero_redundancy_optimizer_equals_the_plain_optimizer(runs: Any, method: str) -> None:
    for results in runs:
        equal(results[method, "ZeroRedundancyOptimizer"][0], results[method, "plain"][0])


def _compiled(rank: int, world_size: int) -> dict[str, Any]:
    results = {}
    for method in LOW_RANK:
        weights = partial(_weights, rank, world_size, MAKERS[method], {"bucket_cap_mb": 1})
        results[method] = weights(), weights(wrap=partial(torch.compile, backend="aot_eager"))
    return results


def test_a_compiled_ddp_model_trains_as_the_eager_one() -> None:
    for results in run_ranks(_compiled, 2, timeout=150):
        for (eager, eager_stats), (compiled, stats) in results.values():
            close(compiled, eager, 1e-10)
            # The compiler may cut the graph at bucket borders, so the buckets may differ, the elements not.
            assert stats["steps"] == eager_stats["steps"]
            assert stats["bytes_sent"] == eager_stats["bytes_sent"]


# ---- uneven inputs ---------------------------------------------------------------------------------------------------

SHAPES = {"a": (10, 14), "b": (14, 10), "raw": (5,)}
BATCHES = [6, 3]  # of rank 0 and rank 1


def _join(rank: int, world_size: int) -> dict[Any, Any]:
    results = {}
    for method, make in MAKERS.items():
        for atomic in (None, True):
            for cap in (0.0005, 25):
                ddp, compressor = prescribed(SHAPES, partial(make, atomic=atomic), bucket_cap_mb=cap)
                sgd = torch.optim.SGD(ddp.parameters(), lr=1.0)
                with Join([ddp]):
                    for t in range(BATCHES[rank]):
                        step(ddp, random_gradients(SHAPES, rank, t))
                        sgd.step()
                # After the join, rank 0's weights are everyone's: minus the sum of all emitted gradients.
                paid = {n: -p.detach() for n, p in ddp.module.named_parameters()}
                results[method, atomic, cap] = paid, errors(compressor.state_dict()), compressor.stats.steps
    return results


def test_ranks_that_run_out_of_data_join_and_nothing_is_lost() -> None:
    by_rank = run_ranks(_join, 2)
    owed = total([random_gradients(SHAPES, rank, t) for rank in range(2) for t in range(BATCHES[rank])])
    for key in by_rank[0]:
        for paid, error, steps in (results[key] for results in by_rank):
            for name in error:
                paid[name] = paid[name] + error[name].view(paid[name].shape)
            close(paid, {n: g / 2 for n, g in owed.items()}, 1e-12)
            assert steps == max(BATCHES), key


def _join_with_a_scaler(rank: int, world_size: int) -> dict[str, Tensor]:
    results = {}
    for method in LOW_RANK:
        model = make_model()
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        scaler.scale(torch.zeros(()))
        register_compressor(ddp, MAKERS[method](), loss_scale=scaler.get_scale)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        with Join([ddp]):
            for t in range(BATCHES[rank]):
                sgd.zero_grad()
                scaler.scale(F.cross_entropy(ddp(batch(t, rank, 2)[0]), batch(t, rank, 2)[1])).backward()
                scaler.step(sgd)
                scaler.update()
        results[method] = flat_weights(model)
    return results


def test_joining_with_a_gradient_scaler_ends_with_the_same_weights_everywhere() -> None:
    one, other = run_ranks(_join_with_a_scaler, 2)
    equal(one, other)
    assert all(w.isfinite().all() for w in one.values())


# ---- one rank --------------------------------------------------------------------------------------------------------


def _alone(rank: int, world_size: int) -> list[str]:
    with recorded_warnings() as messages:
        train(rank, world_size, MAKERS["acp_sgd"], 2)
        train(rank, world_size, MAKERS["acp_sgd"], 1)
    return messages


def test_one_rank_is_told_once_that_compression_has_no_effect() -> None:
    (messages,) = run_ranks(_alone, 1)
    assert [m for m in messages if "no effect" in m] == [
        "gradient compression has no effect: the process group has one rank. Use two devices or more."
    ]


# ---- sub-groups ------------------------------------------------------------------------------------------------------


def _two_groups(rank: int, world_size: int) -> dict[str, Tensor]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[rank // 2]
    ddp, compressor = prescribed(SHAPES, MAKERS["acp_sgd"], process_group=mine)
    paid = total([step(ddp, random_gradients(SHAPES, rank, t)) for t in range(4)])
    for name, error in errors(compressor.state_dict()).items():
        paid[name] += error.view(paid[name].shape)
    return paid


def test_a_process_group_averages_over_its_own_ranks() -> None:
    by_rank = run_ranks(_two_groups, 4)
    for pair in ((0, 1), (2, 3)):
        owed = total([random_gradients(SHAPES, rank, t) for rank in pair for t in range(4)])
        for rank in pair:
            close(by_rank[rank], {n: g / 2 for n, g in owed.items()}, 1e-12)


def _groups_that_die_right_after_backward(rank: int, world_size: int, folder: str) -> int:
    for round_ in range(15):
        dist.init_process_group("gloo", init_method=f"file://{folder}/{round_}", rank=rank, world_size=world_size)
        ddp = DistributedDataParallel(nn.Linear(64, 64))
        register_compressor(ddp, ACPSGD(4))
        ddp(torch.randn(4, 64)).sum().backward()
        dist.barrier()
        dist.destroy_process_group()
        del ddp
    return round_


def test_model_and_group_may_die_right_after_backward(tmp_path: Path) -> None:
    # Without the pause in register_compressor this hangs within a few rounds.
    assert run_ranks(_groups_that_die_right_after_backward, 2, str(tmp_path), group=False, timeout=60) == [14, 14]
