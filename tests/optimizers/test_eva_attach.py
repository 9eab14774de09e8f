"""Attaching and detaching, parameter groups that come later, and models that are compiled or wrapped."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.optimizers import Eva
from tests.eva.nets import CONV, MLP, SEQUENCE, TASKS, equal, relative_difference, train, weights

STRONG: dict[str, Any] = {"g_scale": "expectation", "kv_samples": None, "kv_new_weight": 0.5}


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_detach_leaves_no_hooks_and_a_second_attach_goes_on() -> None:
    straight, stopped = MLP.net(), MLP.net()
    one, two = (Eva(model.parameters(), **STRONG).attach(model) for model in (straight, stopped))
    assert _hooks(stopped) == 3
    train(straight, one, MLP, 6)
    train(stopped, two, MLP, 3)
    two.detach()
    two.detach()
    assert not two.attached
    assert _hooks(stopped) == 0
    with pytest.raises(RuntimeError, match="needs layer inputs"):
        two.step()
    two.attach(stopped)
    train(stopped, two, MLP, 3, first=3)
    equal(weights(stopped), weights(straight))


def test_attaching_the_same_module_again_changes_nothing() -> None:
    ends = []
    for times in (1, 3):
        model = MLP.net()
        optimizer = Eva(model.parameters(), **STRONG)
        for _ in range(times):
            assert optimizer.attach(model) is optimizer
        assert _hooks(model) == 3
        train(model, optimizer, MLP, 3)
        ends.append(weights(model))
    equal(*ends)


def test_a_step_after_detach_and_attach_elsewhere_is_allowed() -> None:
    model = MLP.net()
    optimizer = Eva(model.parameters(), **STRONG).attach(model)
    optimizer.detach()
    holder = nn.Sequential(model)
    optimizer.attach(holder)
    train(model, optimizer, MLP, 1)
    assert set(optimizer.kv_report()) == {"0.0", "0.2", "0.4"}


def test_two_optimizers_may_watch_one_module() -> None:
    model = MLP.net()
    first = Eva(model[:2].parameters(), **STRONG).attach(model)
    second = Eva(model[2:].parameters(), variant="eva_f", **{**STRONG, "g_scale": "reference"}).attach(model)
    loss = model(MLP.batch(0)[0]).square().mean()
    loss.backward()
    first.step()
    second.step()
    assert set(first.kv_report()) == {"0"}
    assert {name for name, each in second.kv_report().items() if not each.skipped} == {"2", "4"}


def test_a_group_that_is_added_after_attach_is_preconditioned() -> None:
    ends = []
    for late in (False, True):
        model = MLP.net()
        params = list(model.parameters())
        groups: Any = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
        optimizer = Eva(groups[:1] if late else groups, **STRONG).attach(model)
        if late:
            optimizer.add_param_group(groups[1])
        train(model, optimizer, MLP, 4)
        ends.append(weights(model))
        assert all("kv_a" in optimizer.state[model[i].weight] for i in (0, 2, 4))
    equal(*ends)


def test_a_group_that_is_added_between_steps_is_preconditioned() -> None:
    model = MLP.net()
    params = list(model.parameters())
    optimizer = Eva(params[:2], **STRONG).attach(model)
    train(model, optimizer, MLP, 2)
    kept = optimizer.state[model[0].weight]["kv_a"].clone()
    optimizer.add_param_group({"params": params[2:]})
    equal(optimizer.state[model[0].weight]["kv_a"], kept)
    train(model, optimizer, MLP, 2, first=2)
    assert all("kv_g" in optimizer.state[model[i].weight] for i in (0, 2, 4))
    assert _hooks(model) == 3


def test_eva_s_takes_a_group_that_is_added_between_steps() -> None:
    model = MLP.net()
    params = list(model.parameters())
    optimizer = Eva(params[:2], variant="eva_s")
    train(model, optimizer, MLP, 1)
    optimizer.add_param_group({"params": params[2:]})
    train(model, optimizer, MLP, 1)
    assert all("kv_a" in optimizer.state[model[i].weight] for i in (0, 2, 4))


def test_the_order_of_parameters_and_groups_does_not_matter() -> None:
    ends = []
    for order in (1, -1):
        model = CONV.net()
        groups: Any = [{"params": [p]} for p in model.parameters()][::order]
        train(model, Eva(groups, **STRONG).attach(model), CONV, 5)
        ends.append(weights(model))
    # The sums of the clip run in another order.
    assert relative_difference(*ends) < 1e-12


# ---- compiled and checkpointed models --------------------------------------------------------------------------------


class _Checkpointed(nn.Module):
    def __init__(self, net: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Any) -> Any:
        return checkpoint(self.net, x.clone().requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("task", ["mlp", "3-d linear"])
def test_a_compiled_model_trains_as_an_eager_one(task: str) -> None:
    torch.compiler.reset()
    plain, model = TASKS[task].net(), TASKS[task].net()
    train(plain, Eva(plain.parameters(), **STRONG).attach(plain), TASKS[task], 6)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = Eva(compiled.parameters(), **STRONG).attach(compiled)
    assert {name for name, p in optimizer.kv_report().items() if "_orig_mod" in name} == set()
    train(model, optimizer, TASKS[task], 6, forward=compiled)
    # Names are those of the plain model, and the compiled graph adds in another order at most.
    assert relative_difference(weights(model), weights(plain)) < 1e-12
    assert {name for name, each in optimizer.kv_report().items() if not each.skipped} <= {"0", "1", "2", "4"}


class _Own(nn.Sequential):
    """Dynamo compiles in place no class of torch's."""

    def forward(self, x: Any) -> Any:
        for layer in self:
            x = layer(x)
        return x


def test_a_model_compiled_in_place_captures_every_second_step() -> None:
    torch.compiler.reset()
    plain, model = MLP.net(), _Own(*MLP.net())
    settings: dict[str, Any] = {**STRONG, "kv_every": 2}
    train(plain, Eva(plain.parameters(), **settings).attach(plain), MLP, 6)
    optimizer = Eva(model.parameters(), **settings).attach(model)
    model.compile(backend="aot_eager", fullgraph=True)
    train(model, optimizer, MLP, 6)
    assert relative_difference(weights(model), weights(plain)) < 1e-12
    assert optimizer.stats.kv_updates == 3


def test_zero_grad_between_a_compiled_forward_and_its_backward() -> None:
    torch.compiler.reset()
    plain, model = MLP.net(), MLP.net()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for net, forward in ((plain, plain), (model, compiled)):
        optimizer = Eva(net.parameters(), **STRONG).attach(net)
        for step in range(4):
            loss = forward(MLP.batch(step)[0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert relative_difference(weights(model), weights(plain)) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_model_trains_as_a_plain_one(reentrant: bool) -> None:
    plain, model = MLP.net(), MLP.net()
    train(plain, Eva(plain.parameters(), **STRONG).attach(plain), MLP, 6)
    wrapped = _Checkpointed(model, reentrant)
    train(model, Eva(model.parameters(), **STRONG).attach(wrapped), MLP, 6, forward=wrapped)
    equal(weights(model), weights(plain))


def test_autocast_around_the_step_does_not_reach_it() -> None:
    ends = []
    for inside in (False, True):
        model = SEQUENCE.net().float()
        optimizer = Eva(model.parameters(), **STRONG).attach(model)
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(SEQUENCE.batch(step)[0]).float().square().mean()
            loss.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
        ends.append(weights(model))
    equal(*ends)
