"""Batches that are not finite, gradients that are zero, and gradient scalers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.optimizers import Eva
from tests.eva.nets import MLP, equal, loss_of, relative_difference, train, weights

STRONG: dict[str, Any] = {"g_scale": "expectation", "kv_samples": None, "kv_new_weight": 0.5}


def _vectors(optimizer: Eva) -> list[Tensor]:
    return [v.clone() for s in optimizer.state.values() for k, v in s.items() if k.startswith("kv")]


def test_vectors_of_a_step_that_are_not_finite_are_dropped_and_counted() -> None:
    model = MLP.net()
    optimizer = Eva(model.parameters(), **STRONG).attach(model)
    train(model, optimizer, MLP, 2)
    before = _vectors(optimizer)
    optimizer.zero_grad()
    x, y = MLP.batch(2)
    loss_of(model, (x * float("inf"), y)).backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # a user's own guard
    optimizer.step()
    equal(_vectors(optimizer), before)
    assert optimizer.stats.skipped_kv == 1
    train(model, optimizer, MLP, 3, first=3)
    assert all(each.isfinite().all() for each in (*weights(model).values(), *_vectors(optimizer)))
    assert optimizer.stats.skipped_kv == 1


def test_a_first_batch_that_is_not_finite_leaves_the_gradient_as_it_is() -> None:
    model = MLP.net()
    optimizer = Eva(model.parameters(), lr=0.1, damping=0.5, kl_clip=None, momentum=0, **STRONG).attach(model)
    before = weights(model)
    loss_of(model, (MLP.batch(0)[0] * float("nan"), MLP.batch(0)[1])).backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    # No vectors yet: V is the gradient over the damping.
    assert relative_difference(weights(model), {n: p - 0.1 / 0.5 for n, p in before.items()}) < 1e-14


@pytest.mark.parametrize("rescale", ["clip", "normalize", "match_grad", "graft", "none"])
@pytest.mark.parametrize("variant", ["eva", "eva_f", "eva_s"])
@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_a_gradient_of_zero_moves_nothing_and_gives_nu_1(variant: Any, rescale: Any, mode: Any) -> None:
    model = MLP.net()
    optimizer = Eva(model.parameters(), variant=variant, rescale=rescale, damping_mode=mode).attach(model)
    before = weights(model)
    (0 * loss_of(model, MLP.batch(0))).backward()
    optimizer.step()
    assert optimizer.nu == 1
    equal(weights(model), before)
    optimizer.zero_grad()
    loss_of(model, MLP.batch(1)).backward()
    optimizer.step()
    assert all(each.isfinite().all() for each in weights(model).values())


# ---- gradient scaler -------------------------------------------------------------------------------------------------


def _scaled(scale: float | None, poisoned: int | None = None) -> tuple[nn.Module, Eva]:
    model = MLP.net()
    optimizer = Eva(model.parameters(), lr=0.1, damping=1e-4, **STRONG).attach(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=3)
    optimizer.loss_scale = scaler.get_scale
    for step in range(8):
        x, y = MLP.batch(step)
        optimizer.zero_grad()
        for part in (slice(0, 10), slice(10, 20)):
            bad = float("inf") if step == poisoned and part.start else 1.0
            scaler.scale(loss_of(model, (x[part] * bad, y[part])) / 2).backward()
        scaler.unscale_(optimizer)
        before, vectors = weights(model), _vectors(optimizer)
        scaler.step(optimizer)
        if step == poisoned:
            equal(weights(model), before)
            equal(_vectors(optimizer), vectors)
        scaler.update()
    return model, optimizer


def test_a_gradient_scaler_changes_nothing() -> None:
    # Scales are powers of two: scaling is exact, except for a division of g by it.
    assert relative_difference(weights(_scaled(65536.0)[0]), weights(_scaled(None)[0])) < 1e-13


def test_a_loss_scale_that_nobody_tells_would_change_the_run() -> None:
    model = MLP.net()
    optimizer = Eva(model.parameters(), lr=0.1, damping=1e-4, **STRONG).attach(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, MLP.batch(step))).backward()
        scaler.step(optimizer)
        scaler.update()
    assert relative_difference(weights(model), weights(_scaled(None)[0])) > 1e-2


def test_a_micro_batch_of_inf_under_a_scaler_leaves_weights_and_vectors_and_the_next_step_is_clean() -> None:
    model, optimizer = _scaled(65536.0, poisoned=3)
    assert all(each.isfinite().all() for each in (*weights(model).values(), *_vectors(optimizer)))
    assert optimizer.stats.skipped_kv == 0  # zero_grad cleared them
    assert optimizer.stats.counted_steps == 7
