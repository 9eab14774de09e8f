"""Precision: adapters keep their dtype and their bits, whatever the base is cast or quantised to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from torch import nn

from lightning_efficient.lora_fa.inject import adapted_layers
from lightning_efficient.precision import LoRAFAHalfPrecision
from tests.callbacks.lora_fa_toys import LazyToy, Toy, batches, equal, fit, lora, tensors
from tests.support.trainers import make_trainer


def training(precision: str, plugin: bool) -> dict[str, Any]:
    """Trainer arguments: Lightning's own plugin, or ours."""
    return {"precision": None, "plugins": [LoRAFAHalfPrecision(precision)]} if plugin else {"precision": precision}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Toy, LazyToy])
@pytest.mark.parametrize("plugin", [False, True], ids=["lightning's", "ours"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_the_base_is_cast_and_the_adapters_keep_their_bits(
    kind: type[Toy], plugin: bool, precision: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    module, in_float32, in_one_go, resumed = kind(), Toy(), kind(), kind()
    fit(in_float32, lora(), max_steps=1)
    trainer = fit(module, lora(), loader=batches(4), **training(precision, plugin))

    assert equal(tensors(module, "lora_A"), tensors(in_float32, "lora_A"))
    found = tensors(module, "lora_B").values()
    assert {each.dtype for each in found} == {torch.float32}
    assert any(not torch.equal(each, each.to(dtype).float()) for each in found)  # more bits than the base has
    assert {each.dtype for name, each in tensors(module).items() if "lora_" not in name} == {dtype}

    trainer.save_checkpoint(tmp_path / "it.ckpt")
    fit(in_one_go, lora(), loader=batches(4), max_epochs=2, **training(precision, plugin))
    path = tmp_path / "it.ckpt"
    fit(resumed, lora(), loader=batches(4), max_epochs=2, ckpt_path=path, **training(precision, plugin))
    assert equal(tensors(resumed), tensors(in_one_go))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_mixed_precision_leaves_every_parameter_wide(precision: str) -> None:
    module = Toy()
    fit(module, lora(), precision=precision, max_epochs=4)
    assert {each.dtype for each in tensors(module).values()} == {torch.float32}
    assert sum(module.losses[-8:]) < sum(module.losses[:8])


def test_our_plugin_keeps_what_is_named_and_other_libraries_adapters() -> None:
    peft = pytest.importorskip("peft")
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), module)
    before = tensors(module, "lora_")

    LoRAFAHalfPrecision(keep=["2."]).convert_module(module)

    assert equal(tensors(module, "lora_"), before)
    assert module[0].base_layer.weight.dtype == torch.bfloat16
    assert module[1].running_mean.dtype == torch.bfloat16
    assert module[1].num_batches_tracked.dtype == torch.int64
    assert module[2].weight.dtype == torch.float32


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="precision is '32-true'"):
        LoRAFAHalfPrecision("32-true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keep is the string 'head'"):
        LoRAFAHalfPrecision(keep="head")  # type: ignore[arg-type]


# ---- quantised bases ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes", "ignore::FutureWarning:bitsandbytes")
def test_lightnings_bitsandbytes_quantises_the_base_and_not_the_adapters() -> None:
    """On a CPU Lightning swaps the classes and leaves the weights whole; which classes it swaps is the question."""
    bnb = pytest.importorskip("bitsandbytes")
    module = Toy()
    plugin = BitsandbytesPrecision("nf4", dtype=torch.bfloat16, ignore_modules={"head"})

    trainer = make_trainer(1, callbacks=[lora()], max_steps=1)
    trainer.strategy.precision_plugin = plugin  # a Trainer on the CPU does not take it as an argument
    trainer.fit(module, batches())

    for layer in adapted_layers(module).values():
        assert isinstance(layer.base_layer, bnb.nn.Linear4bit)
        for half in (layer.lora_A, layer.lora_B):
            assert not isinstance(half["default"], bnb.nn.Linear4bit)
            assert half["default"].weight.dtype == torch.float32
    state = trainer.optimizers[0].state
    assert all("exp_avg" in state[p] for name, p in module.named_parameters() if "lora_B" in name)
    assert all(each.any() for each in tensors(module, "lora_B").values())


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_that_is_quantised_already_trains_and_goes_on(kind: str, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    class Quantised(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 12))
            for index, layer in enumerate(self.model):
                if index == 2:
                    self.model[index] = quantised(bnb, layer, kind)

    torch.manual_seed(0)
    in_one_go = Quantised()
    torch.manual_seed(0)
    stopped = Quantised()
    torch.manual_seed(0)
    resumed = Quantised()
    before = in_one_go.model[2].weight.detach().clone()
    callback = lora()
    fit(in_one_go, callback, loader=batches(4), max_epochs=2)

    assert callback.stats["lora_fa/adapted"] == 3
    assert torch.equal(in_one_go.model[2].base_layer.weight.detach(), before)
    assert tensors(in_one_go, "2.lora_B")["model.2.lora_B.default.weight"].any()
    assert sum(in_one_go.losses[4:]) < sum(in_one_go.losses[:4])

    fit(stopped, lora(), loader=batches(4)).save_checkpoint(tmp_path / "it.ckpt")
    held = torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in held if "base_layer" in key]
    fit(resumed, lora(), loader=batches(4), max_epochs=2, ckpt_path=tmp_path / "it.ckpt")
    assert equal(tensors(resumed, "lora_", "head"), tensors(in_one_go, "lora_", "head"))


def quantised(bnb: Any, layer: nn.Linear, kind: str) -> nn.Module:
    if kind == "nf4":
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4", compute_dtype=torch.float32)
    else:
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    new.load_state_dict(layer.state_dict())
    moved: nn.Module = new.to("cpu")
    return moved
