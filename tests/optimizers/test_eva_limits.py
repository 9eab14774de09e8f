"""Settings in which Eva must equal something simpler, and what holds of every step."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_efficient.eva import precondition
from lightning_efficient.optimizers import Eva
from tests.eva.nets import CONV, MLP, TASKS, loss_of, relative_difference, train, weights

VARIANTS = ["eva", "eva_f", "eva_s"]
EXPECTATION: dict[str, Any] = {"g_scale": "expectation", "kv_samples": None}


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _trained(task: str = "mlp", steps: int = 15, **settings: Any) -> dict[str, Tensor]:
    model = TASKS[task].net()
    train(model, Eva(model.parameters(), **settings).attach(model), TASKS[task], steps)
    return weights(model)


def _one_update(model: nn.Module, batch: Any, *, loss_factor: float = 1.0, **settings: Any) -> dict[str, Tensor]:
    """What one step without momentum subtracts from each parameter, divided by lr."""
    optimizer = Eva(model.parameters(), lr=1.0, momentum=0, **settings).attach(model)
    optimizer.zero_grad()
    (loss_factor * loss_of(model, batch)).backward()
    before = weights(model)
    optimizer.step()
    after = weights(model)
    optimizer.detach()
    model.load_state_dict({**model.state_dict(), **before})
    return {name: before[name] - after[name] for name in before}


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["eva", "eva_f"])
@pytest.mark.parametrize("task", TASKS)
def test_infinite_damping_is_sgd_with_the_learning_rate_over_the_damping(task: str, variant: str) -> None:
    damping = 1e14  # rho below 1e-12
    actual = _trained(
        task, variant=variant, damping=damping, lr=0.1 * damping, fallback_lr=0.1, kl_clip=None, rescale="clip"
    )
    model = TASKS[task].net()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), TASKS[task], 15)
    assert relative_difference(actual, weights(model)) < 1e-10


@pytest.mark.parametrize("task", ["mlp", "conv and batch norm"])
def test_infinite_damping_makes_eva_s_sgd(task: str) -> None:
    model = TASKS[task].net()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), TASKS[task], 15)
    assert relative_difference(_trained(task, variant="eva_s", damping=1e14), weights(model)) < 1e-10


@pytest.mark.parametrize("variant", ["eva", "eva_f"])
def test_while_the_clip_is_active_the_learning_rate_drops_out(variant: str) -> None:
    """The clip bounds lr^2 <V, G>: the step is sqrt(kl_clip / <V, G>) V whatever lr is."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    ends = []
    for lr in (1.0, 10.0, 100.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        optimizer = Eva(model.parameters(), lr=lr, variant=variant, rescale="clip", **EXPECTATION).attach(model)
        train(model, optimizer, MLP, 40)
        assert optimizer.stats.clipped == 40
        ends.append(weights(model))
    assert relative_difference(ends[1], ends[0]) < 1e-12
    assert relative_difference(ends[2], ends[0]) < 1e-12


def test_a_mean_input_of_zero_leaves_the_gradient_over_the_damping() -> None:
    for variant in ("eva", "eva_f"):
        layer = nn.Sequential(nn.Linear(4, 3, bias=False).double())
        x = _random(1, 5, 4)
        x = torch.cat([x, -x])  # a mean of exactly 0
        optimizer = Eva(layer.parameters(), lr=1.0, variant=variant, rescale="none", momentum=0, damping=0.5)
        optimizer.attach(layer)
        before = layer[0].weight.detach().clone()
        layer(x).sin().square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(before - layer[0].weight, layer[0].weight.grad / 0.5, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rescale", ["clip", "normalize", "match_grad", "graft"])
def test_the_norm_of_one_layers_update_is_the_closed_form(rescale: str) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 5)).double()
    batch = _random(2, 8, 6), torch.arange(8) % 4
    gamma, kappa = 0.2, 1e-5
    settings: dict[str, Any] = {"damping": gamma, "kl_clip": kappa, **EXPECTATION}
    update = _one_update(layer, batch, rescale=rescale, **settings)
    norm = torch.cat([each.flatten() for each in update.values()]).norm()
    G = torch.cat([layer[0].weight.grad, layer[0].bias.grad[:, None]], dim=1)
    a, g = torch.cat([batch[0].mean(0), torch.ones(1, dtype=G.dtype)]), layer[0].bias.grad
    V = precondition(G, a, g, damping=gamma)
    inner = (V * G).sum()
    expected = {
        "clip": (kappa / inner).sqrt() * V.norm(),
        "normalize": V.norm() * gamma / (inner * gamma).sqrt(),
        "match_grad": G.norm(),
        "graft": G.norm(),
    }[rescale]
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)


# ---- invariants ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 8), st.floats(1e-6, 1e3), st.integers(0, 2**20), st.booleans())
def test_v_goes_downhill_and_is_no_longer_than_the_gradient_over_the_damping(
    outputs: int, inputs: int, damping: float, seed: int, eva_f: bool
) -> None:
    G, a, g = _random(seed, outputs, inputs), _random(seed + 1, inputs), None if eva_f else _random(seed + 2, outputs)
    V = precondition(G, a, g, damping=damping)
    curvature = a @ a if g is None else (a @ a) * (g @ g)
    inner = (V * G).sum()
    # V = (G - l a^T)/gamma loses log10(curvature/gamma) digits where G lies along g a^T: 1e-15 of |G|^2/gamma.
    slack = 1e-14 * (G * G).sum() / damping
    assert inner > 0
    assert inner >= (G * G).sum() / (damping + curvature) - slack
    assert V.norm() <= G.norm() / damping * (1 + 1e-14)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", ["eva", "eva_f"])
@pytest.mark.parametrize("lr", [1e-4, 1.0])
def test_the_clip_bounds_the_squared_step(task: str, variant: str, lr: float) -> None:
    model, kappa = TASKS[task].net(), 1e-3
    # Momentum off and no fallback parameters in the sum: what moved is lr nu V.
    optimizer = Eva(
        model.parameters(), lr=lr, variant=variant, rescale="clip", kl_clip=kappa, momentum=0, **EXPECTATION
    )
    optimizer.attach(model)
    layers = {name for name, report in _reports(optimizer, model, task).items() if not report.skipped}
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, TASKS[task].batch(step)).backward()
        before = weights(model)
        optimizer.step()
        inner = 0.0
        for name, p in model.named_parameters():
            if name.rpartition(".")[0] in layers:
                assert p.grad is not None
                inner += ((before[name] - p.detach()) * p.grad).sum().item()  # lr nu <V, G>
        assert optimizer.nu is not None
        bound = lr * optimizer.nu.item() * inner  # lr^2 nu^2 sum <V, G>
        assert 0 < bound <= kappa * (1 + 1e-6)
        if optimizer.nu < 1:
            assert bound >= kappa * (1 - 1e-6)


def _reports(optimizer: Eva, model: nn.Module, task: str) -> Any:
    train(model, optimizer, TASKS[task], 1)
    return optimizer.kv_report()


@pytest.mark.parametrize("factor", [1e-3, 10.0])
def test_loss_times_c_and_damping_times_c_squared_keep_the_direction(factor: float) -> None:
    batch = MLP.batch(0)
    model = MLP.net()
    settings: dict[str, Any] = {"rescale": "normalize", **EXPECTATION}
    plain = _one_update(model, batch, damping=1e-2, **settings)
    scaled = _one_update(model, batch, damping=1e-2 * factor**2, loss_factor=factor, **settings)
    assert relative_difference(scaled, plain) < 1e-11
    control = _one_update(model, batch, damping=1e-2, loss_factor=factor, **settings)
    assert relative_difference(control, plain) > 1e-3


@pytest.mark.parametrize("variant", ["eva", "eva_f"])
def test_relative_damping_makes_the_direction_independent_of_the_unit_of_the_loss(variant: str) -> None:
    batch, model = MLP.batch(0), MLP.net()
    settings: dict[str, Any] = {"variant": variant, "damping_mode": "relative", "rescale": "normalize", **EXPECTATION}
    plain = _one_update(model, batch, **settings)
    assert relative_difference(_one_update(model, batch, loss_factor=1e4, **settings), plain) < 1e-11


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", ["mlp", "3-d linear"])
def test_the_order_of_the_samples_does_not_matter(task: str, variant: str) -> None:
    model = TASKS[task].net()
    x, y = TASKS[task].batch(0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"variant": variant, **EXPECTATION}
    assert (
        relative_difference(
            _one_update(model, (x[order], y[order]), **settings), _one_update(model, (x, y), **settings)
        )
        < 1e-11
    )


def test_channels_last_trains_the_same() -> None:
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = CONV.net().to(memory_format=memory_format)
        train(model, Eva(model.parameters(), variant="eva_f", rescale="clip", **EXPECTATION).attach(model), CONV, 10)
        ends.append(weights(model))
    assert relative_difference(ends[1], ends[0]) < 1e-11
