"""Adapters inside of the base's weight, and out again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, merge, set_adapter, unmerge
from lightning_efficient.lora_fa.inject import adapted_layers
from tests.lora_fa import hf
from tests.lora_fa.nets import TARGETS, adapted_block, block, fill_B, normal, quantised

X = normal(5, 12, dtype=torch.float32)
BACKENDS = ["native", "peft"]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.base_layer.weight.detach().clone() for name, layer in adapted_layers(model).items()}


def two(backend: str) -> nn.Module:
    model = adapted_block(backend=backend)
    apply_lora_fa(model, LoRAFAConfig(target_modules=TARGETS, r=3, seed=5, backend=backend), adapter_name="other")
    fill_B(model)
    set_adapter(model, "default")
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep_copy", [True, False])
def test_a_merged_model_says_the_same_and_comes_apart(backend: str, keep_copy: bool) -> None:
    model = adapted_block(backend=backend)
    before, y = weights(model), model(X)
    merge(model, keep_copy=keep_copy)
    merged = weights(model)
    with torch.no_grad():
        error = float((model(X) - y).norm() / y.norm())

    assert 0 < error < 1e-6
    for name, layer in adapted_layers(model).items():
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(merged[name], before[name] + layer.scaling["default"] * product)
    unmerge(model)
    for name, weight in weights(model).items():
        if keep_copy:
            assert torch.equal(weight, before[name])
        else:  # W + D - D: one rounding of W + D
            torch.testing.assert_close(weight, before[name], rtol=0, atol=2**-23 * float(merged[name].abs().max()))
    torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-6)
    if keep_copy:
        assert torch.equal(model(X), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_twice_and_unmerging_twice_are_refused(backend: str) -> None:
    model = adapted_block(backend=backend)
    with pytest.raises(ValueError, match="No adapter is merged"):
        unmerge(model)
    merge(model)
    once = weights(model)
    with pytest.raises(ValueError, match=r"merged already.*twice"):
        merge(model)
    assert all(torch.equal(weight, once[name]) for name, weight in weights(model).items())
    unmerge(model)
    with pytest.raises(ValueError, match="No adapter is merged"):
        unmerge(model)


def break_last_B(model: Any) -> None:
    model.second.lora_B["default"].weight.data[0, 0] = float("nan")


def overflow_sum(model: Any) -> None:
    """Every factor is finite, and their product with the scale is not, in the base's dtype."""
    model.second.base_layer.to(torch.float16)
    model.second.lora_B["default"].weight.data.fill_(1e4)
    model.second.lora_A["default"].weight.data.fill_(1e4)


def break_base(model: Any) -> None:
    model.second.base_layer.weight.data[0, 0] = float("inf")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", [break_last_B, overflow_sum, break_base])
def test_what_is_not_finite_changes_nothing(backend: str, fault: Any) -> None:
    model = adapted_block(backend=backend)
    fault(model)
    before = weights(model)

    with pytest.raises(ValueError, match="'second' is not finite: nothing was merged"):
        merge(model, keep_copy=True)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert not any(layer.merged or "_unmerged" in vars(layer) for layer in adapted_layers(model).values())


class Unknown(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def test_a_base_that_cannot_be_changed_is_refused_before_others_are() -> None:
    model = nn.Sequential(nn.Linear(12, 12), Unknown(12, 12))
    apply_lora_fa(model, LoRAFAConfig(r=4))
    fill_B(model)
    before = weights(model)

    with pytest.raises(ValueError, match="'1', a Unknown, cannot be changed"):
        merge(model)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_adapter_that_was_merged_is_the_one_that_comes_out(backend: str) -> None:
    """Even where another one was made active in between, by the layers' own means."""
    model = two(backend)
    before = weights(model)
    merge(model)
    for layer in adapted_layers(model).values():
        layer.set_adapter("other")
    unmerge(model)

    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float64_and_a_bfloat16_base_merge_in_their_own_dtype(backend: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 2**-6)):
        model = adapted_block(dtype=dtype, adapter_dtype="float32", backend=backend)
        y = model(X.to(dtype))
        merge(model)

        assert model.first.base_layer.weight.dtype == dtype
        torch.testing.assert_close(model(X.to(dtype)), y, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transposed_base_merges(backend: str) -> None:
    model = hf.build("gpt2").eval()
    apply_lora_fa(model, LoRAFAConfig(r=4, backend=backend))
    fill_B(model)
    y, before = hf.logits(model, "gpt2"), weights(model)
    merge(model)
    torch.testing.assert_close(hf.logits(model, "gpt2"), y, rtol=1e-4, atol=1e-5)
    unmerge(model)

    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Merge lora module to [48]-bit linear may get different generations")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("used_before", [True, False])
def test_a_quantised_base_merges_with_a_figure_and_comes_apart_exactly(
    backend: str, kind: str, used_before: bool
) -> None:
    model = nn.Sequential(quantised(kind, normal(16, 64, dtype=torch.float32)))
    apply_lora_fa(model, LoRAFAConfig(r=4, backend=backend))
    fill_B(model)
    x = normal(5, 64, dtype=torch.float16 if kind == "int8" else torch.float32)
    if used_before:
        model(x)
    before = model[0].base_layer.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"rounds the sum: the worst weight \(0\) is off by \d+\.\d%"):
        merge(model)
    layer = model[0]
    with torch.no_grad():
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        merged = model(x).float()
        changed = not torch.equal(layer.base_layer.weight, before)
    unmerge(model)
    y = model(x).detach().float()

    assert changed
    assert float((merged - y).norm() / y.norm()) < 0.2
    assert float((merged - y).norm()) < float((x.float() @ delta.t()).norm())
    assert torch.equal(model[0].base_layer.weight, before)
    model(x)
    with pytest.raises(ValueError, match="No adapter is merged"):
        unmerge(model)


def test_a_plain_model_of_the_same_weights_says_what_the_merged_one_says() -> None:
    model, plain = adapted_block(), block()
    merge(model)
    plain.load_state_dict(
        {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name}
    )

    assert torch.equal(plain(X), model(X))
