"""LlamaLM and HFCausalLM as LightningModules: they learn, checkpoint, resume, refuse bad input, and work from YAML."""

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from lightning_efficient.data import SyntheticTokens, TextData
from lightning_efficient.models import HFCausalLM, LlamaLM
from tests.data.recording import trainer
from tests.support.ranks import run_ranks

SMALL: dict[str, Any] = {"hidden_size": 32, "ffn_size": 64, "num_layers": 1, "num_heads": 2}
HF_SMALL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def adam(lr: float) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def fit(folder: Path, model: LightningModule, data: LightningDataModule, **kwargs: Any) -> Any:
    run = trainer(folder, **({"enable_checkpointing": False} | kwargs))
    run.fit(model, data)
    return run


def test_text_is_learned_beyond_the_unigram_entropy(tmp_path: Path) -> None:
    data = TextData(block_size=32, batch_size=16)
    torch.manual_seed(0)
    model = LlamaLM(**SMALL, max_seq_len=32, optimizer=adam(5e-3))
    run = fit(tmp_path, model, data, max_steps=150, limit_val_batches=20, val_check_interval=150)
    metrics = run.callback_metrics
    assert 1.0 < metrics["val_loss"] < data.unigram_entropy() - 0.3
    assert float(metrics["val_bits_per_token"]) == pytest.approx(float(metrics["val_loss"]) / math.log(2), rel=1e-5)


def test_planted_rule_is_learned_down_to_its_entropy(tmp_path: Path) -> None:
    data = SyntheticTokens(vocab_size=16, block_size=16, batch_size=32, num_train_tokens=32_768)
    torch.manual_seed(0)
    model = LlamaLM(**SMALL, vocab_size=16, optimizer=adam(1e-2))
    run = fit(tmp_path, model, data, max_steps=120, val_check_interval=60)
    loss = float(run.callback_metrics["val_loss"])
    # The mean over 16 384 validation tokens has a standard error of about 0.01 nats around the entropy.
    assert data.entropy_floor - 0.04 < loss < data.entropy_floor + 0.1 < math.log(16)


def test_schedule_advances_once_per_optimizer_step(tmp_path: Path) -> None:
    model = LlamaLM(
        **SMALL,
        vocab_size=64,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
    )
    data = SyntheticTokens(num_train_tokens=8000)
    run = fit(tmp_path, model, data, max_steps=3, limit_val_batches=0, accumulate_grad_batches=2)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.5**3


def test_plateau_schedule_watches_the_validation_loss(tmp_path: Path) -> None:
    model = LlamaLM(
        **SMALL,
        vocab_size=64,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, threshold=1e9, threshold_mode="abs", factor=0.5
        ),
    )
    data = SyntheticTokens(num_train_tokens=8000)
    run = fit(tmp_path, model, data, max_epochs=3, limit_train_batches=1, limit_val_batches=1)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.5**2  # the first epoch only sets the mark


def test_optimizer_holds_exactly_the_trainable_parameters_at_the_time_of_fit() -> None:
    model = LlamaLM(**SMALL)
    model.model.requires_grad_(False)
    model.model.lm_head.weight.requires_grad_(True)
    model.adapter = torch.nn.Linear(2, 2)  # as a callback's setup would add it
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(p) for p in (model.model.lm_head.weight, *model.adapter.parameters())}

    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"LlamaLM has no parameter to train: all of them are frozen. Set requires_grad"
    ):
        model.configure_optimizers()


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_loads_with_weights_only(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    model = LlamaLM(**SMALL, vocab_size=64, tie_embeddings=tied, num_kv_heads=1)
    run = fit(tmp_path, model, SyntheticTokens(), max_steps=2, limit_val_batches=0)
    run.save_checkpoint(tmp_path / "lm.ckpt")
    content = torch.load(tmp_path / "lm.ckpt", weights_only=True)
    assert "optimizer" not in content["hyper_parameters"]

    loaded = LlamaLM.load_from_checkpoint(tmp_path / "lm.ckpt", weights_only=True)
    ids = torch.randint(64, (2, 8))
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.model.config == model.model.config


def test_training_starts_from_a_pretrained_checkpoint(tmp_path: Path) -> None:
    data = SyntheticTokens(vocab_size=16, block_size=8, batch_size=4)
    source = LlamaLM(vocab_size=16, **SMALL)
    run = fit(tmp_path, source, data, max_steps=1)
    run.save_checkpoint(tmp_path / "source.ckpt", weights_only=True)
    model = LlamaLM(vocab_size=16, pretrained=str(tmp_path / "source.ckpt"), optimizer=adam(0.0), **SMALL)
    fit(tmp_path, model, data, max_steps=1)
    for name, value in source.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value)


def test_a_pretrained_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    data = SyntheticTokens(vocab_size=16, block_size=8, batch_size=4)
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint 'nowhere.ckpt'"):
        fit(tmp_path, LlamaLM(vocab_size=16, pretrained="nowhere.ckpt", **SMALL), data, max_steps=1)
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="do not fit the model"):
        LlamaLM(vocab_size=16, pretrained=str(tmp_path / "broken.ckpt"), **SMALL).configure_model()
    run = fit(tmp_path, LlamaLM(vocab_size=16, **SMALL), data, max_steps=1)
    run.save_checkpoint(tmp_path / "small.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="size mismatch"):
        LlamaLM(vocab_size=16, pretrained=str(tmp_path / "small.ckpt"), **{**SMALL, "ffn_size": 96}).configure_model()


def test_test_and_predict_run(tmp_path: Path) -> None:
    data = TextData(block_size=32, test_fraction=0.05)
    model, run = LlamaLM(**SMALL), trainer(tmp_path, limit_test_batches=2, limit_predict_batches=2)
    (metrics,) = run.test(model, data, verbose=False)
    # An untrained model guesses evenly: its logits are tiny.
    assert metrics["test_loss"] == pytest.approx(math.log(256), abs=0.05)
    predictions = run.predict(model, data)
    assert [(p.shape, p.dtype) for p in predictions] == [(torch.Size([16, 32]), torch.int64)] * 2


def test_ignored_labels_count_in_neither_loss_nor_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaLM(**SMALL, vocab_size=64)
    ids = torch.randint(64, (4, 9))
    five, one, none = (torch.full_like(ids, -100) for _ in range(3))
    five[0, :5] = torch.randint(64, (5,))
    one[2, 3] = 3
    with torch.no_grad():
        logits = model(ids)
        losses = [*torch.nn.functional.cross_entropy(logits[0, :5], five[0, :5], reduction="none").tolist()]
        losses += [float(torch.nn.functional.cross_entropy(logits[2, 3], one[2, 3]))]
    batches = Batches([{"input_ids": ids, "labels": labels} for labels in (five, one, none)])
    (metrics,) = trainer(tmp_path).validate(model, batches, verbose=False)
    assert metrics["val_loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)

    fresh = LlamaLM(**SMALL, vocab_size=64, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    fresh.load_state_dict(model.state_dict())
    nothing = Batches([{"input_ids": ids, "labels": none}])
    trainer(tmp_path, enable_checkpointing=False, max_steps=1).fit(fresh, nothing, nothing)
    for parameter, before in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, before)


class Batches:
    """Given batches as a loader."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@pytest.mark.parametrize("wrong", [64, -1])
def test_id_outside_the_vocabulary_is_refused(tmp_path: Path, wrong: int) -> None:
    ids = torch.tensor([[1, wrong]])
    batches = Batches([{"input_ids": ids, "labels": ids}])
    run = trainer(tmp_path, enable_checkpointing=False, max_steps=1)
    message = rf"token id {wrong}, but the model has vocab_size=64: ids go from 0 to 63"
    for use in (run.fit, run.validate, run.test, run.predict):
        with pytest.raises(ValueError, match=message):
            use(LlamaLM(**SMALL, vocab_size=64), *([batches] * (2 if use == run.fit else 1)))


def test_data_with_too_large_a_vocabulary_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data has 100 tokens, the model vocab_size=64.*Set the model's vocab_size to 100"
    ):
        fit(tmp_path, LlamaLM(**SMALL, vocab_size=64), SyntheticTokens(vocab_size=100), max_steps=1)


def test_unknown_size_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no Llama of size '7B'. Use one of tiny, 160m, .*; did you mean '7b'"):
        LlamaLM("7B")


RECIPE = """
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  limit_val_batches: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
model:
  class_path: lightning_efficient.models.LlamaLM
  init_args:
    num_layers: 1
    vocab_size: 64
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5, momentum: 0.9}}
    lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1, gamma: 0.1}}
data:
  class_path: lightning_efficient.data.SyntheticTokens
  init_args: {vocab_size: 64}
"""


def test_recipe_builds_the_named_optimizer_and_its_checkpoint_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6.6 calls an old name of it
    monkeypatch.setattr("sys.argv", ["fit.py", "fit", "--config", "recipe.yaml"])
    Path("recipe.yaml").write_text(RECIPE)
    cli = LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=None,
    )
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.5, 0.9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.1**2)

    cli.trainer.save_checkpoint("cli.ckpt")
    loaded = LlamaLM.load_from_checkpoint("cli.ckpt", weights_only=True)
    assert torch.equal(loaded.model.lm_head.weight, cli.model.model.lm_head.weight)


def _validate_rank(rank: int, world_size: int, folder: str, weights: dict[str, Tensor]) -> dict[str, float]:
    batch_size = 2 if world_size > 1 else 7  # other batches, so that a mean of batch means would differ
    data = SyntheticTokens(vocab_size=64, block_size=16, batch_size=batch_size, num_val_tokens=16 * 15 + 1)
    model = LlamaLM(**SMALL, vocab_size=64)
    model.load_state_dict(weights)
    run = trainer(folder, devices=world_size, strategy="ddp" if world_size > 1 else "auto")
    (metrics,) = run.validate(model, data, verbose=False)
    return dict(metrics)


@pytest.mark.distributed
def test_two_ranks_validate_as_one_where_the_blocks_divide_unequally(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaLM(**SMALL, vocab_size=64)
    with torch.no_grad():
        model.model.lm_head.weight.mul_(50)  # so that blocks differ in loss
    weights = model.state_dict()
    alone = _validate_rank(0, 1, str(tmp_path), weights)
    for metrics in run_ranks(_validate_rank, 2, str(tmp_path), weights):
        assert metrics == pytest.approx(alone, rel=1e-5)


def test_hf_model_from_a_dict_trains_and_its_checkpoint_loads(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    data = SyntheticTokens(vocab_size=64, block_size=16, batch_size=32)
    model = HFCausalLM(HF_SMALL, optimizer=adam(1e-2))
    run = fit(tmp_path, model, data, max_steps=60, limit_val_batches=5, val_check_interval=60)
    assert run.callback_metrics["val_loss"] < math.log(64) - 0.5
    run.save_checkpoint(tmp_path / "hf.ckpt")
    loaded = HFCausalLM.load_from_checkpoint(tmp_path / "hf.ckpt", weights_only=True)
    ids = torch.randint(64, (2, 8))
    assert torch.equal(loaded.eval()(ids), model.eval()(ids))


def test_hf_model_goes_through_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    first = HFCausalLM(HF_SMALL)
    first.configure_model()
    first.save_pretrained(tmp_path / "model")
    second = HFCausalLM(str(tmp_path / "model"), activation_checkpointing=True)
    second.configure_model()
    ids = torch.randint(64, (2, 8))
    assert second.training
    torch.testing.assert_close(second(ids), first(ids))


def test_hf_checkpointing_gives_equal_gradients() -> None:
    pytest.importorskip("transformers")
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = HFCausalLM(HF_SMALL, activation_checkpointing=checkpointing)
        model.configure_model()
        model(torch.arange(12).view(2, 6)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


def test_hf_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"no model_type \(it has vocab_size\).*Add, for example, model_type: llama"):
        HFCausalLM({"vocab_size": 3})
    with pytest.raises(ValueError, match="dtype is 'int8': weights need a floating-point"):
        HFCausalLM(HF_SMALL, dtype="int8")
    with pytest.raises(ValueError, match=r"cannot load a model from .*Give a folder made by save_pretrained"):
        HFCausalLM(str(tmp_path)).configure_model()
    with pytest.raises(RuntimeError, match=r"has no model yet.*Call configure_model\(\) first"):
        HFCausalLM(HF_SMALL)(torch.zeros(1, 1, dtype=torch.int64))

    real_import = builtins.__import__

    def without_transformers(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_transformers)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-efficient\[hf\]'"):
        HFCausalLM(HF_SMALL).configure_model()
