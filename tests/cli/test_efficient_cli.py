"""What EfficientCLI changes in LightningCLI, run in this process on the CPU."""

from pathlib import Path
from typing import TypeVar

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, LearningRateMonitor

from lightning_efficient._compat import forget_init_args_of_another_class
from lightning_efficient.callbacks import AttachOptimizer, OptimizerGuard
from lightning_efficient.cli import EfficientCLI, main
from lightning_efficient.cli.efficient_cli import with_defaults
from lightning_efficient.cli.quiet import quiet_known_noise

Added = TypeVar("Added", bound=Callback)

FIT = [
    "fit",
    "--model=tests.cli.toys.ToyModel",
    "--data=tests.cli.toys.ToyData",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.log_every_n_steps=1",
]


EVA = ["--model.optimizer=lightning_efficient.optimizers.Eva", "--model.optimizer.variant=eva_f"]


def added(cli: EfficientCLI, kind: type[Added]) -> list[Added]:
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]


def test_the_guard_is_on_by_default_and_has_checked_the_fit() -> None:
    (guard,) = added(EfficientCLI(args=FIT), OptimizerGuard)

    assert (guard.stats.checks, guard.stats.trainable) == (1, 2)


def test_the_guard_can_be_turned_off() -> None:
    cli = EfficientCLI(args=[*FIT, "--optimizer_guard=false"])

    assert added(cli, OptimizerGuard) == []
    assert len(added(cli, AttachOptimizer)) == 1


def test_an_optimizer_that_watches_layers_is_attached_without_being_asked() -> None:
    cli = EfficientCLI(args=[*FIT, *EVA])

    (optimizer,) = cli.trainer.optimizers
    assert optimizer.stats.counted_steps == 2


def test_other_optimizers_are_trained_without_a_word_about_it(recwarn: pytest.WarningsRecorder) -> None:
    (attach,) = added(EfficientCLI(args=FIT), AttachOptimizer)

    assert not attach.required
    assert not [each for each in recwarn if "AttachOptimizer" in str(each.message)]


def test_the_recipes_own_callback_takes_the_place_of_the_added_one(workplace: Path) -> None:
    callback = "{class_path: lightning_efficient.callbacks.AttachOptimizer, init_args: {log_every_n_steps: 7}}"
    (workplace / "mine.yaml").write_text(f"trainer: {{callbacks: [{callback}]}}\n")

    cli = EfficientCLI(args=[*FIT, *EVA, "-c", "mine.yaml", "--trainer.logger=false"])

    (attach,) = added(cli, AttachOptimizer)
    assert attach.log_every_n_steps == 7
    assert cli.trainer.optimizers[0].stats.counted_steps == 2


def test_defaults_are_added_once_and_beside_the_recipes_callbacks() -> None:
    own, other, default = OptimizerGuard(), LearningRateMonitor(), OptimizerGuard()

    assert with_defaults([own, other], [default]) == [own, other]
    assert with_defaults(other, [default]) == [other, default]
    assert with_defaults(None, [default]) == [default]


def test_later_recipes_overlay_earlier_ones_and_the_command_line_overlays_all(workplace: Path) -> None:
    (workplace / "base.yaml").write_text("trainer: {max_steps: 5, limit_val_batches: 1}\nseed_everything: 3\n")
    (workplace / "over.yaml").write_text("trainer: {max_steps: 4}\nmodel: {init_args: {size: 2}}\n")

    cli = EfficientCLI(args=[*FIT[:4], "-c", "base.yaml", "-c", "over", "--trainer.logger=false", *FIT[5:8]])

    assert cli.trainer.max_steps == 4
    assert cli.trainer.limit_val_batches == 1
    assert cli.config["fit"]["seed_everything"] == 3
    assert cli.model.net.out_features == 2


def test_another_class_starts_from_its_own_defaults(workplace: Path) -> None:
    """jsonargparse alone would keep the weight decay and momentum of the class that was named before."""
    (workplace / "base.yaml").write_text(
        "model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5, weight_decay: 0.3}}}}\n"
    )
    (workplace / "over.yaml").write_text("model: {init_args: {optimizer: {class_path: torch.optim.AdamW}}}\n")

    cli = EfficientCLI(args=[*FIT, "-c", "base.yaml", "-c", "over.yaml", "--trainer.logger=false"])

    (group,) = cli.trainer.optimizers[0].param_groups
    assert isinstance(cli.trainer.optimizers[0], torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-2)


def test_the_same_class_keeps_what_was_set_before(workplace: Path) -> None:
    (workplace / "base.yaml").write_text(
        "model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5, momentum: 0.3}}}}\n"
    )

    cli = EfficientCLI(args=[*FIT, "-c", "base.yaml", "--model.optimizer.lr=0.25", "--trainer.logger=false"])

    (group,) = cli.trainer.optimizers[0].param_groups
    assert (group["lr"], group["momentum"]) == (0.25, 0.3)


def test_a_renamed_function_of_jsonargparse_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("jsonargparse._typehints.discard_init_args_on_class_path_change")

    with pytest.raises(RuntimeError, match="jsonargparse has no"):
        forget_init_args_of_another_class()


def test_two_runs_of_one_recipe_give_the_same_weights_by_default() -> None:
    first, second = EfficientCLI(args=FIT), EfficientCLI(args=FIT)

    assert torch.equal(first.model.net.weight, second.model.net.weight)


def test_a_second_run_in_the_same_folder_keeps_both_configurations(workplace: Path) -> None:
    mine = "# my own file\n"
    (workplace / "config.yaml").write_text(mine)

    for _ in range(2):
        assert main([*FIT, "--trainer.logger=false"]) == 0

    assert (workplace / "config.yaml").read_text() == mine
    for name in ("config_1.yaml", "config_2.yaml"):
        assert yaml.safe_load((workplace / name).read_text())["trainer"]["max_steps"] == 2


def test_the_saved_configuration_is_a_recipe_that_runs_again(workplace: Path) -> None:
    assert main([*FIT, "--trainer.logger=false"]) == 0

    assert main(["fit", "-c", "config.yaml"]) == 0


def test_validate_adds_nothing() -> None:
    cli = EfficientCLI(args=["validate", *FIT[1:4], *FIT[5:], "--trainer.logger=false"])

    assert added(cli, OptimizerGuard) == []
    assert added(cli, AttachOptimizer) == []


def test_advertisements_are_silenced_and_warnings_are_not(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

    quiet_known_noise()
    with pytest.warns(UserWarning, match="this one matters"):
        rank_zero_warn("this one matters")
    rank_zero_info("💡 Tip: buy this")
    rank_zero_info("news")

    assert "buy this" not in caplog.text


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_lists_every_command(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0

    out = capsys.readouterr().out
    assert len(out.splitlines()) < 30
    for command in ("fit", "validate", "test", "predict", "recipes", "doctor", "compression"):
        assert f"  {command} " in out


def test_no_command_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2

    assert "usage: lightning-efficient" in capsys.readouterr().err
