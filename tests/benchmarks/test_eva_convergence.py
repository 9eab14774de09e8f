"""The convergence benchmark searches as it says, its controls are Eva without curvature, and its table adds up."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_efficient.optimizers import Eva
from tests.benchmarks._eva_baselines import FOOF, ScaledSGD
from tests.benchmarks._eva_methods import BASELINE, METHODS, Knob, Method
from tests.benchmarks._eva_report import mean_curve, steps_to
from tests.benchmarks._eva_runs import Run, ladder, next_trial, tune
from tests.benchmarks._eva_tasks import TASKS


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(net(x), x[:, :3]).backward()
        optimizer.step()
    return net


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize("kl_clip", [1e-4, 1e3])
def test_clip_control_is_eva_f_at_infinite_damping(kl_clip: float) -> None:
    damping = 1e8
    net, other = _net(), _net()
    eva = Eva(
        net.parameters(), lr=0.1 * damping, variant="eva_f", damping=damping, rescale="clip", kl_clip=kl_clip * damping
    )
    _train(net, eva.attach(net), 20)
    _train(other, ScaledSGD(other.parameters(), 0.1, kl_clip=kl_clip), 20)
    torch.testing.assert_close(net[0].weight, other[0].weight)


def test_normalised_control_is_eva_f_at_infinite_damping() -> None:
    net, other = _net(), _net()
    eva = Eva(net.parameters(), lr=0.01, variant="eva_f", damping=1e8, rescale="normalize")
    _train(net, eva.attach(net), 20)
    _train(other, ScaledSGD(other.parameters(), 0.01, kl_clip=None), 20)
    torch.testing.assert_close(net[0].weight, other[0].weight)


def test_foof_solves_with_the_second_moment_of_the_inputs() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    before = copy.deepcopy(net)
    x, y = torch.randn(8, 4), torch.randn(8, 3)
    optimizer = FOOF(net, 0.1, damping=0.01, kl_clip=1e9, every=1)
    F.mse_loss(net(x), y).backward()
    optimizer.step()
    rows_RD = F.pad(x, (0, 1), value=1.0)
    moment_DD = rows_RD.T @ rows_RD / len(rows_RD) + 0.01 * torch.eye(5)
    V_OD = torch.linalg.solve(moment_DD, torch.cat((net.weight.grad, net.bias.grad[:, None]), 1), left=False)
    torch.testing.assert_close(net.weight, before.weight - 0.1 * V_OD[:, :-1])
    torch.testing.assert_close(net.bias, before.bias - 0.1 * V_OD[:, -1])


@pytest.mark.parametrize("best_lr", [1e-4, 0.01, 3.0])
def test_search_ends_beside_tried_learning_rates(best_lr: float) -> None:
    method = Method("m", "", lambda net, p: [], {"llama": 0.01}, {"damping": Knob((0.03,))})

    def run(p: dict[str, float]) -> Run:
        score = math.log(p["lr"] / best_lr) ** 2 + math.log(p["damping"] / 0.1) ** 2
        return Run("llama", "m", p, 0, 1, score)

    done = tune("llama", method, 14, 0.01, run)
    best, _ = min(done, key=lambda each: each[1])
    beside = [p["lr"] for p, _ in done if p["damping"] == best["damping"]]
    assert min(beside) < best["lr"] < max(beside)
    assert abs(math.log10(best["lr"] / best_lr)) < 0.17
    assert len({str(p) for p, _ in done}) == len(done), "no trial is run twice"
    assert 9 <= len(done) <= 22


def test_search_leaves_a_region_where_everything_diverges() -> None:
    method = METHODS[BASELINE]
    trial, at_edge = next_trial(method, [({"lr": 1.0, "beta1": 0.9, "beta2": 0.999}, math.inf)])
    assert trial is not None
    assert at_edge
    assert trial["lr"] < 0.5


def test_ladder_values_stay_on_the_ladder() -> None:
    assert [ladder(0.03, 2, move) for move in (-1, 0, 1)] == [0.01, 0.03, 0.1]
    assert all(ladder(ladder(0.01, 6, move), 6, -move) == 0.01 for move in range(-12, 13))


def test_steps_to_a_loss_is_that_of_the_running_mean() -> None:
    losses = [1.0] * 20 + [0.0] * 20
    assert steps_to(losses, 0.5) == 30
    assert steps_to(losses, 1.0) == 20
    assert steps_to(losses, -0.1) is None


def test_curve_is_thin_and_ends_at_the_last_step() -> None:
    curve = mean_curve([[1.0] * 500, [3.0] * 500])
    assert len(curve) <= 60
    assert curve[-1] == [500, 2.0]


@pytest.mark.parametrize("task", TASKS)
def test_every_method_has_a_grid_or_a_reason(task: str) -> None:
    for method in METHODS.values():
        assert task in method.lr
        assert all(knob.start or name == "rest_lr" for name, knob in method.knobs.items())
