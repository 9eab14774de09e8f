"""EvaP as an optimizer: which parameters get which rule, its state, and its refusals."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_efficient.optimizers import EvaP


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=3), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, first: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(10, 2, 4, 4, generator=generator), torch.randn(10, 3, generator=generator)
        optimizer.zero_grad()
        (model(x.to(dtype)) - y.to(dtype)).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_what_is_no_layer_follows_adamw_exactly() -> None:
    model = net()
    optimizer = EvaP(model.parameters(), lr=0.01, weight_decay=0.1, fallback_lr=0.003).attach(model, skip=["8"])
    other = copy.deepcopy(model)
    train(model, optimizer, 1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad
    rest = {"1.weight", "1.bias", "3.weight", "0.bias", "3.bias", "6.bias", "8.weight", "8.bias"}
    named = dict(other.named_parameters())
    torch.optim.AdamW([named[name] for name in rest], lr=0.003, weight_decay=0.1, fused=True).step()

    for name, p in model.named_parameters():
        assert torch.equal(p, named[name]) == (name in rest), name
    reasons = {name: each.skipped for name, each in optimizer.kv_report().items() if each.skipped}
    assert reasons["8.weight"] == "skip has '8'"
    assert reasons["3.weight"] == "a convolution with groups"


def test_a_layer_too_narrow_for_the_rank_only_has_its_rows_normalised() -> None:
    model = nn.Linear(4, 2, bias=False).double()
    optimizer = EvaP(model.parameters(), lr=0.5, rank=2).attach(model)
    before = model.weight.detach().clone()
    model(torch.randn(3, 4, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    rows = torch.nn.functional.normalize(model.weight.grad, dim=1)  # type: ignore[arg-type]
    torch.testing.assert_close(
        before - model.weight, 0.2 * 0.5 * 2 * rows, rtol=1e-11, atol=0
    )  # 1e-12 is added to a length


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resuming_equals_not_having_stopped(rank: int, dtype: torch.dtype) -> None:
    whole, first, second = net(dtype), net(dtype), net(dtype)
    train(whole, EvaP(whole.parameters(), rank=rank).attach(whole), 6)
    optimizer = EvaP(first.parameters(), rank=rank).attach(first)
    train(first, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    resumed = EvaP(second.parameters(), rank=rank).attach(second)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, 3, first=3)

    assert torch.equal(weights(second), weights(whole))
    kept = {state["leading"].dtype for state in resumed.state.values() if "leading" in state}
    assert kept == {torch.promote_types(dtype, torch.float32)}


def test_the_state_is_the_momentum_and_rank_vectors_of_inputs() -> None:
    model = nn.Sequential(nn.Linear(10, 8, bias=False), nn.Linear(8, 9, bias=False))
    optimizer = EvaP(model.parameters(), rank=3).attach(model)
    model(torch.randn(4, 10)).sum().backward()
    optimizer.step()
    entries = sum(v.numel() for state in optimizer.state.values() for v in state.values())
    assert entries == 80 + 72 + 3 * (10 + 8)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_step_reads_nothing_from_the_device(rank: int) -> None:
    class Count(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model = net(torch.float32)
    optimizer = EvaP(model.parameters(), rank=rank).attach(model)
    train(model, optimizer, 1)
    with Count() as count:
        optimizer.step()
    assert count.reads == 0


def test_channels_last_trains_the_same_weights() -> None:
    plain, other = net(), net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for model in (plain, other):
        train(model, EvaP(model.parameters()).attach(model), 4)
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
def test_the_compiled_step_equals_the_eager_one_under_a_schedule() -> None:
    found = {}
    for backend in ("eager", "compiled"):
        model = net()
        optimizer = EvaP(model.parameters(), rank=2, backend=backend).attach(model)  # type: ignore[arg-type]
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(5):
            train(model, optimizer, 1, first=step)
            schedule.step()
        found[backend] = weights(model)
    torch.testing.assert_close(found["compiled"], found["eager"], rtol=0, atol=1e-11)


def test_a_step_without_a_module_says_what_to_call() -> None:
    model = net()
    optimizer = EvaP(model.parameters())
    with pytest.raises(RuntimeError, match=r"EvaP needs to know the layers: call optimizer.attach\(model\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"backend": "triton"}, "backend is 'triton': there is no such backend. Use one of eager, compiled"),
        ({"lr": 0.0, "fallback_lr": 0.1}, "fallback_lr is 0.1 with lr 0.0"),
    ],
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaP(net().parameters(), **settings)


def test_a_state_of_another_rank_is_refused() -> None:
    model = net()
    optimizer = EvaP(model.parameters(), rank=1).attach(model)
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="rank"):
        EvaP(model.parameters(), rank=2).attach(model).load_state_dict(optimizer.state_dict())


def test_a_copy_goes_on_once_it_is_attached() -> None:
    model = net()
    optimizer = EvaP(model.parameters()).attach(model)
    train(model, optimizer, 2)
    other_model, other = copy.deepcopy((model, optimizer))
    other.attach(other_model)
    train(model, optimizer, 2, first=2)
    train(other_model, other, 2, first=2)
    assert torch.equal(weights(model), weights(other_model))


def test_a_layer_behind_a_zero_one_wakes_up() -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)).double()
    nn.init.zeros_(model[1].weight)
    optimizer = EvaP(model.parameters(), rank=1).attach(model)
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert 0 < optimizer.kv_report()["0"].rho < 1  # type: ignore[operator]


def test_the_report_has_the_layers_of_the_last_step() -> None:
    model = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8)]).double()
    optimizer = EvaP(model.parameters()).attach(model)
    for layers in (model, model[:1]):
        optimizer.zero_grad()
        sum(layer(torch.randn(5, 6, dtype=torch.float64)).square().mean() for layer in layers).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert set(optimizer.kv_report()) == {"0"}
    assert optimizer.stats.layers == 1


def test_a_fallback_group_has_the_learning_rate_that_it_says() -> None:
    for own in ({"lr": 1e-3}, {"fallback_lr": 1e-3}, {"lr": 0.02, "fallback_lr": 1e-3}):
        p, layer = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Linear(3, 4).double()
        groups = [{"params": layer.parameters()}, {"params": [p], "fallback": True, **own}]
        optimizer = EvaP(groups, lr=0.1, fallback_lr=0.05).attach(layer)
        p.grad = torch.ones_like(p)
        optimizer.step()
        torch.testing.assert_close(1 - p.detach(), torch.full_like(p, 1e-3), rtol=1e-6, atol=0)
