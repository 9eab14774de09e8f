"""An adapted model is still a module: it can be cast, copied, pickled, saved, and put together in odd ways."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, LoRAFALinear, apply_lora_fa, merge
from lightning_efficient.lora_fa.inject import adapted_layers
from lightning_efficient.lora_fa.layer import LeanLinear
from lightning_efficient.lora_fa.state import A_fingerprints
from tests.lora_fa.nets import TARGETS, adapted_block, block, fill_B, gradients, ids, llama, normal

X = normal(5, 12, dtype=torch.float32)
BACKENDS = ["native", "peft"]


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.half(), lambda m: m.bfloat16().float()]
)
def test_casting_the_model_leaves_the_adapters_their_bits(backend: str, cast: Any) -> None:
    model = adapted_block(backend=backend)
    before = adapters(model)
    model = cast(model)
    after = adapters(model)

    assert all(torch.equal(after[name], before[name]) and after[name].dtype == torch.float32 for name in before)
    dtype = model.score.weight.dtype
    assert model.first.base_layer.weight.dtype == dtype
    x = X.to(dtype).requires_grad_()
    model(x).sum().backward()
    assert {grad.dtype for grad in gradients(model).values()} == {torch.float32}
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_there_keeps_its_parameters_dtype(backend: str) -> None:
    model = adapted_block(backend=backend)
    model(X).sum().backward()
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()

    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


def by_pickle(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, by_pickle, by_torch])
@pytest.mark.parametrize("kind", ["block", "llama"])
def test_copies_are_lean_and_equal(backend: str, way: Any, kind: str) -> None:
    model: nn.Module = block() if kind == "block" else llama()
    targets = TARGETS if kind == "block" else "all-linear"
    apply_lora_fa(model, LoRAFAConfig(target_modules=targets, r=4, backend=backend))
    fill_B(model)
    twin = way(model)
    x = X if kind == "block" else ids()
    twin(x).square().sum().backward()
    from_twin = gradients(twin)
    model.zero_grad()
    model(x).square().sum().backward()

    assert all(isinstance(layer, LeanLinear) for layer in adapted_layers(twin).values())
    assert [type(a) for a in twin.modules()] == [type(b) for b in model.modules()]
    assert torch.equal(twin(x), model(x))
    assert all(torch.equal(from_twin[name], grad) for name, grad in gradients(model).items())


def test_a_deep_copy_shares_nothing() -> None:
    model = adapted_block()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.first.lora_B["default"].weight.zero_()
    twin.first.enable_adapters(False)

    assert model.first.lora_B["default"].weight.any()
    assert not model.first.disable_adapters


def test_types_stay_what_they_were_to_isinstance() -> None:
    model = llama()
    kinds = [type(each) for each in model.modules()]
    apply_lora_fa(model, LoRAFAConfig(r=4))

    for kind in kinds:
        assert kind is nn.Linear or any(isinstance(each, kind) for each in model.modules())
    assert all(isinstance(layer, LoRAFALinear) for layer in adapted_layers(model).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_call_changes_nothing(backend: str) -> None:
    model = adapted_block(backend=backend)
    before, A = model(X), A_fingerprints(model)
    report = apply_lora_fa(model, LoRAFAConfig(target_modules=TARGETS, r=4, alpha=8.0, backend=backend, seed=9))

    assert torch.equal(model(X), before)
    assert A_fingerprints(model) == A
    assert report.adapted == TARGETS


class Odd(nn.Module):
    """Names that mean something to a regular expression, in nested modules."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a+b": nn.Linear(12, 12), "(c)": nn.ModuleDict({"[d]*": nn.Linear(12, 12)})})
        self.fc = nn.Linear(12, 12)
        self.block = nn.ModuleDict({"fc": nn.Linear(12, 12)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts["(c)"]["[d]*"](self.parts["a+b"](x))
        return self.block["fc"](self.fc(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_are_taken_literally(backend: str) -> None:
    model = Odd()
    names = ["parts.a+b", "parts.(c).[d]*"]
    report = apply_lora_fa(model, LoRAFAConfig(target_modules=names, r=4, backend=backend))

    assert report.adapted == names
    assert list(adapted_layers(model)) == names


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_excluded_layer_whose_name_ends_as_an_adapted_one_stays_plain(backend: str) -> None:
    model = Odd()
    settings = {"target_modules": "all-linear", "exclude_modules": ["block.fc", "a+b", "[d]*"]}
    apply_lora_fa(model, LoRAFAConfig(r=4, backend=backend, **settings))

    assert list(adapted_layers(model)) == ["fc"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_and_alphas_by_pattern(backend: str) -> None:
    model = Odd()
    apply_lora_fa(
        model,
        LoRAFAConfig(
            r=4, alpha=8.0, backend=backend, rank_pattern={"^fc": 2, r"parts\.a\+b": 3}, alpha_pattern={"fc": 5.0}
        ),
    )
    layers = adapted_layers(model)

    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        "fc": 2, "block.fc": 4, "parts.a+b": 3, "parts.(c).[d]*": 4
    }  # fmt: skip
    assert {name: layer.scaling["default"] for name, layer in layers.items()} == {
        "fc": 5 / 2, "block.fc": 5 / 4, "parts.a+b": 8 / 3, "parts.(c).[d]*": 2.0
    }  # fmt: skip


def test_a_block_that_stands_in_two_places_is_adapted_once() -> None:
    one = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
    model = nn.Sequential(one, one)
    report = apply_lora_fa(model, LoRAFAConfig(r=4))
    fill_B(model)
    x = X.clone().requires_grad_()
    model(x).sum().backward()

    layer = adapted_layers(model)["0.0"]
    weight = layer.base_layer.weight + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    y = torch.tanh(nn.functional.linear(torch.tanh(nn.functional.linear(X, weight, layer.bias)), weight, layer.bias))
    assert report.adapted == ["0.0"]
    torch.testing.assert_close(model(x), y)
    assert layer.lora_B["default"].weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_linear_with_two_names_is_warned_about(backend: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12)})
    model["c"] = model["a"]

    with pytest.warns(UserWarning, match="'a' is also 'c'"):
        apply_lora_fa(model, LoRAFAConfig(r=4, backend=backend))


def test_a_linear_used_twice_in_a_forward_adds_its_gradients() -> None:
    ours, plain = adapted_block(dtype=torch.float64), adapted_block(dtype=torch.float64, lean=False)
    for model in (ours, plain):
        x = normal(5, 12)
        model.second(model.first(model.second(model.first(x)))).square().sum().backward()

    for a, b in zip(gradients(ours).values(), gradients(plain).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_expert_that_saw_no_token_has_no_gradient() -> None:
    experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
    apply_lora_fa(experts, LoRAFAConfig(r=4))
    fill_B(experts)
    (experts[0](X).sum() + experts[1](X[:0]).sum()).backward()
    used, empty, unused = (layer.lora_B["default"].weight.grad for layer in experts)
    torch.optim.AdamW([p for p in experts.parameters() if p.requires_grad]).step()

    assert used.any()
    assert torch.equal(empty, torch.zeros_like(used))
    assert unused is None


@pytest.mark.parametrize("tie", [True, False])
def test_all_linear_leaves_the_head_out(tie: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc, self.out = nn.Embedding(7, 12), nn.Linear(12, 12), nn.Linear(12, 7, bias=False)
            if tie:
                self.out.weight = self.embed.weight

    model = Tied()
    report = apply_lora_fa(model, LoRAFAConfig(r=4))

    assert report.adapted == (["fc"] if tie else ["fc", "out"])
    if tie:
        model = Tied()
        apply_lora_fa(model, LoRAFAConfig(r=4, target_modules=["out"]))
        with pytest.raises(ValueError, match="'out' is also another module's"):
            merge(model)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_encoder_layer_runs_its_adapters_in_both_modes(training: bool) -> None:
    """In eval mode it would read the linears' weights and never call them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True).train(training)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = normal(2, 5, 12, dtype=torch.float32)
    report = apply_lora_fa(model, LoRAFAConfig(r=4))
    before = model(x)
    fill_B(model)
    with torch.no_grad():
        after = model(x)

    assert report.adapted == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(model.train()(x), after)
