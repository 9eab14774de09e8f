"""Several adapters, none, and back: on both backends A is the same and frozen throughout."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, disable_adapter, merge, set_adapter
from lightning_efficient.lora_fa.inject import adapted_layers
from lightning_efficient.lora_fa.state import A_fingerprints
from tests.lora_fa.nets import TARGETS, adapted_block, block, fill_B, gradients, normal

X = normal(5, 12, dtype=torch.float32)
BACKENDS = ["native", "peft"]


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def B_of(adapter: str, layers: list[str] = TARGETS) -> list[str]:
    return [f"{layer}.lora_B.{adapter}.weight" for layer in layers]


def two(backend: str, **settings: Any) -> nn.Module:
    model = adapted_block(backend=backend)
    second = {"target_modules": TARGETS, "r": 3, "alpha": 6.0, "seed": 5, "backend": backend, **settings}
    apply_lora_fa(model, LoRAFAConfig(**second), adapter_name="second")
    return fill_B(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_disabled_model_is_the_base_and_comes_back(backend: str) -> None:
    model, base = adapted_block(backend=backend), block()
    before, A = model(X), A_fingerprints(model)
    with disable_adapter(model), disable_adapter(model):
        assert torch.equal(model(X), base(X))

    assert torch.equal(model(X), before)
    assert A_fingerprints(model) == A
    assert trainable(model) == B_of("default")
    model(X).sum().backward()
    assert list(gradients(model)) == B_of("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_inside_switches_the_adapters_on_again(backend: str) -> None:
    model = adapted_block(backend=backend)
    before = model(X)
    with pytest.raises(ArithmeticError), disable_adapter(model):
        raise ArithmeticError

    assert torch.equal(model(X), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_active_adapter_runs_and_trains_alone(backend: str) -> None:
    model = two(backend)
    A = A_fingerprints(model)
    assert len(A) == 4
    alone = {}
    for name in ("default", "second", "default"):
        set_adapter(model, name)
        assert trainable(model) == B_of(name)
        assert model.first.why_plain() is None
        if name in alone:
            assert torch.equal(model(X), alone[name])
        alone[name] = model(X)
        for layer in adapted_layers(model).values():
            weight = layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
            x = normal(3, layer.in_features, dtype=torch.float32)
            torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ weight.t(), rtol=1e-4, atol=1e-5)

    assert not torch.allclose(alone["default"], alone["second"])
    assert A_fingerprints(model) == A


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_adapter_goes_where_its_own_settings_say(backend: str) -> None:
    model = two(backend, target_modules=["second", "score"])
    set_adapter(model, "default")
    default = model(X)
    set_adapter(model, "second")

    assert [name for name, layer in adapted_layers(model).items() if "second" in layer.lora_A] == ["second", "score"]
    assert trainable(model) == B_of("second", ["second", "score"])
    x = normal(3, 12, dtype=torch.float32)
    assert torch.equal(model.first(x), model.first.base_layer(x))
    set_adapter(model, "default")
    assert torch.equal(model(X), default)
    assert trainable(model) == B_of("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_adapter_is_named(backend: str) -> None:
    model = two(backend)

    with pytest.raises(ValueError, match=r"no adapter 'third'.*default, second"):
        set_adapter(model, "third")
    assert trainable(model) == B_of("second")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("switch", ["disable", "set"])
def test_merged_adapters_do_not_switch(backend: str, switch: str) -> None:
    """What is inside of the base's weight can be neither left out nor exchanged."""
    model = two(backend)
    merge(model)

    with pytest.raises(ValueError, match=r"merged.*Call unmerge first"):
        set_adapter(model, "default") if switch == "set" else disable_adapter(model).__enter__()


def test_a_model_without_adapters_is_told_so() -> None:
    for call in (lambda m: set_adapter(m, "default"), merge, lambda m: disable_adapter(m).__enter__()):
        with pytest.raises(ValueError, match="no adapters"):
            call(block())


def test_pefts_own_switches_leave_A_frozen() -> None:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    model = peft.get_peft_model(block(), config)
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    for name in ("default", "second"):
        model.set_adapter(name)
        apply_lora_fa(model, LoRAFAConfig(), adapter_name=name)
    fill_B(model)
    A = A_fingerprints(model)
    prefix = "base_model.model."

    def check(active: str) -> None:
        assert trainable(model) == [prefix + name for name in B_of(active)]
        assert A_fingerprints(model) == A
        assert all(layer.why_plain() is None for layer in adapted_layers(model).values())

    check("second")
    model.set_adapter("default")
    check("default")
    with model.disable_adapter():
        assert torch.equal(model(X), block()(X))
    check("default")
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    check("default")
    model.set_adapter("second")
    model.delete_adapter("default")
    A = {name: value for name, value in A.items() if not name.endswith("default")}
    check("second")
    model.train().eval()
    check("second")


def test_layers_that_peft_made_are_taken_over_with_their_numbers() -> None:
    import peft

    model = peft.get_peft_model(block(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    fill_B(model)
    before, A = model(X), A_fingerprints(model)
    report = apply_lora_fa(model, LoRAFAConfig(r=99, seed=5))

    assert [name.removeprefix("base_model.model.") for name in report.adapted] == TARGETS
    assert A_fingerprints(model) == A
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), [BACKENDS, BACKENDS[::-1]])
def test_backends_do_not_mix(first: str, second: str) -> None:
    model = adapted_block(backend=first)

    with pytest.raises(ValueError, match="already"):
        apply_lora_fa(model, LoRAFAConfig(target_modules=TARGETS, r=4, backend=second), adapter_name="other")
