"""PEFTAdapter: the adapter is there before the optimizer, trains alone, comes back, and is put in once."""

import builtins
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_efficient.callbacks import PEFTAdapter
from tests.callbacks.lora_fa_toys import STEPS, LazyToy, Toy, batches
from tests.support.trainers import make_trainer

pytest.importorskip("peft")

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["1", "3"]}


def fit(module: pl.LightningModule, callback: PEFTAdapter, **kwargs: Any) -> pl.Trainer:
    ckpt_path = kwargs.pop("ckpt_path", None)
    torch.manual_seed(0)
    trainer = make_trainer(1, callbacks=[callback], **{"precision": "32-true", "max_epochs": 1, **kwargs})
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return trainer


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in module.named_parameters()}


@pytest.mark.parametrize("kind", [Toy, LazyToy])
def test_adapters_and_what_is_outside_train_alone(kind: type[Toy]) -> None:
    module, callback = kind(), PEFTAdapter(CONFIG)
    fit(module, callback, max_steps=1)
    after_one = tensors(module)
    fit(module, callback)
    after = tensors(module)

    moved = {name for name in after if not torch.equal(after[name], after_one[name])}
    adapters = {f"model.{i}.lora_{half}.default.weight" for i in (1, 3) for half in "AB"}
    assert moved == adapters | {"head.weight", "head.bias"}
    assert callback.stats["peft/layers"] == 2
    assert callback.stats["peft/trainable"] == sum(after[name].numel() for name in adapters)
    assert "configure_model" not in module.__dict__


def test_resuming_equals_not_having_stopped(tmp_path: Path) -> None:
    whole = Toy()
    fit(whole, PEFTAdapter(CONFIG), max_epochs=2)
    first = Toy()
    fit(first, PEFTAdapter(CONFIG)).save_checkpoint(tmp_path / "half.ckpt")
    second = Toy()
    fit(second, PEFTAdapter(CONFIG), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")

    assert second.losses == whole.losses[STEPS:]
    for name, each in tensors(whole).items():
        assert torch.equal(tensors(second)[name], each), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LORA", "rank": 2, "target_modules": ["1"]}, "rank"),
        ({"peft_type": "LORAX"}, "LORAX"),
        ({"peft_type": "LORA", "target_modules": ["q_proj"]}, "q_proj"),
    ],
)
def test_what_peft_cannot_make_is_said(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"peft cannot make the adapter.*{message}"):
        fit(Toy(), PEFTAdapter(config))


def test_a_config_without_type_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="no peft_type"):
        PEFTAdapter({"r": 4})


def test_without_peft_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-efficient\[peft\]'"):
        fit(Toy(), PEFTAdapter(CONFIG))


def test_an_optimizer_that_is_too_early_is_told() -> None:
    class Early(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.early = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.early

    with pytest.raises(RuntimeError, match="built before the adapter was put in"):
        fit(Early(), PEFTAdapter(CONFIG))


def test_a_seed_decides_the_first_weights_and_disturbs_no_other_draw() -> None:
    def first_weights(draws: int, seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(7)
        torch.rand(draws)
        layers = torch.nn.Sequential(torch.nn.Linear(4, 4))
        torch.manual_seed(8)
        torch.rand(draws)
        config = {"peft_type": "LORA", "r": 2, "target_modules": ["0"]}
        PEFTAdapter(config, seed=seed)._put_in(layers)
        return layers.get_parameter("0.lora_A.default.weight").detach(), torch.rand(3)

    (one, then), (other, _) = first_weights(0, 3), first_weights(5, 3)
    assert torch.equal(one, other)
    assert not torch.equal(first_weights(0, None)[0], first_weights(5, None)[0])
    torch.manual_seed(8)
    torch.rand(0)
    assert torch.equal(then, torch.rand(3))
