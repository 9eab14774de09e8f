"""Checkpoints of LoRAFA: adapters without their base, strict about the rest, and exact when training goes on."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

import lightning_efficient
from lightning_efficient.callbacks import load_lora_fa_checkpoint
from tests.callbacks.lora_fa_toys import (
    ADAPTERS,
    BUFFERS,
    HEAD,
    STEPS,
    EvalToy,
    LazyToy,
    Toy,
    batches,
    equal,
    fit,
    lora,
    tensors,
)
from tests.support.trainers import make_trainer

ALL = ADAPTERS | HEAD | BUFFERS


def read(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint, edited."""
    checkpoint = read(path)
    change(checkpoint)
    torch.save(checkpoint, path.with_name("changed.ckpt"))
    return path.with_name("changed.ckpt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a finished epoch."""
    path = tmp_path_factory.mktemp("saved") / "epoch.ckpt"
    fit(Toy(), lora()).save_checkpoint(path)
    return path


# ---- what they hold -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("kind", [Toy, LazyToy])
def test_a_model_checkpoint_holds_adapters_heads_and_buffers(
    weights_only: bool, kind: type[Toy], tmp_path: Path
) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="it", save_weights_only=weights_only)
    fit(kind(), lora(), saver, enable_checkpointing=True)
    assert set(read(tmp_path / "it.ckpt")["state_dict"]) == ALL


@pytest.mark.parametrize("weights_only", [True, False])
def test_so_do_those_that_are_written_after_fit(weights_only: bool, tmp_path: Path) -> None:
    module = Toy()
    trainer = fit(module, lora())
    trainer.save_checkpoint(tmp_path / "it.ckpt", weights_only=weights_only)
    held = read(tmp_path / "it.ckpt")["state_dict"]
    assert set(held) == ALL
    assert all(torch.equal(held[name], each) for name, each in tensors(module).items() if name in held)
    assert "model.1.base_layer.weight" in module.state_dict()  # for the user it is whole again


class UserError(Exception):
    pass


def _fail_late(toy: Toy) -> None:
    if len(toy.losses) == 3:
        raise UserError


def test_so_do_those_that_are_written_after_an_exception(tmp_path: Path) -> None:
    class SaveOnException(Callback):  # as ModelCheckpoint(save_on_exception=True) and OnExceptionCheckpoint do
        def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "it.ckpt")

    with pytest.raises(UserError):
        fit(Toy(fault=_fail_late), lora(), SaveOnException())
    assert set(read(tmp_path / "it.ckpt")["state_dict"]) == ALL


def test_modules_to_save_are_among_them_and_train(tmp_path: Path) -> None:
    module = Toy()
    trainer = fit(module, lora(modules_to_save=["0"]))
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    assert set(read(tmp_path / "it.ckpt")["state_dict"]) == ALL | {"model.0.weight", "model.0.bias"}
    assert not torch.equal(module.model[0].weight, Toy().model[0].weight)


def test_the_base_is_there_when_it_is_wanted(tmp_path: Path) -> None:
    trainer = fit(Toy(), lora(adapter_only_checkpoint=False))
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    assert {"model.1.base_layer.weight", "model.0.weight"} < set(read(tmp_path / "it.ckpt")["state_dict"])
    fit(Toy(), lora(), ckpt_path=tmp_path / "it.ckpt", max_epochs=2)  # and the other way can read it


class Wide(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(10, 512), nn.Linear(512, 512), nn.Linear(512, 12))
        self.head = nn.Linear(12, 3).requires_grad_(False)


def test_the_size_is_that_of_the_adapters_and_two_moments_of_b(tmp_path: Path) -> None:
    module = Wide()
    fit(module, lora(r=8), max_steps=1).save_checkpoint(tmp_path / "it.ckpt")
    sizes = {half: sum(each.nbytes for each in tensors(module, f"lora_{half}").values()) for half in "AB"}
    base = sum(each.nbytes for each in tensors(module).values()) - sum(sizes.values())
    size = (tmp_path / "it.ckpt").stat().st_size
    overhead = 16_384  # names, hyperparameters and loop counters, which do not grow with the layers
    assert size <= 1.05 * (sizes["A"] + 3 * sizes["B"]) + overhead
    assert size < 0.3 * base


# ---- strictness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model.1.lora_A.default.weight", "model.3.lora_B.default.weight", "head.bias"])
def test_a_missing_key_is_named(saved: Path, key: str) -> None:
    path = changed(saved, lambda checkpoint: checkpoint["state_dict"].pop(key))
    with pytest.raises(RuntimeError, match=rf"lacks {key}"):
        fit(Toy(), lora(), ckpt_path=path, max_epochs=2)
    with pytest.raises(RuntimeError, match=key):
        load_lora_fa_checkpoint(Toy(), path)


def test_an_unknown_key_is_named(saved: Path) -> None:
    path = changed(saved, lambda checkpoint: checkpoint["state_dict"].update({"model.7.lora_A.x": torch.ones(1)}))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*model\.7\.lora_A\.x"):
        fit(Toy(), lora(), ckpt_path=path, max_epochs=2)


def test_another_a_than_the_one_it_was_trained_with_is_noticed(saved: Path) -> None:
    def swap_rows(checkpoint: dict[str, Any]) -> None:
        name = "model.1.lora_A.default.weight"
        checkpoint["state_dict"][name] = checkpoint["state_dict"][name].flip(0)

    path = changed(saved, swap_rows)
    with pytest.raises(RuntimeError, match=r"1\.lora_A\.default is not the checkpoint's"):
        fit(Toy(), lora(), ckpt_path=path, max_epochs=2)
    with pytest.raises(RuntimeError, match=r"1\.lora_A\.default is not the checkpoint's"):
        make_trainer(1, callbacks=[lora()], precision="32-true").test(EvalToy(), batches(), ckpt_path=path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 2, "alpha": 4.0}, "r=3, these have 2"),
        ({"alpha": 7.0}, r"alpha=6\.0, these have 7\.0"),
        ({"use_rslora": True}, "use_rslora=False"),
        ({"modules_to_save": ["0"]}, "modules_to_save="),
        ({"target_modules": ["1"]}, r"another base model"),
    ],
)
def test_other_settings_are_named(saved: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        fit(Toy(), lora(**settings), ckpt_path=saved, max_epochs=2)


def test_another_base_is_refused_warned_about_or_accepted(saved: Path) -> None:
    found = r"trained on another base model \(fingerprint [0-9a-f]{16}-[0-9a-f]{16}, this one is"
    with pytest.raises(RuntimeError, match=found):
        fit(Toy(base_seed=1), lora(), ckpt_path=saved, max_epochs=2)
    with pytest.warns(UserWarning, match=found):
        fit(Toy(base_seed=1), lora(check_base="warn"), ckpt_path=saved, max_epochs=2)
    fit(Toy(base_seed=1), lora(check_base="off"), ckpt_path=saved, max_epochs=2)
    with pytest.raises(RuntimeError, match=found):
        load_lora_fa_checkpoint(Toy(base_seed=1), saved)
    load_lora_fa_checkpoint(Toy(base_seed=1), saved, check_base="off")


def test_a_checkpoint_of_a_model_without_adapters_does_not_pass(tmp_path: Path) -> None:
    fit(Toy()).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_A"):
        fit(Toy(), lora(), ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)
    with pytest.raises(ValueError, match="says nothing of adapters"):
        load_lora_fa_checkpoint(Toy(), tmp_path / "plain.ckpt")


# ---- going on -----------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
import lightning.pytorch as pl
from tests.callbacks.lora_fa_toys import Toy, batches, fit, lora, tensors
pl.seed_everything(int(sys.argv[3]), verbose=False)
import logging; logging.disable(logging.INFO)
module = Toy()
fit(module, lora(), ckpt_path=sys.argv[1], loader=batches(4), max_epochs=2)
torch.save(tensors(module), sys.argv[2])
"""


def test_eight_steps_equal_four_and_four_in_another_process_with_another_seed(tmp_path: Path) -> None:
    in_one_go = Toy()
    fit(in_one_go, lora(), loader=batches(4), max_epochs=2)
    fit(Toy(), lora(), loader=batches(4)).save_checkpoint(tmp_path / "four.ckpt")
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "four.ckpt"), str(tmp_path / "end.pt"), "99"],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert equal(torch.load(tmp_path / "end.pt", weights_only=True), tensors(in_one_go))


class SeedEachStep(Callback):
    """What a user does who wants the random numbers of a step to be its own."""

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        torch.manual_seed(trainer.global_step)


@pytest.mark.parametrize("mode", ["recompute", "lowrank", "saved"])
def test_with_dropout_too_where_each_step_is_seeded(mode: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dropout": 0.3, "dropout_mode": mode}
    in_one_go, resumed, without = Toy(), Toy(), Toy()
    fit(in_one_go, lora(**settings), SeedEachStep(), loader=batches(4), max_epochs=2)
    fit(Toy(), lora(**settings), SeedEachStep(), loader=batches(4)).save_checkpoint(tmp_path / "four.ckpt")
    torch.manual_seed(12345)
    again = {"loader": batches(4), "max_epochs": 2, "ckpt_path": tmp_path / "four.ckpt"}
    fit(resumed, lora(**settings), SeedEachStep(), **again)
    assert equal(tensors(resumed), tensors(in_one_go))
    fit(without, lora(), loader=batches(4), max_epochs=2)
    assert not equal(tensors(without), tensors(in_one_go))


def test_two_fits_equal_one() -> None:
    class KeepsItsOptimizer(Toy):
        made: Optimizer | None = None

        def configure_optimizers(self) -> Optimizer:
            self.made = self.made or super().configure_optimizers()
            return self.made

    once, twice = KeepsItsOptimizer(), KeepsItsOptimizer()
    fit(once, lora(), max_epochs=2)
    trainer = fit(twice, lora(), max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(twice, batches())
    assert len(twice.losses) == 2 * STEPS
    assert equal(tensors(twice), tensors(once))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_validate_test_and_predict_read_the_checkpoint(precision: str, weights_only: bool, tmp_path: Path) -> None:
    trained = EvalToy()
    trainer = fit(trained, lora(), precision=precision)
    trainer.save_checkpoint(tmp_path / "it.ckpt", weights_only=weights_only)
    for module, reader in (
        (EvalToy(), make_trainer(1, callbacks=[lora()], precision=precision)),
        (trained, trainer),  # cast to bfloat16 by now, and still the same base
        (trained, make_trainer(1, callbacks=[lora()], precision=precision)),
    ):
        (val,) = reader.validate(module, batches(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
        (test,) = reader.test(module, batches(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
        predicted = torch.cat(reader.predict(module, batches(), ckpt_path=tmp_path / "it.ckpt"))  # type: ignore[arg-type]
        assert val["val_loss"] == test["test_loss"]
        expected = torch.cat(trainer.predict(trained, batches()))  # type: ignore[arg-type]
        assert torch.equal(predicted, expected)
        assert not torch.equal(predicted, torch.cat(make_trainer(1, precision=precision).predict(EvalToy(), batches())))  # type: ignore[arg-type]


# ---- without a Trainer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("kind", [Toy, LazyToy])
@pytest.mark.parametrize("init", ["orthogonal", "eva"])
def test_a_checkpoint_is_read_without_a_trainer(weights_only: bool, kind: type[Toy], init: str, tmp_path: Path) -> None:
    trained = kind()
    trainer = fit(trained, lora(init=init, rank_pattern={"3": 2}))
    trainer.save_checkpoint(tmp_path / "it.ckpt", weights_only=weights_only)
    fresh = kind()

    assert load_lora_fa_checkpoint(fresh, tmp_path / "it.ckpt") is fresh

    assert equal(tensors(fresh), tensors(trained))
    batch = next(iter(batches()))
    assert torch.equal(fresh.eval().loss(batch), trained.eval().loss(batch))
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in trained.named_parameters() if p.requires_grad
    }


def test_what_was_read_without_a_trainer_can_be_trained_on(saved: Path) -> None:
    module = load_lora_fa_checkpoint(Toy(), saved)
    before = tensors(module, "lora_A")
    fit(module, lora())
    assert equal(tensors(module, "lora_A"), before)


def test_the_function_is_exported() -> None:
    assert lightning_efficient.load_lora_fa_checkpoint is load_lora_fa_checkpoint
