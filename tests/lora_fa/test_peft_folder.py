"""Exported adapters are ordinary LoRA to stock PEFT, and come back; compared by output, always."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, export_peft, load_peft, set_adapter
from lightning_efficient.lora_fa.inject import adapted_layers
from tests.lora_fa import hf
from tests.lora_fa.nets import TARGETS, adapted_block, block, fill_B, llama, normal

# PEFT asks models of transformers for an attribute that these have renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

X = normal(5, 12, dtype=torch.float32)
BACKENDS = ["native", "peft"]


def in_peft(base: nn.Module, folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"first": 2}},
    "alphas": {"alpha_pattern": {"second": 3.0}},
    "ranks of one and rslora": {"rank_pattern": {"first": 1}, "use_rslora": True},
    "all at once": {
        "rank_pattern": {"first": 7}, "alpha_pattern": {"first": 5.0, "second": 2.5}, "use_rslora": True, "dropout": 0.1
    },
    "fractions": {"alpha": 0.3, "rank_pattern": {"second": 3}},
    "a head": {"modules_to_save": ["score"]},
}  # fmt: skip


def exported(folder: Path, backend: str, **settings: Any) -> nn.Module:
    model = adapted_block(backend=backend, lean=False, **settings).eval()
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.score.weight.normal_(generator=torch.Generator().manual_seed(3))
            model.score.bias.fill_(0.5)
    export_peft(model, folder)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SETTINGS)
def test_stock_peft_says_the_same(case: str, backend: str, tmp_path: Path) -> None:
    model = exported(tmp_path / "new" / "folder", backend, **SETTINGS[case])
    theirs = in_peft(block(), tmp_path / "new" / "folder")

    assert torch.equal(theirs(X), model(X))
    assert not torch.allclose(model(X), block()(X))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SETTINGS)
def test_what_was_exported_comes_back(case: str, backend: str, tmp_path: Path) -> None:
    model = exported(tmp_path, backend, **SETTINGS[case])
    loaded = block().eval()
    load_peft(loaded, tmp_path, config=LoRAFAConfig(backend=backend, lean=False))
    again = tmp_path / "again"
    export_peft(loaded, again)

    assert torch.equal(loaded(X), model(X))
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert json.loads((again / "adapter_config.json").read_text()) == json.loads(
        (tmp_path / "adapter_config.json").read_text()
    )
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("case", SETTINGS)
def test_what_peft_wrote_is_read_with_its_scales(case: str, tmp_path: Path) -> None:
    import peft

    ours = {"target_modules": TARGETS, "r": 4, "alpha": 8.0, **SETTINGS[case]}
    theirs = {("lora_dropout" if key == "dropout" else key): value for key, value in ours.items() if key != "alpha"}
    config = peft.LoraConfig(lora_alpha=ours["alpha"], **theirs)
    torch.manual_seed(1)
    model = fill_B(peft.get_peft_model(block(), config)).eval()
    model.save_pretrained(tmp_path)
    loaded = block().eval()
    load_peft(loaded, tmp_path, config=LoRAFAConfig(lean=False))

    assert torch.equal(loaded(X), model(X))


def test_the_keys_are_pefts(tmp_path: Path) -> None:
    exported(tmp_path, "native", modules_to_save=["score"])

    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == sorted(
        [f"base_model.model.{name}.lora_{half}.weight" for name in TARGETS for half in "AB"]
        + ["base_model.model.score.weight", "base_model.model.score.bias"]
    )


class Nested(nn.Module):
    """A layer whose name is the end of another's, and a head with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.block = nn.Linear(12, 12), nn.ModuleDict({"fc": nn.Linear(12, 12)})
        self.head = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block["fc"](self.fc(x).tanh()))
        return y


def nested() -> Nested:
    torch.manual_seed(0)
    return Nested()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": ["block.fc", "head.1"]},
        {"exclude_modules": ["head.1"], "rank_pattern": {"^fc": 2}},
        {"exclude_modules": ["head.1"], "rank_pattern": {"block.fc": 2}, "alpha_pattern": {"^fc": 3.0}},
        {"r": 3, "rank_pattern": {"^fc": 2}, "alpha_pattern": {"^fc": 3.0}},  # the exception among three
        {"modules_to_save": ["head"]},
    ],
)
def test_a_name_that_ends_another_name_means_itself(settings: dict[str, Any], backend: str, tmp_path: Path) -> None:
    model = nested()
    apply_lora_fa(model, LoRAFAConfig(**{"r": 4, "backend": backend, "lean": False, **settings}))
    fill_B(model)
    if "modules_to_save" in settings:
        for seed in range(3):
            model(normal(50, 12, seed=seed, dtype=torch.float32) * 3 + 1)
    model.eval()
    export_peft(model, tmp_path)
    theirs, back = in_peft(nested(), tmp_path), nested().eval()
    load_peft(back, tmp_path, config=LoRAFAConfig(lean=False))

    assert [n.removeprefix("base_model.model.") for n in adapted_layers(theirs)] == list(adapted_layers(model))
    assert torch.equal(theirs(X), model(X))
    assert torch.equal(back(X), model(X))


@pytest.mark.parametrize("name", ["llama", "t5 gated-gelu", "gpt2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_models_of_transformers_go_there_and_back(name: str, backend: str, tmp_path: Path) -> None:
    model = hf.build(name).eval()
    apply_lora_fa(model, LoRAFAConfig(r=4, backend=backend, lean=False))
    fill_B(model)
    export_peft(model, tmp_path)
    theirs, back = in_peft(hf.build(name), tmp_path), hf.build(name).eval()
    load_peft(back, tmp_path, config=LoRAFAConfig(lean=False))

    assert torch.equal(hf.logits(theirs, name), hf.logits(model, name))
    assert torch.equal(hf.logits(back, name), hf.logits(model, name))
    kind = json.loads((tmp_path / "adapter_config.json").read_text())["task_type"]
    assert kind == ("CAUSAL_LM" if name == "llama" else None)


def test_a_model_that_only_has_the_name_of_a_causal_one_loads_in_peft(tmp_path: Path) -> None:
    class MyForCausalLM(nn.Sequential):
        pass

    torch.manual_seed(0)
    model = MyForCausalLM(nn.Linear(12, 12))
    base = MyForCausalLM(nn.Linear(12, 12))
    base.load_state_dict(model.state_dict())
    apply_lora_fa(model, LoRAFAConfig(r=4, lean=False))
    fill_B(model)
    export_peft(model, tmp_path)

    assert torch.equal(in_peft(base, tmp_path)(X), model(X))


def test_a_lean_model_and_stock_peft_differ_by_roundings(tmp_path: Path) -> None:
    from tests.lora_fa.nets import ids

    model = llama().eval()
    apply_lora_fa(model, LoRAFAConfig(r=4))
    fill_B(model)
    export_peft(model, tmp_path)

    torch.testing.assert_close(in_peft(llama(), tmp_path)(ids()), model(ids()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_set_by_hand_is_exported(backend: str, tmp_path: Path) -> None:
    model = adapted_block(backend=backend, lean=False).eval()
    model.first.scaling["default"] = 0.37
    export_peft(model, tmp_path)

    torch.testing.assert_close(in_peft(block(), tmp_path)(X), model(X), rtol=1e-6, atol=1e-7)


def test_each_adapter_is_exported_alone(tmp_path: Path) -> None:
    model = adapted_block(lean=False).eval()
    apply_lora_fa(model, LoRAFAConfig(target_modules=["second"], r=3, seed=5), adapter_name="other")
    fill_B(model, seed=4)
    for name in ("default", "other"):
        set_adapter(model, name)
        export_peft(model, tmp_path / name, adapter_name=name)

        assert torch.allclose(in_peft(block(), tmp_path / name)(X), model(X), atol=1e-6)
    back = block().eval()
    for name in ("default", "other"):
        load_peft(back, tmp_path / name, adapter_name=name)
    for name in ("other", "default"):
        set_adapter(back, name), set_adapter(model, name)
        torch.testing.assert_close(back(X), model(X))


@pytest.mark.parametrize("backend", BACKENDS)
def test_loading_over_an_adapter_takes_the_folders_numbers_and_scale(backend: str, tmp_path: Path) -> None:
    model = exported(tmp_path, backend, alpha=5.0)
    other = adapted_block(backend=backend, seed=0, lean=False, alpha=64.0, dropout=0.5).eval()
    load_peft(other, tmp_path, config=LoRAFAConfig(backend=backend, lean=False))

    assert torch.equal(other(X), model(X))
    assert torch.equal(other.train()(X), model(X))


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
from pathlib import Path
from tests.lora_fa.test_peft_folder import SETTINGS, exported, load_peft, LoRAFAConfig, block, X
import torch
for case, settings in SETTINGS.items():
    folder = Path(sys.argv[1]) / case
    model = exported(folder, "native", **settings)
    back = block().eval()
    load_peft(back, folder, config=LoRAFAConfig(lean=False))
    assert torch.equal(back(X), model(X))
    torch.save(model(X).detach(), folder / "y.pt")
"""


def test_a_folder_written_without_peft_is_read_by_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_PEFT, str(tmp_path)], check=True, timeout=120)

    for case in SETTINGS:
        y = torch.load(tmp_path / case / "y.pt", weights_only=True)
        assert torch.equal(in_peft(block(), tmp_path / case)(X), y), case
