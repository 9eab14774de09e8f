"""Training under ParmStrategy equals one process on the same batches, however tokens and experts are spread."""

import copy
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW
from typing_extensions import override

from lightning_efficient.callbacks import MoEMonitor
from lightning_efficient.moe import GradientSync, MoELayer, grad_norm, parameter_groups
from tests.strategies.parm_toys import (
    BATCHES,
    DIM,
    EXPERTS,
    HIDDEN,
    TOLERANCE,
    Batch,
    MoEModule,
    Sizes,
    fit,
    joint_batches,
    message_of,
    parm,
    share,
    train_alone,
    weights_of,
    worst,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CLIP, ACCUMULATE = 0.05, 2
FULL: dict[str, Any] = {"capacity_factor": 1.0, "min_capacity": 1}
"""Overflows: a tenth of the assignments and more find no slot."""


@dataclass(frozen=True)
class Case:
    """A way to spread a training over 4 ranks."""

    sizes: Sizes
    schedule: str
    moe: dict[str, Any] = field(default_factory=dict)


CASES = {
    "experts apart": Case((1, 4, 1), "s1/1", FULL),
    "all three": Case((2, 2, 2), "s1_hier/2"),
    "all tokens shared, experts twice": Case((4, 2, 1), "s2_saa/2", FULL),
    "experts cut only": Case((2, 1, 4), "deepspeed"),
    "loads evened by a bias": Case((2, 2, 1), "s1/1", {"balance_rate": 0.05}),
}


@dataclass(frozen=True)
class Seen:
    weights: dict[str, Tensor]
    norms: list[float]
    dropped_share: float
    left_before_the_first_layer: int
    parts: list[tuple[int, ...]]


class Watched(MoEModule):
    """Keeps the norm of what `on_after_backward` sees, and how many buckets were sent before the last gradient came."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norms: list[float] = []
        self.sent: list[int] = []
        self._calls = 0

    @override
    def on_train_start(self) -> None:
        self.net[0].weight.register_post_accumulate_grad_hook(lambda _: self.sent.append(self._gradient_calls()))

    def _gradient_calls(self) -> int:
        calls = sum(self.trainer.strategy.stats.gradients.calls.values())  # type: ignore[attr-defined]
        new, self._calls = calls - self._calls, calls
        return new

    @override
    def on_after_backward(self) -> None:
        self._calls = sum(self.trainer.strategy.stats.gradients.calls.values())  # type: ignore[attr-defined]
        self.norms.append(float(grad_norm(self.parameters(), self.trainer.strategy.topology)))  # type: ignore[attr-defined]


def _train(rank: int, world_size: int) -> dict[str, Seen]:
    seen = {}
    for name, case in CASES.items():
        module = Watched(seed=rank, **case.moe)  # rank 0's weights must win
        strategy = parm(case.sizes, schedule=case.schedule, bucket_mb=1e-3)
        fit(world_size, strategy, module, gradient_clip_val=CLIP, accumulate_grad_batches=ACCUMULATE)
        experts = next(each for each in module.net if isinstance(each, MoELayer)).experts
        seen[name] = Seen(
            weights_of(module),
            module.norms,
            strategy.stats.dropped_share,
            sum(module.sent),
            [tuple(each.to_local().shape) for each in experts.parameters() if isinstance(each, DTensor)],
        )
    return seen


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Seen]]:
    return run_ranks(_train, 4, timeout=170)


@pytest.mark.parametrize("name", CASES)
def test_weights_equal_one_process_with_clipping_and_accumulation(name: str, trained: list[dict[str, Seen]]) -> None:
    case = CASES[name]
    expected = train_alone(4 // case.sizes[0], clip=CLIP, accumulate=ACCUMULATE, module=MoEModule(**case.moe))
    start = MoEModule(**case.moe)
    start.configure_model()
    assert worst(weights_of(start), weights_of(expected)) > 1e-3
    for rank in trained:
        assert worst(rank[name].weights, weights_of(expected)) < TOLERANCE
    assert (trained[0][name].dropped_share > 0.1) == (case.moe == FULL)


@pytest.mark.parametrize("name", CASES)
def test_on_after_backward_sees_whole_gradients(name: str, trained: list[dict[str, Seen]]) -> None:
    case = CASES[name]
    module, ranks = MoEModule(**case.moe), 4 // case.sizes[0]
    module.configure_model()
    for batch in joint_batches()[:ACCUMULATE]:
        for rank in range(ranks):
            (module.loss(share(batch, rank, ranks)) / ranks / ACCUMULATE).backward()
    expected = float(nn.utils.get_total_norm([each.grad for each in module.parameters() if each.grad is not None]))
    for seen in trained:
        # The first of the backward passes leaves its gradients on their ranks.
        assert seen[name].norms[ACCUMULATE - 1] == pytest.approx(expected, rel=1e-10)


def test_each_rank_holds_its_part_of_the_experts(trained: list[dict[str, Seen]]) -> None:
    w_in = {name: seen.parts[0] for name, seen in trained[0].items()}  # (experts, M, matrices, hidden)
    assert w_in == {
        "experts apart": (1, 8, 1, 16),
        "all three": (2, 8, 1, 8),
        "all tokens shared, experts twice": (2, 8, 1, 16),
        "experts cut only": (4, 8, 1, 4),
        "loads evened by a bias": (2, 8, 1, 16),
    }


def test_gradients_leave_while_backward_runs(trained: list[dict[str, Seen]]) -> None:
    synced = BATCHES // ACCUMULATE
    for seen in trained[0].values():
        # The second MoE layer's are on their way when the first dense layer's come.
        assert seen.left_before_the_first_layer >= synced


# ---- other ways to train, on two ranks -----------------------------------------------------------------------------


class ByHand(MoEModule):
    """Manual optimization: two batches a step, synced at each or at the second, clipped by hand."""

    def __init__(self, *, sync_each: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.sync_each = sync_each

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.steps += 1
        loss, optimizer = self.loss(batch) / ACCUMULATE, self.optimizers()
        if batch_idx % ACCUMULATE == 0 and not self.sync_each:
            with self.trainer.strategy.block_backward_sync():  # type: ignore[attr-defined]
                self.manual_backward(loss)
        else:
            self.manual_backward(loss)
        if batch_idx % ACCUMULATE == ACCUMULATE - 1:
            self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")  # type: ignore[arg-type]
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]


class Unfreezes(MoEModule):
    """Trains its last layer from the third batch on."""

    @override
    def configure_model(self) -> None:
        super().configure_model()
        self.net[-1].requires_grad_(False)

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 2:
            self.net[-1].requires_grad_(True)


class Kept(Callback):
    """What stands in the module when training begins."""

    weights: dict[str, Tensor]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = weights_of(pl_module)


class Keeps(pl.loggers.logger.DummyLogger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, Any] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.told.update(metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.told.update(params)


def adamw(**kwargs: Any) -> Any:
    return lambda module: AdamW(parameter_groups(module), lr=0.01, **kwargs)


def _other_ways(rank: int, world_size: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for sync_each in (False, True):
        for sizes in ((1, 2, 1), (2, 1, 2)):
            module, _ = fit(world_size, parm(sizes), ByHand(sync_each=sync_each))
            expected = train_alone(world_size // sizes[0], clip=CLIP, accumulate=ACCUMULATE)
            seen[f"by hand {sync_each} {sizes}"] = worst(weights_of(module), weights_of(expected))

    by_value, _ = fit(world_size, parm((1, 2, 1)), gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    plain, _ = fit(world_size, parm((1, 2, 1)))
    seen["by value"] = worst(weights_of(by_value), weights_of(train_alone(2, clip_value=1e-3)))
    seen["plain"] = worst(weights_of(plain), weights_of(train_alone(2)))
    seen["apart"] = worst(weights_of(plain), weights_of(by_value))

    unfrozen, _ = fit(world_size, parm((1, 2, 1)), Unfreezes())
    seen["unfrozen"] = weights_of(unfrozen)["net.5.weight"]

    refused = {
        name: message_of(world_size, parm((1, 2, 1)), MoEModule(optimizer=_mixed(**{name: True})))
        for name in ("foreach", "fused")
    }
    seen["refused"] = refused
    runs = [
        fit(world_size, parm((1, 2, 1)), MoEModule(optimizer=adamw(**kwargs)))[0]
        for kwargs in ({}, {"foreach": True}, {"fused": True})
    ]
    seen["adamw"] = [worst(weights_of(each), weights_of(runs[0])) for each in runs[1:]]

    # Weights that are drawn when they get memory, and dropout and jitter in training, with ranks seeded apart.
    torch.manual_seed(100 + rank)
    at_start, logger, strategy = Kept(), Keeps(), parm((2, 1, 2), verify_inputs=True)
    module = MoEModule(on_meta=True, dropout=0.4, jitter=0.1)
    fit(world_size, strategy, module, callbacks=[at_start, MoEMonitor(every_n_steps=2)], logger=logger)
    seen["drawn"] = at_start.weights
    seen["told"] = logger.told
    seen["stats"] = strategy.stats
    seen["copied"] = worst(weights_of(copy.deepcopy(module)), weights_of(module))

    # Moving a module drops the Python attributes of DTensors: experts must be known by other means.
    moved_module = module.to(torch.float32)
    sync = GradientSync(moved_module, strategy.topology)
    seen["experts after to()"] = sum(len(each.parameters) for each in sync.buckets if each.group.axis == "edp")
    sync.remove()

    for precision in ("bf16-true", "bf16-mixed"):
        module = MoEModule(optimizer=lambda module: SGD(module.parameters(), lr=0.1))
        module.dtype_of_weights = torch.float32
        fit(world_size, parm((1, 2, 1)), module, precision=precision, max_epochs=4)
        dtypes = {each.dtype for each in module.parameters()}
        seen[precision] = (sum(module.losses[:BATCHES]), sum(module.losses[-BATCHES:]), dtypes)
    return seen


def _mixed(**kwargs: Any) -> Any:
    return lambda module: AdamW(module.parameters(), **kwargs)


@pytest.fixture(scope="module")
def others() -> list[dict[str, Any]]:
    return run_ranks(_other_ways, 2, timeout=170)


@pytest.mark.parametrize("sizes", ["(1, 2, 1)", "(2, 1, 2)"])
@pytest.mark.parametrize("sync_each", [False, True])
def test_manual_optimization_equals_one_process(sync_each: bool, sizes: str, others: list[dict[str, Any]]) -> None:
    for seen in others:
        assert seen[f"by hand {sync_each} {sizes}"] < TOLERANCE


def test_clipping_by_value_equals_one_process(others: list[dict[str, Any]]) -> None:
    for seen in others:
        assert max(seen["plain"], seen["by value"]) < TOLERANCE
        assert seen["apart"] > 1e-3


def test_what_is_unfrozen_in_training_is_synced(others: list[dict[str, Any]]) -> None:
    start = MoEModule()
    start.configure_model()
    first, second = (seen["unfrozen"] for seen in others)
    assert torch.equal(first, second)
    assert not torch.equal(first, start.net[-1].weight)


def test_optimizers_over_many_tensors_need_groups(others: list[dict[str, Any]]) -> None:
    for seen in others:
        for option in ("foreach", "fused"):
            assert seen["refused"][option].startswith(
                f"ValueError: AdamW({option}=True) has experts and other parameters in its group 0"
            )
            assert "parameter_groups(self)" in seen["refused"][option]
        assert max(seen["adamw"]) < 1e-8  # fused and foreach round otherwise, and Adam divides by small numbers


def test_groups_keep_their_options_and_order() -> None:
    module = MoEModule()
    module.configure_model()
    first, rest = list(module.net[0].parameters()), list(module.net[1:].parameters())
    groups = parameter_groups([{"params": first, "lr": 0.1}, {"params": rest, "weight_decay": 0.0}])
    assert [{**each, "params": len(each["params"])} for each in groups] == [
        {"lr": 0.1, "params": len(first)},
        {"weight_decay": 0.0, "params": len(rest)},
    ]
    assert [len(each["params"]) for each in parameter_groups(module)] == [len(first) + len(rest)]


def test_weights_drawn_late_are_those_that_rank_0_draws(others: list[dict[str, Any]]) -> None:
    torch.manual_seed(100)
    alone = MoEModule(on_meta=True)
    alone.configure_model()
    alone.net.to_empty(device="cpu")
    for each in alone.net.modules():
        if any(True for _ in each.parameters(recurse=False)):
            each.reset_parameters()  # type: ignore[operator]
    for seen in others:
        drawn = {name: each for name, each in seen["drawn"].items() if name != "steps"}
        assert worst(drawn, {name: each for name, each in weights_of(alone).items() if name != "steps"}) == 0


def test_figures_reach_the_logger(others: list[dict[str, Any]]) -> None:
    told, stats = others[0]["told"], others[0]["stats"]
    assert told[f"parm/schedule/24x{DIM}_{EXPERTS}x{HIDDEN}_dropless"] == "s1_hier"
    assert told["moe/dropped_share"] == 0
    assert 1 < told["moe/busiest_expert"] < EXPERTS
    assert stats.steps == BATCHES
    assert told["moe/bytes_per_step"] == stats.bytes_sent / BATCHES > 0
    assert told["moe/bytes_per_step/mp"] == stats.bytes_by_axis["mp"] / BATCHES > 0
    assert stats.rows == BATCHES * 2 * 24 * 2  # every rank of the ESP group computes its part of every row
    assert stats.assignments == BATCHES * 2 * 24 * 2 / 2


def test_experts_are_known_after_a_move(others: list[dict[str, Any]]) -> None:
    assert [seen["experts after to()"] for seen in others] == [8, 8]
    assert [seen["copied"] for seen in others] == [0, 0]


def test_half_precision_trains(others: list[dict[str, Any]]) -> None:
    for precision, dtype in (("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)):
        for seen in others:
            before, after, dtypes = seen[precision]
            assert dtypes == {dtype}
            assert after < 0.8 * before
