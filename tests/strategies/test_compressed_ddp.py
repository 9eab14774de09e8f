"""The compressor really runs under a Trainer, exactly as often as it should, and in every way of training."""

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from typing_extensions import override

from lightning_efficient.compression import ACPSGD, PowerSGD
from tests.compression.harness import recorded_warnings
from tests.plugins.references import acp, exchanging, train_reference
from tests.plugins.tiny import BATCHES, TinyData, TinyModule, flat_weights
from tests.strategies.training import EPOCHS, SMALL_BUCKETS_MB, compressor_of, errors, fit
from tests.support.collectives import Collective, count_collectives
from tests.support.ranks import run_ranks
from tests.support.trainers import logged_lines

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-12


class BackwardCollectives(Callback):
    """Keeps what each backward pass sent."""

    def __init__(self) -> None:
        self.per_backward: list[list[Collective]] = []

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._recording = ExitStack()
        self.per_backward.append(self._recording.enter_context(count_collectives()))

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._recording.close()


@dataclass(frozen=True)
class Traffic:
    ops: list[list[str]]
    nbytes: int
    stats: dict[str, float]
    closing_lines: list[str] = field(default_factory=list)


def _traffic(rank: int, world_size: int) -> dict[str, Traffic]:
    runs = {
        "every batch": {},
        "accumulation": {"accumulate_grad_batches": 2, "data": TinyData(accumulate=2)},
    }
    results = {}
    for name, kwargs in runs.items():
        recorder = BackwardCollectives()
        with logged_lines() as lines:
            _, trainer = fit(world_size, ddp={"bucket_cap_mb": SMALL_BUCKETS_MB}, callbacks=[recorder], **kwargs)
        results[name] = Traffic(
            ops=[[each.op for each in seen] for seen in recorder.per_backward],
            nbytes=sum(each.nbytes for seen in recorder.per_backward for each in seen),
            stats=compressor_of(trainer).stats.as_dict(),
            closing_lines=[line for line in lines if line.startswith("ACPSGD")],
        )
    return results


@pytest.fixture(scope="module")
def traffic() -> list[dict[str, Traffic]]:
    return run_ranks(_traffic, 2)


def test_one_all_reduce_per_bucket_and_backward(traffic: list[dict[str, Traffic]]) -> None:
    for rank in traffic:
        seen = rank["every batch"]
        steps = EPOCHS * BATCHES
        # DDP's first pass has one bucket, whatever the cap; afterwards every layer has at least one.
        later = len(seen.ops[1])
        assert later >= 3
        assert seen.ops == [["all_reduce"]] + [["all_reduce"] * later] * (steps - 1)
        assert seen.stats["steps"] == steps
        assert seen.stats["buckets"] == seen.stats["collectives"] == 1 + later * (steps - 1)


def test_nothing_is_sent_while_gradients_accumulate(traffic: list[dict[str, Traffic]]) -> None:
    for rank in traffic:
        seen = rank["accumulation"]
        assert len(seen.ops) == 2 * EPOCHS * BATCHES
        assert all(not ops for ops in seen.ops[::2])
        assert all(set(ops) == {"all_reduce"} for ops in seen.ops[1::2])
        assert seen.stats["steps"] == EPOCHS * BATCHES


def test_bytes_counted_are_the_bytes_the_backend_saw(traffic: list[dict[str, Traffic]]) -> None:
    for rank in traffic:
        for seen in rank.values():
            assert seen.stats["bytes_sent"] == seen.nbytes
            assert seen.stats["bytes_dense"] == EPOCHS * BATCHES * 8 * flat_weights(TinyModule()).numel()


def test_rank_zero_says_once_what_was_saved(traffic: list[dict[str, Traffic]]) -> None:
    first, second = (rank["every batch"] for rank in traffic)
    (line,) = first.closing_lines
    assert line.startswith(f"ACPSGD: {EPOCHS * BATCHES} steps sent")
    assert f"{first.stats['ratio']:.1f}x fewer bytes" in line
    assert second.closing_lines == []


class WithZeRO(TinyModule):
    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Warns of its own use of torch.jit when imported, which would be an error in the test process.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(self.parameters(), optimizer_class=torch.optim.SGD, lr=0.5)


class PartlyUnused(TinyModule):
    """A matrix worth compressing that no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(16, 16)


class PlainScaler(MixedPrecision):
    """A gradient scaler without autocast, so that a power of two changes no bit."""

    def __init__(self, scale: float) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        super().__init__("16-mixed", "cpu", scaler)

    @override
    def forward_context(self) -> Any:
        return nullcontext()


def _variants(rank: int, world_size: int) -> dict[str, Tensor]:
    used = PartlyUnused().double()
    variants: dict[str, dict[str, Any]] = {
        "ZeroRedundancyOptimizer": {"module": WithZeRO().double()},
        "gradient_as_bucket_view": {"ddp": {"gradient_as_bucket_view": True}},
        "static_graph": {"ddp": {"static_graph": True}},
        "unused parameters": {"module": used, "ddp": {"find_unused_parameters": True}},
        "process group by name": {"ddp": {"process_group_backend": "gloo"}},
    }
    weights = {}
    for name, kwargs in variants.items():
        module, trainer = fit(world_size, **kwargs)
        weights[name] = flat_weights(getattr(module, "net", module))
        assert compressor_of(trainer).stats.steps == EPOCHS * BATCHES, name
        if module is used:
            assert used.unused.weight.grad is None
            assert not errors(trainer)["unused.weight"].any()
    return weights


def test_every_way_of_training_gives_the_same_weights() -> None:
    expected = train_reference(exchanging(acp(2)), world_size=2, epochs=EPOCHS)
    for rank in run_ranks(_variants, 2):
        for name, weights in rank.items():
            torch.testing.assert_close(
                weights, expected, rtol=0, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
            )


def _compiled(rank: int, world_size: int) -> tuple[Tensor, float]:
    module = TinyModule().double()
    _, trainer = fit(world_size, module=torch.compile(module, backend="aot_eager"))
    return flat_weights(module), compressor_of(trainer).stats.steps


@pytest.mark.slow
def test_a_compiled_module_gives_the_same_weights() -> None:
    expected = train_reference(exchanging(acp(2)), world_size=2, epochs=EPOCHS)
    for weights, steps in run_ranks(_compiled, 2, timeout=170):
        torch.testing.assert_close(weights, expected, rtol=0, atol=TOLERANCE)
        assert steps == EPOCHS * BATCHES


def _scaled(rank: int, world_size: int) -> dict[str, tuple[Tensor, float]]:
    results = {}
    for method in (ACPSGD, PowerSGD):
        plain, _ = fit(world_size, method(rank=2))
        results[f"{method.method} unscaled"] = (flat_weights(plain), 1.0)
        precision = PlainScaler(scale=2.0**10)
        module, _ = fit(world_size, method(rank=2), precision=None, plugins=[precision])
        assert precision.scaler is not None
        results[method.method] = (flat_weights(module), precision.scaler.get_scale())
    return results


def test_a_growing_loss_scale_changes_no_bit() -> None:
    for rank in run_ranks(_scaled, 2):
        for method in ("acp_sgd", "power_sgd"):
            weights, scale = rank[method]
            assert scale == 2.0 ** (10 + EPOCHS * BATCHES // 2)  # it did change under way
            assert torch.equal(weights, rank[f"{method} unscaled"][0])


class ManualTwice(TinyModule):
    """Two backward passes for each update, both synchronised or only the last."""

    def __init__(self, *, sync_both: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.sync_both = sync_both

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        half = len(x) // 2
        with nullcontext() if self.sync_both else self.trainer.strategy.block_backward_sync():
            self.manual_backward(self.loss((x[:half], y[:half])) / 2)
        self.manual_backward(self.loss((x[half:], y[half:])) / 2)
        optimizer.step()


class TwoOptimizers(TinyModule):
    """As a GAN trains: one backward and one update for each of two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    @override
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[:2].parameters(), lr=0.1), torch.optim.SGD(self.net[2:].parameters(), lr=0.1)]


def _manual(rank: int, world_size: int) -> dict[str, tuple[list[str], int, Tensor]]:
    modules = {
        "both": ManualTwice(sync_both=True),
        "last": ManualTwice(sync_both=False),
        "two optimizers": TwoOptimizers(),
    }
    results = {}
    for name, module in modules.items():
        with recorded_warnings() as warned:
            _, trainer = fit(world_size, module=module.double())
        about_us = [text for text in warned if "synchronised backward" in text]
        results[name] = (about_us, compressor_of(trainer).stats.steps, flat_weights(module))
    return results


def test_synchronised_backwards_that_pile_up_are_warned_about_once() -> None:
    first, second = run_ranks(_manual, 2)
    warned, backwards, _ = first["both"]
    assert len(warned) == 1
    assert "no_sync" in warned[0]
    assert backwards == 2 * EPOCHS * BATCHES
    assert second["both"][0] == []  # rank 0 speaks for all

    warned, backwards, weights = first["last"]
    assert warned == []
    assert backwards == EPOCHS * BATCHES
    expected = train_reference(exchanging(acp(2)), world_size=2, epochs=EPOCHS)
    torch.testing.assert_close(weights, expected, rtol=0, atol=TOLERANCE)

    assert first["two optimizers"][:2] == ([], 2 * EPOCHS * BATCHES)


def _another_model(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    alone, _ = fit(world_size)
    _, trainer = fit(world_size)
    trainer.fit_loop.max_epochs = 2 * EPOCHS
    another = TinyModule().double()
    trainer.fit(another, TinyData())
    return flat_weights(alone), flat_weights(another)


def test_another_model_starts_with_clean_state() -> None:
    for alone, another in run_ranks(_another_model, 2):
        assert torch.equal(alone, another)
