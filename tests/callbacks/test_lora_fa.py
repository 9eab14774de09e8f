"""LoRAFA: adapters are there before the optimizer, A never moves, and nothing is left of the callback afterwards."""

import copy
import csv
import pickle
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_efficient import _compat
from lightning_efficient.callbacks import LoRAFA, OptimizerGuard
from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, saved_bytes
from tests.callbacks.lora_fa_toys import (
    ADAPTERS,
    STEPS,
    LazyToy,
    Toy,
    backbone,
    batches,
    equal,
    fit,
    hooks_left,
    lora,
    tensors,
)
from tests.compression.harness import recorded_warnings
from tests.support.trainers import logged_lines, make_trainer


def trained(module: pl.LightningModule) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def adapters_of(module: pl.LightningModule) -> set[str]:
    return {name for name, _ in module.named_parameters() if ".lora_" in name}


# ---- injection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Toy, LazyToy])
def test_a_module_built_in_either_place_trains_b_and_nothing_of_the_base(kind: type[Toy]) -> None:
    module, callback = kind(), lora()
    before = tensors(backbone())

    fit(module, callback)

    assert adapters_of(module) == ADAPTERS
    assert trained(module) == {name for name in ADAPTERS if "lora_B" in name} | {"head.weight", "head.bias"}
    after = {name.replace("base_layer.", ""): each for name, each in tensors(module.model).items()}
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert all(each.any() for each in tensors(module, "lora_B").values())
    assert "configure_model" not in vars(module)


def test_both_places_train_to_the_same_bits() -> None:
    early, late = Toy(), LazyToy()
    fit(early, lora())
    fit(late, lora())
    assert equal(tensors(early), tensors(late))


def test_the_output_at_the_first_step_is_the_base_models_to_the_last_bit() -> None:
    plain, adapted = Toy(), Toy()
    fit(plain, max_steps=1)
    fit(adapted, lora(), max_steps=1)
    assert plain.losses == adapted.losses


class BuiltInSetup(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.model = None

    @override
    def setup(self, stage: str) -> None:
        self.model = backbone()


def test_a_module_built_too_late_or_elsewhere_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"BuiltInSetup.model is no module .* in __init__ or configure_model"):
        fit(BuiltInSetup(), lora())
    with pytest.raises(RuntimeError, match=r"Toy.net is no module"):
        fit(Toy(), lora(model_attr="net"))


def test_without_model_attr_the_whole_module_is_adapted() -> None:
    module = Toy()
    fit(module, lora(model_attr=None))
    assert {name for name in adapters_of(module) if name.startswith("head.")} == {
        "head.lora_A.default.weight",
        "head.lora_B.default.weight",
    }
    assert all("lora_B" in name for name in trained(module))


class BuiltTooEarly(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer = AdamW(self.parameters())

    @override
    def configure_optimizers(self) -> Optimizer:
        return self.optimizer


def test_an_optimizer_built_before_the_adapters_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"No optimizer holds '1.lora_B.default.weight' and others"):
        fit(BuiltTooEarly(), lora())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
def test_the_adapters_go_into_a_compiled_module() -> None:
    plain, compiled, callback = Toy(), Toy(), lora()
    compiled.model = torch.compile(compiled.model, backend="aot_eager")
    fit(plain, lora())
    fit(compiled, callback)
    assert _compat.compiles(compiled)
    assert not _compat.compiles(plain)
    assert "lora_fa/saved_mib" not in callback.stats
    inside = _compat.without_compile(compiled.model)
    assert inside is not compiled.model
    assert tensors(inside, "lora_").keys() == tensors(plain.model, "lora_").keys()
    for name, each in tensors(plain.model, "lora_").items():
        torch.testing.assert_close(tensors(inside, "lora_")[name], each, rtol=1e-4, atol=1e-5)


def test_adapters_that_are_there_already_are_kept_if_they_are_the_same() -> None:
    module, reference = Toy(), Toy()
    apply_lora_fa(module.model, LoRAFAConfig(r=3, alpha=6.0))
    fit(module, lora())
    fit(reference, lora())
    assert equal(tensors(module), tensors(reference))

    other = Toy()
    apply_lora_fa(other.model, LoRAFAConfig(r=2, alpha=6.0))
    with pytest.raises(RuntimeError, match=r"'1' has an adapter already, of rank 2 and scale 3.* LoRAFA says 3 and 2"):
        fit(other, lora())


def test_a_callback_can_serve_another_module() -> None:
    callback, first, second = lora(init="eva", calibration_batches=2), Toy(), Toy()
    fit(first, callback)
    fit(second, callback)
    assert equal(tensors(first, "lora_A"), tensors(second, "lora_A"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"calibration_batches": 0}, "calibration_batches is 0"),
        ({"check_base": "no"}, "check_base is 'no'"),
        ({"modules_to_save": "head"}, r"modules_to_save is the string 'head': write \['head'\]"),
        ({"r": 0}, "rank"),
        ({"alpha": 0.0}, "scale"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"init": "zero"}, "init is 'zero'"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora(**kwargs)


def test_a_rank_above_a_layer_and_targets_without_a_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"r is 11.*the layer '1' has 10 inputs"):
        fit(Toy(), lora(r=11))
    with pytest.raises(ValueError, match=r"matches no linear.*The linears here are 1, 3"):
        fit(Toy(), lora(target_modules=["q_proj"]))


# ---- A stays what it is -------------------------------------------------------------------------------------------


def test_a_is_frozen_and_unchanged_through_fit() -> None:
    once, longer = Toy(), Toy()
    fit(once, lora(), max_steps=1)
    fit(longer, lora(), max_epochs=3)
    assert equal(tensors(once, "lora_A"), tensors(longer, "lora_A"))
    assert not equal(tensors(once, "lora_B"), tensors(longer, "lora_B"))


class Meddler(Callback):
    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.model[1].lora_A["default"].weight.data.add_(1)


def test_an_a_that_something_wrote_to_is_reported() -> None:
    with pytest.warns(UserWarning, match=r"1.lora_A.default changed during training"):
        fit(Toy(), lora(), Meddler())


# ---- with others --------------------------------------------------------------------------------------------------


def test_a_scheduler_gradient_clipping_and_accumulation() -> None:
    big, small = Toy().double(), Toy().double()
    big.model[2], small.model[2] = nn.Identity(), nn.Identity()  # BatchNorm sees the batch
    more: dict[str, Any] = {"gradient_clip_val": 0.1, "precision": "64-true"}
    data = batches().dataset
    halves = torch.utils.data.DataLoader(data, batch_size=4)
    fit(big, lora(adapter_dtype="float64"), **more)
    fit(small, lora(adapter_dtype="float64"), accumulate_grad_batches=2, loader=halves, **more)
    for name, each in tensors(big).items():
        torch.testing.assert_close(tensors(small)[name], each, rtol=0, atol=1e-6)  # loss in float32


def test_the_optimizer_guard_wants_no_frozen_parameter_and_accepts_what_is_filtered() -> None:
    class Filtered(Toy):
        def configure_optimizers(self) -> Optimizer:
            return AdamW([p for p in self.parameters() if p.requires_grad])

    guard = OptimizerGuard()
    fit(Filtered(), lora(), guard)
    assert guard.stats.trainable == 4


class Checkpointed(Toy):
    reentrant = False

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.head.weight.dtype).requires_grad_()
        out: torch.Tensor = self.head(checkpoint(self.model, x, use_reentrant=self.reentrant))
        return out


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.parametrize("kind", [Checkpointed, Reentrant])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_trains_to_the_same_bits(kind: type[Toy], dropout: float) -> None:
    plain, recomputed = Toy(), kind()
    for module in (plain, recomputed):
        module.model[2] = nn.Tanh()  # BatchNorm counts a recomputed batch twice
        torch.manual_seed(0)
        fit(module, lora(dropout=dropout))
    assert equal(tensors(plain), tensors(recomputed))


def test_an_average_of_weights_leaves_a_alone_and_comes_back(tmp_path: Path) -> None:
    module, average = Toy(), EMAWeightAveraging(decay=0.5)
    trainer = fit(module, lora(), average)
    expected = Toy()
    fit(expected, lora(), max_steps=1)
    assert equal(tensors(module, "lora_A"), tensors(expected, "lora_A"))
    trainer.save_checkpoint(tmp_path / "after.ckpt")

    in_one_go, stopped, resumed = Toy(), Toy(), Toy()
    fit(in_one_go, lora(), EMAWeightAveraging(decay=0.5), max_epochs=2)

    class Save(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    fit(stopped, lora(), EMAWeightAveraging(decay=0.5), Save())
    held = torch.load(tmp_path / "during.ckpt", weights_only=True)
    assert not [key for part in ("state_dict", "current_model_state") for key in held[part] if "base_layer" in key]
    fit(resumed, lora(), EMAWeightAveraging(decay=0.5), max_epochs=2, ckpt_path=tmp_path / "during.ckpt")
    assert equal(tensors(resumed), tensors(in_one_go))


def test_an_average_that_would_miss_the_adapters_is_refused() -> None:
    with pytest.raises(RuntimeError, match="List LoRAFA first"):
        fit(Toy(), EMAWeightAveraging(), lora())


def test_a_barebones_trainer_trains_to_the_same_bits() -> None:
    usual, bare = Toy(), Toy()
    fit(usual, lora())
    with recorded_warnings():
        trainer = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[lora()])
        trainer.fit(bare, batches())
    assert equal(tensors(usual), tensors(bare))


class WithRate(Toy):
    lr = 0.02

    @override
    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), lr=self.lr)


def test_the_learning_rate_finder_leaves_the_adapters_as_they_were(tmp_path: Path) -> None:
    module, seen = WithRate(), {}

    class AtStart(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.update(tensors(pl_module, "lora_B"))

    finder = LearningRateFinder(num_training_steps=5, update_attr=True)
    fit(module, lora(), finder, AtStart(), default_root_dir=tmp_path, enable_progress_bar=False)
    assert seen.keys() == tensors(module, "lora_B").keys()
    assert not any(each.any() for each in seen.values())
    assert all(each.any() for each in tensors(module, "lora_B").values())


class WithBatchSize(Toy):
    batch_size = 4

    @override
    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(batches().dataset, batch_size=self.batch_size)


@pytest.mark.filterwarnings("ignore:The batch size finder:UserWarning")
def test_the_batch_size_finder_leaves_the_adapters_as_they_were(tmp_path: Path) -> None:
    tuned, plain = WithBatchSize(), WithBatchSize()
    finder = BatchSizeFinder(steps_per_trial=2, max_trials=2, init_val=4)
    trainer = make_trainer(1, callbacks=[lora(), finder], precision="32-true", max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(tuned)
    assert finder.optimal_batch_size == tuned.batch_size > 4
    plain.batch_size = tuned.batch_size
    make_trainer(1, callbacks=[lora()], precision="32-true", max_epochs=1).fit(plain)
    assert equal(tensors(tuned, "lora_"), tensors(plain, "lora_"))


def test_processes_that_are_copies_are_refused() -> None:
    trainer = make_trainer(1, strategy="ddp_fork", callbacks=[lora()])
    assert _compat.starts_processes_by_fork_or_spawn(trainer)
    with pytest.raises(RuntimeError, match=r"under ddp_spawn, ddp_fork or ddp_notebook.*apply_lora_fa in __init__"):
        trainer.callbacks[0].setup(trainer, Toy(), "fit")  # type: ignore[attr-defined]
    assert not _compat.starts_processes_by_fork_or_spawn(make_trainer(1))


# ---- what it says, and what it leaves behind ----------------------------------------------------------------------


def test_what_a_step_keeps_is_logged_once(tmp_path: Path) -> None:
    callback, module = lora(), Toy()
    with logged_lines() as lines:
        fit(module, callback, logger=CSVLogger(tmp_path, name="", version=""))
    with open(tmp_path / "metrics.csv") as file:
        told = [row["lora_fa/saved_mib"] for row in csv.DictReader(file) if row.get("lora_fa/saved_mib")]
    assert len(told) == 1

    again = Toy()
    apply_lora_fa(again.model, LoRAFAConfig(r=3, alpha=6.0))
    batch = next(iter(batches()))
    expected = saved_bytes(lambda: again.train().loss(batch), module=again).total / 2**20
    assert callback.stats["lora_fa/saved_mib"] == pytest.approx(expected)
    assert float(told[0]) == pytest.approx(expected, rel=1e-5)
    assert callback.stats["lora_fa/adapted"] == 2
    assert any("2 linears adapted" in line for line in lines)
    assert any("adapted linears trained" in line and "MiB kept per batch" in line for line in lines)


def test_nothing_is_measured_when_not_asked_for(tmp_path: Path) -> None:
    callback = lora(report_saved_bytes=False)
    fit(Toy(), callback)
    assert "lora_fa/saved_mib" not in callback.stats


class UserError(Exception):
    pass


def fail(toy: Toy) -> None:
    raise UserError


def interrupt(toy: Toy) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("fault", "error"), [(fail, UserError), (interrupt, SystemExit)])
@pytest.mark.parametrize("kind", [Toy, LazyToy])
def test_nothing_is_left_after_a_step_that_fails(fault: Any, error: type[BaseException], kind: type[Toy]) -> None:
    module, handler = kind(fault=fault), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(error):
            fit(module, lora())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning has switched it off

    assert hooks_left(module) == []
    assert "configure_model" not in vars(module)
    assert not nn.modules.module._global_forward_hooks
    x = torch.ones(2, requires_grad=True)
    assert (x * x).grad_fn._saved_self is x  # type: ignore[union-attr]  # no hook packs it


def test_nothing_is_left_after_fit_and_the_module_can_be_copied() -> None:
    module = Toy(fault=_nothing)  # unlike a lambda, it can be pickled
    fit(module, lora())
    assert hooks_left(module) == []
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert equal(tensors(copied), tensors(module))
        assert type(copied).__name__ == "Toy"
        batch = next(iter(batches()))
        assert torch.equal(copied.eval().loss(batch), module.eval().loss(batch))
    assert len(module.losses) == STEPS


def _nothing(toy: Toy) -> None:
    pass


def test_the_callback_is_exported() -> None:
    import lightning_efficient

    assert lightning_efficient.LoRAFA is LoRAFA
