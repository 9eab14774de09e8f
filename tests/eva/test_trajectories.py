"""Fifty steps of every variant and setting equal the method written out in NumPy."""

from typing import Any

import pytest

from lightning_efficient.optimizers import Eva
from tests.eva.nets import TASKS, relative_difference, train, train_reference, weights
from tests.eva.reference import ReferenceEva

STEPS = 50

PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eva": ({}, {}),
    "eva_f": ({"variant": "eva_f"}, {"rescale": "normalize"}),
    "eva_s": ({"variant": "eva_s"}, {"rescale": "graft", "kv_new_weight": "sum"}),
}
"""Settings of Eva, and what its published defaults mean to the reference."""

SETTINGS: dict[str, dict[str, Any]] = {
    "strong eva": {"g_scale": "expectation", "kv_samples": None, "damping": 1e-2},
    "strong eva_f": {"variant": "eva_f", "g_scale": "expectation", "kv_samples": None, "rescale": "clip"},
    "relative eva": {"damping_mode": "relative", "rescale": "normalize", "lr": 0.02},
    "relative eva_f": {"variant": "eva_f", "damping_mode": "relative", "rescale": "match_grad"},
    "relative eva_s": {"variant": "eva_s", "damping_mode": "relative", "rescale": "graft", "kv_new_weight": 0.5},
    "match_grad": {"rescale": "match_grad"},
    "graft": {"rescale": "graft"},
    "none": {"rescale": "none", "lr": 1e-3},
    "no clip": {"kl_clip": None, "lr": 1e-3},
    "loose clip": {"kl_clip": 1e3, "lr": 1e-3},
    "slow average": {"kv_new_weight": 0.1, "kv_every": 3, "g_scale": "expectation"},
    "sums": {"kv_new_weight": "sum", "g_scale": "expectation", "damping": 1.0},
    "no momentum": {"momentum": 0.0, "weight_decay": 1e-2},
    "nesterov": {"nesterov": True, "weight_decay": 1e-2},
    "decoupled": {"weight_decay": 1e-2, "decoupled_weight_decay": True},
    "decoupled nesterov": {"weight_decay": 1e-2, "decoupled_weight_decay": True, "nesterov": True},
    "decoupled, no momentum": {"weight_decay": 1e-2, "decoupled_weight_decay": True, "momentum": 0.0},
    "own fallback lr": {"fallback_lr": 1e-2, "weight_decay": 1e-2},
}


def _difference(task: str, settings: dict[str, Any], resolved: dict[str, Any], steps: int) -> float:
    """Relative difference of the weights after training with Eva and with the reference."""
    model, other = TASKS[task].net(), TASKS[task].net()
    train(model, Eva(model.parameters(), **settings).attach(model), TASKS[task], steps)
    train_reference(ReferenceEva(other, **{**settings, **resolved}), TASKS[task], steps)
    assert relative_difference(weights(model), weights(TASKS[task].net())) > 1e-3  # it moved
    return relative_difference(weights(model), weights(other))


# Both sides round in float64 (1e-16); fifty steps of a smooth net amplify that by less than a thousand.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_published_convention_equals_the_reference(task: str, variant: str) -> None:
    assert _difference(task, *PUBLISHED[variant], STEPS) < 1e-12


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("task", ["mlp", "conv and batch norm"])
def test_every_setting_equals_the_reference(task: str, settings: str) -> None:
    assert _difference(task, SETTINGS[settings], {}, STEPS) < 1e-12


def test_the_strong_setting_is_not_a_clipped_gradient() -> None:
    """The control of the other tests: without its rank-1 term, Eva-f would end elsewhere."""
    task = TASKS["mlp"]
    ends = []
    for damping in (0.03, 1e9):
        model = task.net()
        settings = {**SETTINGS["strong eva_f"], "damping": damping}
        train(model, Eva(model.parameters(), **settings).attach(model), task, STEPS)
        ends.append(weights(model))
    assert relative_difference(*ends) > 1e-2
