"""Every fault is told with its cause and its cure, before anything has changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, export_peft, load_peft, merge
from tests.lora_fa.nets import TARGETS, adapted_block, block, fill_B, normal

X = normal(5, 12, dtype=torch.float32)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST = "base_model.model.first"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export_peft(adapted_block(modules_to_save=["score"]), tmp_path)


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return edit


def settings(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        held = json.loads((folder / CONFIG).read_text())
        held.update(changes)
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in held.items() if value is not ...}))

    return edit


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None  # type: ignore[return-value]


def spoil(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda held: held[f"{FIRST}.lora_B.weight"].fill_(value)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"no {WEIGHTS}.*no PEFT folder"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"no {CONFIG}.*no PEFT folder"),
    "config is no JSON": (text(CONFIG, "{"), "is no JSON"),
    "config is a list": (text(CONFIG, "[]"), "holds no settings"),
    "weights are a pickle": (text(WEIGHTS, "cos\nsystem\n"), "cannot be read"),
    "another method": (settings(peft_type="IA3"), "IA3 adapter: only LORA"),
    "no method": (settings(peft_type=...), "None adapter: only LORA"),
    "no rank": (settings(r=...), "r=None"),
    "alpha is text": (settings(lora_alpha="64"), "lora_alpha='64'"),
    "dora": (settings(use_dora=True), "use_dora=True"),
    "lora_bias": (settings(lora_bias=True), "lora_bias=True"),
    "bias": (settings(bias="all"), "bias='all'"),
    "qalora": (settings(use_qalora=True), "use_qalora=True"),
    "replicated layers": (settings(layer_replication=[[0, 2]]), "layer_replication"),
    "expert parameters": (settings(target_parameters=["w"]), "target_parameters"),
    "another base": (settings(init_lora_weights="pissa_niter_4"), "pissa_niter_4.*base that PEFT has changed"),
    "lora_A is missing": (tensors(lambda t: t.pop(f"{FIRST}.lora_A.weight")), "no lora_A of 'first'"),
    "lora_B is missing": (tensors(lambda t: t.pop(f"{FIRST}.lora_B.weight")), "no lora_B of 'first'"),
    "nothing in it": (tensors(lambda t: [t.pop(key) for key in list(t) if "lora" in key]), "holds no lora_A and"),
    "NaN": (tensors(spoil(float("nan"))), "lora_B.weight.*is not finite"),
    "infinity": (tensors(spoil(float("-inf"))), "lora_B.weight.*is not finite"),
    "wrong size": (tensors(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(4, 13)})), "has 12 inputs and 20"),
    "wrong rank": (tensors(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(3, 12)})), "A (3, 12) and B (20,"),
    "one dimension": (tensors(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(48)})), r"A (48,)"),
    "no prefix": (tensors(lambda t: t.update({"first.lora_A.weight": torch.ones(4, 12)})), "have to start with"),
    "adapter's name in the key": (
        tensors(lambda t: t.update({f"{FIRST}.lora_A.default.weight": torch.ones(4, 12)})), "which no adapter here has"
    ),
    "magnitudes": (tensors(lambda t: t.update({f"{FIRST}.lora_magnitude_vector": torch.ones(20)})), "does not have"),
    "unknown layer": (
        tensors(lambda t: t.update({f"base_model.model.third.lora_{h}.weight": torch.ones(4, 4) for h in "AB"})),
        "adapts 'third', which the model does not have",
    ),
    "no linear": (
        tensors(lambda t: t.update({f"base_model.model.norm.lora_{h}.weight": torch.ones(4, 4) for h in "AB"})),
        "adapts 'norm'",
    ),
    "head of another size": (
        tensors(lambda t: t.update({"base_model.model.score.weight": torch.ones(4, 12)})), "'score.weight' is (4, 12)"
    ),
    "outside of the folder": (
        tensors(lambda t: t.update({"base_model.model.../../first.lora_A.weight": torch.ones(4, 12)})), "no lora_B"
    ),
}  # fmt: skip


def unchanged(model: nn.Module, before: dict[str, Any]) -> bool:
    state = model.state_dict()
    same = state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)
    return same and type(model.first) is nn.Linear and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused(fault: str, folder: Path) -> None:
    damage, said = FAULTS[fault]
    damage(folder)
    model = block()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    with pytest.raises((ValueError, FileNotFoundError), match=said.replace("(", r"\(").replace(")", r"\)")):
        load_peft(model, folder)
    assert unchanged(model, before)


def test_settings_without_meaning_here_are_no_fault(folder: Path) -> None:
    settings(alpha_pattern=None, rank_pattern=None, fan_in_fan_out=True, modules_to_save=None, init_lora_weights="eva")(
        folder
    )
    report = load_peft(block(), folder)

    assert report.adapted == TARGETS


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: adapted_block(target_modules=["first"]), "'second' is in one of them alone"),
        (lambda: adapted_block(r=3), "another rank"),
    ],
)
def test_an_adapter_that_is_there_has_to_be_the_same(build: Any, said: str, folder: Path) -> None:
    model = build()
    before, trainable = model(X), [p.requires_grad for p in model.parameters()]

    with pytest.raises(ValueError, match=said):
        load_peft(model, folder)
    assert torch.equal(model(X), before)
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_loading_into_a_merged_model_is_refused(folder: Path) -> None:
    model = adapted_block()
    merge(model)

    with pytest.raises(ValueError, match="Call unmerge first"):
        load_peft(model, folder)


class Sharded(torch.Tensor):
    """What a DTensor is recognised by."""

    def full_tensor(self) -> torch.Tensor:
        return torch.Tensor(self)


def shard(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Sharded), requires_grad=False)  # type: ignore[arg-type]


def with_sharded_last(model: nn.Module) -> nn.Module:
    shard(model.second)
    return model


INJECTIONS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no match": (block, {"target_modules": ["q_proj"]}, r"matches no linear.*first, second, score; name some"),
    "all left out": (block, {"exclude_modules": ".*"}, "matches no linear"),
    "no linears": (lambda: nn.Sequential(nn.Tanh()), {}, "The linears here are none"),
    "rank too large": (block, {"target_modules": ["first", "score"], "r": 4}, "r is 4.*'score' has 12 inputs and 3"),
    "rank of a pattern": (block, {"r": 2, "rank_pattern": {"score": 4}}, "r is 4.*'score'"),
    "sharded": (lambda: with_sharded_last(block()), {"target_modules": TARGETS, "r": 2}, "'second' is sharded already"),
    "a linear": (lambda: nn.Linear(12, 12), {"r": 2}, "single Linear.*Wrap it"),
    "unknown head": (block, {"r": 2, "modules_to_save": ["head"]}, "modules_to_save has 'head'"),
    "attention's projection": (
        lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}), {"target_modules": ["out_proj"]}, "no linear"
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "peft"])
@pytest.mark.parametrize("fault", INJECTIONS)
def test_an_injection_that_cannot_be_changes_nothing(fault: str, backend: str) -> None:
    build, options, said = INJECTIONS[fault]
    model = build()
    kinds = [type(each) for each in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]

    with pytest.raises(ValueError, match=said):
        apply_lora_fa(model, LoRAFAConfig(backend=backend, **options))
    assert [type(each) for each in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_a_layer_that_is_sharded_by_itself_says_so_when_it_runs() -> None:
    model = adapted_block()
    shard(model.first.lora_A["default"])

    with pytest.raises(RuntimeError, match="Call fully_shard on the blocks"):
        model(X)


def export_faults() -> dict[str, tuple[nn.Module, str]]:
    broken, sharded, loose = adapted_block(), adapted_block(), adapted_block()
    broken.first.lora_B["default"].weight.data[0, 0] = float("nan")
    shard(sharded.first.lora_A["default"])
    loose.gain = nn.Parameter(torch.ones(1))
    return {
        "no adapters": (block(), "no adapter 'default'"),
        "not finite": (broken, "'first' is not finite: nothing was exported"),
        "sharded": (sharded, "'first' is sharded over ranks"),
        "a parameter of the model itself": (loose, "'gain' trains and belongs to the model itself"),
    }


@pytest.mark.parametrize("fault", ["no adapters", "not finite", "sharded", "a parameter of the model itself"])
def test_an_export_that_cannot_be_writes_nothing(fault: str, tmp_path: Path) -> None:
    model, said = export_faults()[fault]

    with pytest.raises(ValueError, match=said):
        export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, r"rank \(r\) is 0"),
        ({"r": True}, r"rank \(r\) is True"),
        ({"r": 2.5}, r"rank \(r\) is 2.5"),
        ({"rank_pattern": {"q": -1}}, r"rank \(q\) is -1"),
        ({"alpha": 0.0}, r"scale \(alpha\) is 0.0"),
        ({"alpha": float("nan")}, r"scale \(alpha\) is nan"),
        ({"alpha_pattern": {"q": -2.0}}, r"scale \(q\) is -2.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": "0.1"}, "dropout is '0.1'"),
        ({"alpha": "16"}, r"scale \(alpha\) is '16'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"lean": "yes"}, "lean is 'yes': it is a switch"),
        ({"init": "zeros"}, "init is 'zeros'.*'orthogonal', 'eva'"),
        ({"dropout_mode": "none"}, "dropout_mode is 'none'"),
        ({"adapter_dtype": "int8"}, "adapter_dtype is 'int8'"),
        ({"lean_mlp": "on"}, "lean_mlp is 'on'"),
        ({"lean_norm": "on"}, "lean_norm is 'on'"),
        ({"backend": "hf"}, "backend is 'hf'"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": "*_proj"}, "no regular expression"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"modules_to_save": "score"}, "write a list"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoRAFAConfig(**options)


def test_settings_survive_a_dict() -> None:
    config = LoRAFAConfig(target_modules=["a"], rank_pattern={"b": 3}, use_rslora=True, alpha=2.0)

    assert LoRAFAConfig(**config.to_dict()) == config
    assert config.scale_of("x.b") == 2.0 / 3**0.5
    assert config.scale_of("x.bb") == 2.0 / 32**0.5


def test_peft_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)

    with pytest.raises(ModuleNotFoundError, match=r"lightning-efficient\[peft\].*backend='native'"):
        apply_lora_fa(block(), LoRAFAConfig(r=2, backend="peft"))
    assert fill_B(adapted_block(r=2, backend="native"))(X).shape == (5, 3)


@pytest.mark.parametrize(
    "idle",
    [
        {"rank_pattern": {"nowhere": 2}},
        {"alpha_pattern": {"nowhere": 2.0}},
    ],
)
def test_a_pattern_that_means_nothing_is_told(idle: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=f"{next(iter(idle))} has 'nowhere', which means no adapted linear"):
        apply_lora_fa(model, LoRAFAConfig(r=2, **idle))
