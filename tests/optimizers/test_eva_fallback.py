"""Parameters without Kronecker vectors follow torch's own SGD or AdamW, to the bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.optimizers import Eva
from tests.eva.nets import SEQUENCE, equal, loss_of, relative_difference, train, weights

SGD: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "decay": {"momentum": 0.9, "weight_decay": 0.1},
}


class _NoLayers(nn.Module):
    """Nothing here has Kronecker vectors but the head, which is not trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.scale = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Parameter(torch.ones(7, 1))
        self.head = nn.Linear(8, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(x) * self.scale))


def _trained(make: Any, steps: int = 8) -> dict[str, Tensor]:
    model = _NoLayers().double()
    train(model, make(model), SEQUENCE, steps)
    return weights(model)


@pytest.mark.parametrize("settings", SGD)
def test_sgd(settings: str) -> None:
    actual = _trained(lambda model: Eva(model.parameters(), lr=0.3, **SGD[settings]).attach(model))
    equal(actual, _trained(lambda model: torch.optim.SGD(model.parameters(), lr=0.3, fused=True, **SGD[settings])))
    # The default implementation rounds each operation by itself.
    plain = _trained(lambda model: torch.optim.SGD(model.parameters(), lr=0.3, **SGD[settings]))
    assert relative_difference(actual, plain) < 1e-13


def test_adamw() -> None:
    settings: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    actual = _trained(
        lambda model: Eva(model.parameters(), lr=0.3, fallback="adamw", fallback_lr=0.01, **settings).attach(model)
    )
    lr = 0.3 * (0.01 / 0.3)  # the ratio is what is kept
    equal(actual, _trained(lambda model: torch.optim.AdamW(model.parameters(), lr=lr, fused=True, **settings)))
    assert relative_difference(actual, _trained(lambda m: torch.optim.AdamW(m.parameters(), lr=lr, **settings))) < 1e-12


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_a_schedule_keeps_the_ratio_of_the_fallback_lr(fallback: Any) -> None:
    ends = []
    for make in (
        lambda p: Eva(p, lr=0.5, fallback=fallback, fallback_lr=0.05, momentum=0.9),
        lambda p: (
            torch.optim.SGD(p, lr=0.05, momentum=0.9)
            if fallback == "sgd"
            else torch.optim.AdamW(p, lr=0.05, weight_decay=0)
        ),
    ):
        model = _NoLayers().double()
        optimizer = make(model.parameters())
        if isinstance(optimizer, Eva):
            optimizer.attach(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        for step in range(8):
            train(model, optimizer, SEQUENCE, 1, first=step)
            schedule.step()
        ends.append(weights(model))
    assert relative_difference(*ends) < 1e-12


def test_a_group_marked_fallback_is_not_preconditioned() -> None:
    class Net(nn.Sequential):
        pass

    def net() -> nn.Module:
        torch.manual_seed(0)
        return Net(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    model = net()
    groups = [{"params": model[1].parameters()}, {"params": [*model[0].parameters(), *model[3].parameters()]}]
    groups[1].update(fallback=True, lr=0.05)
    optimizer = Eva(groups, lr=0.2, variant="eva_f").attach(model)
    optimizer.zero_grad()
    loss_of(model, SEQUENCE.batch(0)).backward()
    expected = [p.detach() - 0.05 * p.grad for p in groups[1]["params"]]  # type: ignore[operator, union-attr]
    optimizer.step()
    for p, wanted in zip(groups[1]["params"], expected, strict=True):
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-13, atol=1e-16)
    assert "kv_a" in optimizer.state[model[1].weight]
    assert "kv_a" not in optimizer.state[model[3].weight]


def test_a_bias_in_a_group_of_its_own_is_preconditioned_with_its_weight_and_decays_with_its_group() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 4)).double()

    ends = []
    for separate in (False, True):
        model = net()
        params: Any = [
            {"params": [model[0].weight, model[1].weight], "weight_decay": 0.1},
            {"params": [model[1].bias], "weight_decay": 0.1 if not separate else 0.0},
        ]
        train(model, Eva(params, lr=0.1, variant="eva_f").attach(model), SEQUENCE, 1)
        ends.append(weights(model))
    equal(ends[0]["1.weight"], ends[1]["1.weight"])
    decayed = ends[1]["1.bias"] - 0.1 * 0.1 * net()[1].bias.detach()
    torch.testing.assert_close(ends[0]["1.bias"], decayed, rtol=1e-12, atol=1e-15)
