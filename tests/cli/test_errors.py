"""Wrong input gives one line, exit code 2, and the nearest valid name."""

import re
from pathlib import Path

import pytest

from lightning_efficient.cli import main

MODEL = "tests.cli.toys.ToyModel"
FIT = ["fit", "--model", MODEL, "--data", "tests.cli.toys.ToyData"]


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command line, which must fail with exit code 2 and exactly one line on stderr."""
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.max_stps", "3"], "'--trainer.max_stps' is not an option. Did you mean '--trainer.max_steps'?"),
        (["--trainer.max_steps", "lots"], "trainer.max_steps: expected int, got 'lots'."),
        (["--trainer.strategy", "acp_sdg"], "trainer.strategy: there is no 'acp_sdg'. Did you mean 'acp_sgd'?"),
        (["--trainer.accelerator", "cup"], "trainer.accelerator: there is no 'cup'. Did you mean 'cpu'?"),
        (["--model.sizes", "3"], "model: ToyModel has no argument 'sizes'. Did you mean 'size'?"),
        (["--model.size", "big"], "model.init_args.size: expected int, got 'big'."),
        (["--model.size", "0"], "ToyModel: size must be >= 1, got 0."),
        (
            ["--data", "DigitsDat"],
            "data: there is no LightningDataModule called 'DigitsDat'. Did you mean 'DigitsData'?",
        ),
        (["--model.optimizer", "torch.optim.AdmW"], "Did you mean 'torch.optim.AdamW'?"),
        (["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lrr", "1"], "AdamW has no argument 'lrr'."),
        (["--trainer.callbacks", "LearningRateMonitr"], "Did you mean 'LearningRateMonitor'?"),
        (["--trainer.precision", "bf16-mixd"], "Did you mean 'bf16-mixed'?"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path: there is no file 'nowhere.ckpt'."),
    ],
)
def test_a_wrong_word_on_the_command_line_is_explained(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in error_of(FIT + arguments, capsys)


COMPRESSED = "trainer: {strategy: {class_path: CompressedDDPStrategy, init_args: {%s}}}"
ACPSGD = COMPRESSED % "compressor: {class_path: lightning_efficient.compression.ACPSGD, init_args: {%s}}"


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            f"model: {MODEL}\ntrainer: {{max_stps: 3}}",
            "'trainer.max_stps' is not a setting of 'fit'. Did you mean 'trainer.max_steps'?",
        ),
        (f"model: {MODEL}\ntrainr: {{max_steps: 3}}", "Did you mean 'trainer.max_steps'?"),
        (
            f"model: {{class_path: {MODEL}, init_args: {{sizes: 3}}}}",
            "model: ToyModel has no argument 'sizes'. Did you mean 'size'?",
        ),
        (f"model: {{class_path: {MODEL}, init_arg: {{size: 3}}}}", "Did you mean 'init_args'?"),
        (
            "model: tests.cli.toys.ToyModle",
            "there is no 'ToyModle' in 'tests.cli.toys'. Did you mean 'tests.cli.toys.ToyModel'?",
        ),
        ("model: lightning_efficient.model.LlamaLM", "Did you mean 'lightning_efficient.models'?"),
        ("model: lihgtning_efficient.models.LlamaLM", "Did you mean 'lightning_efficient'?"),
        ("model: torch.nn.Linear", "torch.nn.Linear is not a LightningModule."),
        ("model: [", "The recipe is not valid YAML"),
        (f"model: {MODEL}\n{COMPRESSED % 'bucket_cap: 3'}", "CompressedDDPStrategy has no argument 'bucket_cap'."),
        (f"model: {MODEL}\n{ACPSGD % 'ranc: 3'}", "ACPSGD has no argument 'ranc'. Did you mean 'rank'?"),
        (f"model: {MODEL}\n{ACPSGD % 'rank: four'}", "rank: expected int, got 'four'."),
        (f"model: {MODEL}\n{ACPSGD % 'rank: 0'}", "rank must be >= 1, got 0"),
    ],
)
def test_a_wrong_recipe_is_explained(
    recipe: str, expected: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "wrong.yaml").write_text(recipe)

    assert expected in error_of(["fit", "-c", "wrong.yaml"], capsys)


EVA = (
    f"model: {{class_path: {MODEL}, init_args: {{optimizer: "
    "{class_path: lightning_efficient.optimizers.Eva, init_args: {%s}}}}"
)


@pytest.mark.parametrize(
    ("init_args", "expected"),
    [
        ("variant: evaf", "'evaf' is not one of eva, eva_f, eva_s. Did you mean 'eva_f'?"),
        ("backend: tritn", "Did you mean 'triton'?"),
        ("damp: 0.1", "Eva has no argument 'damp'. Did you mean 'damping'?"),
        ("lr: fast", "lr: expected float, got 'fast'."),
        ("kv_samples: 1.5", "kv_samples: expected int or null, got '1.5'."),
        ("rescale: clipped", "'clipped' is not one of clip, normalize, match_grad, graft, none. Did you mean 'clip'?"),
    ],
)
def test_a_word_that_eva_does_not_know_is_explained(
    init_args: str, expected: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "wrong.yaml").write_text(EVA % init_args)

    assert expected in error_of(["fit", "-c", "wrong.yaml"], capsys)


@pytest.mark.parametrize(
    ("init_args", "expected"),
    [
        ("lr: -1", "lr is -1.0: a step of negative length goes uphill."),
        ("damping: 0", "damping is 0.0: the curvature has rank 1"),
        ("kl_clip: -1", "kl_clip is -1.0: it bounds the squared step"),
        ("kl_clip: 0", "kl_clip is 0.0: it bounds the squared step"),
        ("kv_new_weight: 2", "kv_new_weight is 2.0: it is the weight of the newest vectors"),
        ("kv_samples: 0", "kv_samples is 0: it counts samples."),
        ("momentum: 1", "momentum is 1.0: it is the share that is kept"),
    ],
)
def test_a_value_that_eva_refuses_is_explained(
    init_args: str, expected: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "wrong.yaml").write_text(EVA % init_args)

    assert main([*FIT[:1], "-c", "wrong.yaml", *FIT[3:], *SHORT]) == 2

    error = capsys.readouterr().err
    assert f"error: {expected}" in error
    assert "Traceback" not in error


def test_an_unknown_recipe_names_the_places_and_the_nearest(
    capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    error = error_of(["fit", "-c", "quikstart"], capsys)

    assert str(workplace) in error
    assert re.search(r"then \S*recipes", error)
    assert "Did you mean 'quickstart'?" in error


def test_no_model_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "recipes list" in error_of(["fit"], capsys)


@pytest.mark.parametrize(("word", "nearest"), [("fitt", "fit"), ("recipe", "recipes"), ("docter", "doctor")])
def test_an_unknown_command_suggests_one(word: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"Did you mean '{nearest}'?" in error_of([word], capsys)


def test_an_unknown_action_of_a_tool_suggests_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'list'?" in error_of(["recipes", "lst"], capsys)


def test_an_option_before_the_command_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Write the command first" in error_of(["-c", "quickstart"], capsys)


SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
]


def test_a_parameter_outside_the_optimizer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, *SHORT, "--model.forget_bias=true"]) == 2

    expected = "error: 1 parameter is trainable but in no optimizer, so they would never change (net.bias)."
    assert expected in capsys.readouterr().err


def test_data_that_does_not_fit_the_model_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model=LlamaLM", "--model.vocab_size=10", "--data=TextData", *SHORT]) == 2

    error = capsys.readouterr().err
    assert "error: The data has 256 tokens, the model vocab_size=10" in error
    assert "Traceback" not in error


def test_an_error_in_the_users_own_code_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a bug of the user"):
        main([*FIT, *SHORT, "--model.has_a_bug=true"])


def test_the_debug_variable_brings_the_traceback_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_EFFICIENT_DEBUG", "1")

    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        main([*FIT, "--model.size", "0"])
