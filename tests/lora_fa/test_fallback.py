"""Where the lean function does not hold, the layer's own forward runs, and the report says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa
from lightning_efficient.lora_fa.inject import adapted_layers, report
from tests.lora_fa.nets import TARGETS, adapted_block, block, fill_B, gradients, normal

X = normal(5, 12, dtype=torch.float32)
BACKENDS = ["native", "peft"]


def seen(log: list[Any]) -> Callable[..., None]:
    return lambda *args: log.append(1)


def hook_B(model: Any, log: list[Any]) -> None:
    model.first.lora_B["default"].register_forward_hook(seen(log))


def backward_hook_B(model: Any, log: list[Any]) -> None:
    model.first.lora_B["default"].register_full_backward_pre_hook(seen(log))


def hook_base(model: Any, log: list[Any]) -> None:
    model.first.base_layer.register_forward_hook(seen(log))


def replace_forward_of_base(model: Any, log: list[Any]) -> None:
    """As accelerate does, to bring weights in when they are needed."""
    base, forward = model.first.base_layer, model.first.base_layer.forward
    base.forward = lambda x: log.append(1) or forward(x)


def train_base(model: Any, log: list[Any]) -> None:
    model.first.base_layer.weight.requires_grad_(True)
    log.append(1)


def train_A(model: Any, log: list[Any]) -> None:
    model.first.lora_A["default"].weight.requires_grad_(True)
    log.append(1)


CASES = {
    "hooks watch": [hook_B, backward_hook_B, hook_base],
    "is not known": [replace_forward_of_base],
    "base is trainable": [train_base],
    "A is trainable": [train_A],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("reason", "change"), [(why, each) for why, some in CASES.items() for each in some])
def test_the_plain_forward_runs_and_is_listed(backend: str, reason: str, change: Callable[..., None]) -> None:
    model, lean = adapted_block(backend=backend), adapted_block(backend=backend)
    log: list[Any] = []
    change(model, log)
    found = report(model)
    y = model(X.clone().requires_grad_())
    y.square().sum().backward()
    lean(X).square().sum().backward()

    assert log
    assert found.adapted == ["second"]
    assert reason in found.fell_back["first"]
    assert f"first: {found.fell_back['first']}" in str(found)
    torch.testing.assert_close(y, lean(X), rtol=1e-5, atol=1e-5)
    for name, grad in gradients(lean).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_active_adapters_add_up(backend: str) -> None:
    model = adapted_block(backend=backend)
    apply_lora_fa(model, LoRAFAConfig(target_modules=TARGETS, r=3, seed=2, backend=backend), adapter_name="other")
    fill_B(model)
    layer = model.first
    layer.set_adapter(["default", "other"])
    weight = sum(layer.scaling[n] * layer.lora_B[n].weight @ layer.lora_A[n].weight for n in ("default", "other"))

    assert report(model).fell_back == {"first": "2 adapters are active"}
    torch.testing.assert_close(layer(X), layer.base_layer(X) + X @ weight.t(), rtol=1e-5, atol=1e-5)
    assert not any(down.weight.requires_grad for down in layer.lora_A.values())


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(("setting", "reason"), [("use_dora", "DoRA"), ("lora_bias", "B has a bias")])
def test_what_only_peft_can_do_is_left_to_peft(setting: str, reason: str) -> None:
    import peft

    def build() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=TARGETS, **{setting: True})
        return fill_B(peft.get_peft_model(block(), config))

    model, theirs = build(), build()
    for ours, there in zip(adapted_layers(model).values(), adapted_layers(theirs).values(), strict=True):
        there.load_state_dict(ours.state_dict())
    found = apply_lora_fa(model, LoRAFAConfig())

    assert found.adapted == []
    assert all(reason in why for why in found.fell_back.values())
    assert len(found.fell_back) == 2
    assert torch.equal(model(X), theirs(X))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)


def test_lean_off_is_said() -> None:
    found = report(adapted_block(lean=False))

    assert found.fell_back == dict.fromkeys(TARGETS, "lean is off")
    assert found.est_saved_bytes_per_token == 0


class Unknown(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def test_a_linear_with_its_own_forward_keeps_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Unknown(12, 12))
    before = model(X)
    found = apply_lora_fa(model, LoRAFAConfig(r=4))

    assert found.fell_back == {"0": "the base, Unknown, is not known"}
    assert torch.equal(model(X), before)
    fill_B(model)
    layer = model[0]
    weight = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(model(X), before + X @ weight.t())


def test_the_report_counts() -> None:
    found = report(adapted_block())

    assert found.adapted == TARGETS
    assert found.trainable == 4 * (20 + 12)
    assert found.total == found.trainable + 4 * (12 + 20) + (12 * 20 + 20) + 20 * 12 + 12 * 3 + 3
    assert found.est_saved_bytes_per_token == 2 * 4 * 4
    assert "2 linears adapted" in str(found)


def test_a_norm_that_trains_again_gets_its_gradient() -> None:
    from tests.lora_fa.nets import ids, llama

    model = llama()
    apply_lora_fa(model, LoRAFAConfig(r=4))
    model.model.norm.weight.requires_grad_(True)
    model(ids()).square().sum().backward()

    assert model.model.norm.weight.grad.any()
