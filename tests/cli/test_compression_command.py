"""`lightning-efficient compression recommend`, run as a user runs it."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_efficient.cli.compression import main, parse_rate, parse_time, recommended_yaml
from lightning_efficient.cli.errors import UserError
from lightning_efficient.compression.planning.cost_model import LinkModel, Workload
from lightning_efficient.compression.planning.recommendation import recommend
from tests.support.commands import run_command

RECIPE = """\
trainer:
  accelerator: cpu
  max_epochs: 1
  accumulate_grad_batches: 2
  strategy: {strategy}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    - class_path: lightning_efficient.callbacks.CompressionMonitor
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {{monitor: val_loss}}
model:
  class_path: lightning_efficient.models.MLPClassifier
  init_args: {{hidden: [256, 256]}}
data:
  class_path: lightning_efficient.data.DigitsData
"""
ELEMENTS = 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE.format(strategy="auto"))
    return "mine.yaml"


@pytest.mark.parametrize(
    ("text", "bits"),
    [("100mbit", 1e8), ("1.5 Gbit", 1.5e9), ("10gbit/s", 1e10), ("64kbit", 64e3), ("9bit", 9), (".5tbit", 5e11)],
)
def test_rates_are_bits_per_second(text, bits):
    assert parse_rate(text) == pytest.approx(bits)


@pytest.mark.parametrize(("text", "seconds"), [("0.2ms", 2e-4), ("50us", 5e-5), ("1s", 1), ("0s", 0), ("3 ns", 3e-9)])
def test_times_are_seconds(text, seconds):
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["100", "100mb", "100mbps", "fast", "-1mbit", "0mbit", "", "1 e 3 mbit"])
def test_bad_rates_name_the_units(text):
    with pytest.raises(UserError, match=r"bad link rate .*units bit, kbit, mbit, gbit, tbit.*100mbit"):
        parse_rate(text)


def test_bad_times_name_the_units():
    with pytest.raises(UserError, match=r"bad latency '2 minutes'.*units s, ms, us, ns"):
        parse_time("2 minutes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no recipe given"),
        (["--trainer.devices", "2"], "no recipe given"),
        (["-c", "x", "--link", "1gbit"], "a link needs two ends"),
        (["-c", "x", "--link", "1gbit", "--world-size", "1"], "a link needs two ends"),
        (["-c", "x", "--world-size", "8"], "Add --link"),
        (["-c", "x", "--latency", "1ms"], "Add --link"),
        (["-c", "x", "--link", "1gb", "--world-size", "2"], "bad link rate '1gb'"),
        (["-c", "x", "--link", "1gbit", "--latency", "1", "--world-size", "2"], "bad latency '1'"),
        (["-c", "x", "--steps", "0"], "--steps 0"),
    ],
)
def test_bad_input_is_named_before_anything_runs(words, message):
    with pytest.raises(UserError, match=message):
        main(["recommend", *words])


def test_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["recommends"])
    assert stop.value.code == 2
    assert "Did you mean 'recommend'?" in capsys.readouterr().err


def test_what_if_needs_one_process_and_saves_nothing(recipe, capsys):
    words = ["--link", "1mbit", "--latency", "0.2ms", "--world-size", "8", "--json", "out.json", "--steps", "3"]
    assert main(["recommend", "-c", recipe, "--trainer.devices", "4", *words]) == 0
    found = json.loads(Path("out.json").read_text())
    assert found["link_measured"] is False
    assert found["world_size"] == 8
    assert found["link"]["bits_per_s"] == pytest.approx(1e6)
    assert found["gradient_bytes"] == 4 * ELEMENTS
    assert found["backward_s"] > 0
    assert found["plain_step_measured_s"] is None
    # 340 kB over 1 Mbit/s take seconds; an MLP's step takes milliseconds. No rank can hide there.
    assert (found["method"], found["rank"]) == ("acp_sgd", 2)
    plain, *compressed = found["candidates"]
    assert plain["estimate"]["step_s"] > 2 * 7 / 8 * 4 * ELEMENTS * 8e-6
    assert all(candidate["rank"] >= 2 for candidate in compressed)
    # What is printed says the same.
    printed = capsys.readouterr().out
    assert "recommended: ACP-SGD at rank 2" in printed
    assert "(assumed), 8 processes" in printed
    assert found["yaml"].strip() in printed
    assert sorted(path.name for path in Path().iterdir()) == ["mine.yaml", "out.json"]
    # And the block fits the recipe: the strategy and the compressor are built from it.
    Path("answer.yaml").write_text(found["yaml"])
    assert main(["recommend", "-c", recipe, "-c", "answer.yaml", *words]) == 0


def test_accumulated_micro_batches_count_as_time_before_the_last_backward(recipe):
    words = ["--link", "1gbit", "--world-size", "2", "--json", "out.json", "--steps", "3"]
    main(["recommend", "-c", recipe, "--trainer.accumulate_grad_batches", "50", *words])
    found = json.loads(Path("out.json").read_text())
    assert found["forward_s"] > 45 * found["backward_s"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_measure_their_own_link_under_plain_ddp(recipe):
    Path(recipe).write_text(RECIPE.format(strategy="acp_sgd"))
    words = ["compression", "recommend", "-c", recipe, "--trainer.devices", "2", "--json", "out.json", "--steps", "4"]
    ended = run_command(words, Path(), world_size=2)
    assert [rank.value for rank in ended] == [0, 0], ended
    found = json.loads(Path("out.json").read_text())
    assert found["link_measured"] is True
    assert found["world_size"] == 2
    assert found["link"]["bits_per_s"] > 1e6
    # Only rank 0 speaks; the rival's bytes are those of plain DDP, whatever the recipe's strategy.
    assert ["recommended:" in rank.output for rank in ended] == [True, False]
    assert found["candidates"][0]["estimate"]["payload_bytes"] == 4 * ELEMENTS
    assert found["plain_step_measured_s"] > 0
    assert sorted(path.name for path in Path().iterdir()) == ["mine.yaml", "out.json"]


def test_one_process_without_a_link_is_told_what_to_do(recipe):
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with pytest.raises((MisconfigurationException, UserError), match=r"no link to measure \(world size 1\).*--link"):
        main(["recommend", "-c", recipe, "--trainer.devices", "1"])


@pytest.mark.parametrize(("bits_per_s", "rank"), [(1e12, None), (1e6, 2)])
def test_recommended_yaml_is_a_trainer_block(bits_per_s, rank):
    workload = Workload.from_work([(512, 512)] * 4, forward_s=0.1, backward_s=0.1)
    answer = recommend(workload, LinkModel.from_rate(bits_per_s), world_size=4, bucket_caps_mb=(2.5,))
    assert answer.rank == rank
    strategy = yaml.safe_load(recommended_yaml(answer))["trainer"]["strategy"]
    assert strategy["init_args"]["bucket_cap_mb"] == 2.5
    if rank is None:
        assert strategy["class_path"].endswith("DDPStrategy")
    else:
        assert strategy["init_args"]["compressor"]["init_args"] == {"rank": rank}
