"""A saved run goes on as if it had not stopped, to the bit; the state is small and plain."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_efficient.optimizers import Eva
from tests.eva.nets import CONV, TASKS, equal, relative_difference, train, weights

SETTINGS: dict[str, dict[str, Any]] = {
    "eva": {},
    "strong eva": {"g_scale": "expectation", "kv_samples": None, "kv_new_weight": 0.3},
    "every third step": {"kv_every": 3, "kv_new_weight": 0.5, "g_scale": "expectation"},
    "eva_f beside adamw": {"variant": "eva_f", "fallback": "adamw", "fallback_lr": 0.01, "kv_new_weight": 0.3},
    "eva_s, sums": {"variant": "eva_s"},
    "eva_s, average": {"variant": "eva_s", "kv_new_weight": 0.5, "fallback": "adamw", "fallback_lr": 0.01},
    "no momentum": {"momentum": 0.0, "kv_new_weight": 0.3},
}
FIRST, THEN = 4, 6  # the phase of "every third step" is 1 when the run stops


def _through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _eva(model: nn.Module, settings: dict[str, Any]) -> Eva:
    return Eva(model.parameters(), **{"lr": 0.1, **settings}).attach(model)


def _resumed(make: Callable[[], nn.Module], task: str, settings: dict[str, Any], *, attach_last: bool) -> None:
    """Compare a run that was stopped, saved and loaded with one that was not."""
    straight = make()
    optimizer = _eva(straight, settings)
    train(straight, optimizer, TASKS[task], FIRST)
    saved = _through_a_file({"model": straight.state_dict(), "optimizer": optimizer.state_dict()})
    train(straight, optimizer, TASKS[task], THEN, first=FIRST)
    resumed = make()
    resumed.load_state_dict(saved["model"])
    again = Eva(resumed.parameters(), **{"lr": 0.1, **settings})
    if not attach_last:
        again.attach(resumed)
    again.load_state_dict(saved["optimizer"])
    if attach_last:
        again.attach(resumed)
    train(resumed, again, TASKS[task], THEN, first=FIRST)
    equal(weights(resumed), weights(straight))
    equal(again.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("attach_last", [False, True], ids=["attach, load", "load, attach"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("task", ["conv and batch norm", "3-d linear"])
def test_a_resumed_run_equals_one_that_did_not_stop(task: str, settings: str, attach_last: bool) -> None:
    _resumed(TASKS[task].net, task, SETTINGS[settings], attach_last=attach_last)


class _BFloat16(nn.Sequential):
    """Weights of bfloat16 between inputs and outputs of float64."""

    def forward(self, x: Any) -> Any:
        return super().forward(x.bfloat16()).double()


def _bf16_net() -> nn.Module:
    torch.manual_seed(0)
    return _BFloat16(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).bfloat16()


@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_of_bfloat16_resume_with_vectors_of_float32(settings: str) -> None:
    _resumed(_bf16_net, "mlp", SETTINGS[settings], attach_last=False)
    model = _bf16_net()
    optimizer = _eva(model, SETTINGS[settings])
    train(model, optimizer, TASKS["mlp"], 2)
    optimizer.load_state_dict(_through_a_file(optimizer.state_dict()))
    for layer in (model[0], model[2]):
        state = optimizer.state[layer.weight]
        vectors = {name: value for name, value in state.items() if name.startswith("kv")}
        assert {value.dtype for value in vectors.values()} == {torch.float32}
        # The average moves in steps too small for bfloat16: rounding would show.
        assert any((v != v.bfloat16()).any() for v in vectors.values())
        assert state.get("momentum_buffer", layer.weight).dtype == torch.bfloat16


def test_the_state_is_plain_and_names_what_it_holds() -> None:
    model = CONV.net()
    optimizer = _eva(model, {"fallback": "adamw", "fallback_lr": 0.01})
    train(model, optimizer, CONV, 2)
    keys = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    assert keys["0.weight"] == keys["3.weight"] == {"momentum_buffer", "kv_a", "kv_g"}
    assert keys["3.bias"] == {"momentum_buffer"}
    assert keys["1.weight"] == {"exp_avg", "exp_avg_sq", "step"}
    loaded = _through_a_file(optimizer.state_dict())
    assert all(type(v) is torch.Tensor for state in loaded["state"].values() for v in state.values())


@pytest.mark.parametrize("variant", ["eva", "eva_f", "eva_s"])
def test_the_state_is_one_momentum_and_the_vectors_of_each_layer(variant: str) -> None:
    model = CONV.net()
    optimizer = _eva(model, {"variant": variant})
    train(model, optimizer, CONV, 2)
    numel = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    expected = sum(p.numel() for p in model.parameters())
    for layer in (model[0], model[3], model[6]):
        if variant == "eva_s":
            expected += sum(layer.weight.shape)
        else:
            inputs = getattr(layer, "groups", 1) * layer.weight[0].numel()
            expected += inputs + (layer.weight.shape[0] if variant == "eva" else 0)
    assert numel == expected


# ---- states of others ------------------------------------------------------------------------------------------------


def test_a_state_of_sgd_keeps_its_momentum_and_says_that_vectors_start_anew() -> None:
    model = TASKS["mlp"].net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    train(model, sgd, TASKS["mlp"], 3)
    optimizer = _eva(model, {})
    with pytest.warns(UserWarning, match="has momentum but no Kronecker vectors .*they start anew") as seen:
        optimizer.load_state_dict(_through_a_file(sgd.state_dict()))
    assert len(seen) == 1
    equal(optimizer.state[model[0].weight]["momentum_buffer"], sgd.state[model[0].weight]["momentum_buffer"])
    train(model, optimizer, TASKS["mlp"], 2)
    assert optimizer.stats.kv_updates == 2


@pytest.mark.parametrize("attached", [True, False])
def test_a_state_of_another_model_is_refused_by_the_name_of_its_layer(attached: bool) -> None:
    other = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, 4)).double()
    optimizer = _eva(other, {})
    train(other, optimizer, TASKS["mlp"], 1)
    model = TASKS["mlp"].net()
    mine = Eva(model.parameters())
    if attached:
        mine.attach(model)
    name = "2.weight" if attached else "number 2"
    with pytest.raises(ValueError, match=rf"parameter {name} .*\(7, 9\).*\(5, 9\).*of another model"):
        mine.load_state_dict(optimizer.state_dict())


def test_vectors_of_another_model_are_refused_also_without_momentum() -> None:
    other = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, 4)).double()
    optimizer = _eva(other, {"momentum": 0.0})
    train(other, optimizer, TASKS["mlp"], 1)
    model = TASKS["mlp"].net()
    late = Eva(model.parameters(), momentum=0.0)
    late.load_state_dict(optimizer.state_dict())
    for act in (lambda: late.attach(model), lambda: _eva(model, {}).load_state_dict(optimizer.state_dict())):
        with pytest.raises(ValueError, match=r"layer '2' has kv_g of 7 entries.*\(5, 9\) needs 5.*of another model"):
            act()


def test_a_checkpoint_of_contiguous_weights_goes_on_in_channels_last() -> None:
    """The saved momentum has the memory order of before; it must still be updated."""
    straight = CONV.net()
    optimizer = _eva(straight, {})
    train(straight, optimizer, CONV, FIRST)
    saved = _through_a_file({"model": straight.state_dict(), "optimizer": optimizer.state_dict()})
    train(straight, optimizer, CONV, THEN, first=FIRST)
    resumed = CONV.net().to(memory_format=torch.channels_last)
    resumed.load_state_dict(saved["model"])
    again = _eva(resumed, {})
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, CONV, THEN, first=FIRST)
    assert relative_difference(weights(resumed), weights(straight)) < 1e-11


def test_a_model_may_change_its_memory_format_between_two_steps() -> None:
    ends = []
    for change in (False, True):
        model = CONV.net()
        optimizer = _eva(model, {})
        train(model, optimizer, CONV, FIRST)
        if change:
            model.to(memory_format=torch.channels_last)
        train(model, optimizer, CONV, THEN, first=FIRST)
        ends.append(weights(model))
    assert relative_difference(ends[1], ends[0]) < 1e-11


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copied_optimizer_has_the_state_and_asks_to_be_attached(copy_of: Callable[[Any], Any]) -> None:
    model = TASKS["mlp"].net()
    optimizer = _eva(model, {"g_scale": "expectation", "kv_new_weight": 0.5})
    train(model, optimizer, TASKS["mlp"], FIRST)
    model2, again = copy_of((model, optimizer))
    assert not again.attached
    with pytest.raises(RuntimeError, match="needs layer inputs"):
        again.step()
    for module in model2.modules():
        module._forward_hooks.clear()
    again.attach(model2)
    train(model, optimizer, TASKS["mlp"], THEN, first=FIRST)
    train(model2, again, TASKS["mlp"], THEN, first=FIRST)
    equal(weights(model2), weights(model))


@pytest.mark.parametrize("moment", ["before a forward", "after a forward", "after a step"])
@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_hooked_module_can_be_copied_and_the_copy_does_not_reach_the_optimizer(
    copy_of: Callable[[Any], Any], moment: str
) -> None:
    model = TASKS["mlp"].net()
    optimizer = _eva(model, {"g_scale": "expectation"})
    if moment == "after a step":
        train(model, optimizer, TASKS["mlp"], 1)
    if moment == "after a forward":
        model(TASKS["mlp"].batch(0)[0])
    other = copy_of(model)
    reference = TASKS["mlp"].net()
    plain = _eva(reference, {"g_scale": "expectation"})
    if moment == "after a step":
        train(reference, plain, TASKS["mlp"], 1)
    optimizer.zero_grad()
    plain.zero_grad()
    for net in (reference, model):
        net(TASKS["mlp"].batch(5)[0]).square().mean().backward()
    other(TASKS["mlp"].batch(6)[0]).square().mean().backward()
    optimizer.step()
    plain.step()
    equal(weights(model), weights(reference))


def test_loading_says_nothing_where_all_is_there() -> None:
    model = TASKS["mlp"].net()
    optimizer = _eva(model, {})
    train(model, optimizer, TASKS["mlp"], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(_through_a_file(optimizer.state_dict()))
        Eva(model.parameters()).load_state_dict(Eva(model.parameters()).state_dict())
