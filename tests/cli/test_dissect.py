"""`lightning-efficient dissect`, run as a user runs it."""

import sys
from pathlib import Path

import pytest

from lightning_efficient.cli.main import main
from lightning_efficient.dissect import DissectReport, Window, read_json
from tests.support.commands import run_command

SHRUNK = [
    *("--model.num_layers", "1", "--model.hidden_size", "32", "--model.num_heads", "2", "--model.ffn_size", "64"),
    *("--data.block_size", "16", "--data.batch_size", "4", "--warmup", "1", "--clean", "3", "--dissect", "1"),
]


def printed_by(words: list[str], folder: Path, *, world_size: int = 1) -> str:
    """What the command, which has to succeed, prints on all ranks."""
    ended = run_command(["dissect", *words], folder, world_size=world_size)
    printed = "\n".join(rank.output for rank in ended)
    assert [rank.value for rank in ended] == [0] * world_size, (printed, ended[0].error)
    return printed


@pytest.mark.distributed
def test_a_recipe_on_two_processes(workplace: Path) -> None:
    words = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--json", "other/it.json", "--out", "report"]
    printed = printed_by(["-c", "llama/pretrain", *SHRUNK, *words], workplace, world_size=2)

    report = read_json(DissectReport, workplace / "report" / "dissect.json")
    assert read_json(DissectReport, workplace / "other" / "it.json") == report
    assert "<html" in (workplace / "report" / "dissect.html").read_text()
    assert report.window == Window(1, 3, 1, 1)
    assert report.machine.world_size == 2
    assert report.machine.strategy == "DDPStrategy"
    assert len(report.ranks) == 2
    assert report.flops.model_per_step
    assert report.throughput.tokens_per_s
    assert report.host is not None
    names = {row.name for row in report.host.rows}
    assert {"model.model.layers.0.self_attn.q_proj", "model.lm_head", "<optimizer AdamW>"} <= names
    assert "all_reduce" in {each.op for each in report.collectives}
    # One rank prints, and nothing but the report is left behind.
    assert printed.count("over 3 clean steps") == 1
    assert {each.name for each in workplace.iterdir()} == {"report", "other"}


@pytest.mark.distributed
def test_the_report_may_be_kept_off_the_screen(workplace: Path) -> None:
    words = ["-c", "llama/pretrain", *SHRUNK, "--trainer.accelerator", "cpu", "--quiet", "--memory", "0"]
    assert "clean steps" not in printed_by(words, workplace)
    report = read_json(DissectReport, workplace / "dissect" / "dissect.json")
    assert report.flops.model_per_step is None
    assert "memory=0" in report.flops.note


@pytest.mark.distributed
@pytest.mark.parametrize("model", ["ScheduledModel", "RawModel"])
def test_schedules_and_loops_of_the_users_own_are_no_hindrance(model: str, workplace: Path) -> None:
    recipe = workplace / "recipe.yaml"
    trainer = "trainer: {max_epochs: 2, accelerator: cpu, log_every_n_steps: 1}\n"
    recipe.write_text(f"{trainer}model: tests.cli.toys.{model}\ndata: tests.cli.toys.ToyData\n")
    # Of four batches an epoch: the measurement is longer than the user's own training.
    printed_by(["-c", "recipe.yaml", "--warmup", "3", "--clean", "10", "--quiet"], workplace)
    report = read_json(DissectReport, workplace / "dissect" / "dissect.json")
    assert report.throughput.step_s.count == 10


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--clean", "3"], "no recipe given: a model and its data are needed"),
        (["-c", "llama/pretrain", "--clean", "0"], "clean=0"),
        (["-c", "llama/pretrain", "--memory", "3"], "memory 0 or 1"),
        (["-c", "llama/pretrain", "--warmup", "many"], "many"),
        (["-c", "llama/pretrain", "--peak-flops", "-1"], "peak_flops is -1.0"),
        (["-c", "llama/pretrian"], "llama/pretrain"),
        (["-c", "llama/pretrain", "--nonsense", "1"], "nonsense"),
    ],
)
def test_wrong_words_end_with_a_sentence_and_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-efficient", "dissect", *words])
    with pytest.raises(SystemExit) as ended:
        sys.exit(main())
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-efficient", "dissect", "--help"])
    with pytest.raises(SystemExit) as ended:
        sys.exit(main())
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in ("--warmup", "--clean", "--dissect", "--memory", "--peak-flops", "--out", "--json", "--quiet"):
        assert option in text
