"""`lightning-efficient bench serve`, run as a user runs it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_efficient.cli import main as command_line
from lightning_efficient.cli.bench.serve import main, parse_new_tokens
from lightning_efficient.cli.bench.serve_model import model_of_recipe
from lightning_efficient.cli.bench.serve_report import curve, headline
from lightning_efficient.cli.errors import UserError
from lightning_efficient.dissect import read_json
from lightning_efficient.dissect.serving import RequestTimes, ServingReport, ServingResult, ServingRun, cdf
from lightning_efficient.models import LlamaLM

TINY = ["--model.hidden_size", "32", "--model.ffn_size", "48", "--model.num_layers", "2", "--model.max_seq_len", "64"]
LOAD = ["--requests", "5", "--prompt-tokens", "12", "--new-tokens", "2-9", "--max-batch", "2"]


@pytest.fixture
def result(tmp_path: Path) -> Any:
    def run(*words: str, expected: int = 0) -> ServingResult:
        assert main([*words, "--json", "it.json"]) == expected
        return read_json(ServingResult, "it.json")

    return run


def test_both_ways_of_batching_with_a_page(result, capsys) -> None:
    found = result("-c", "llama/pretrain", *TINY, *LOAD, "--out", "folder")
    assert [each.batching for each in found.reports] == ["static", "continuous"]
    for each in found.reports:
        assert (each.finished, each.failed, each.prompt_tokens, each.max_batch) == (5, 0, 60, 2)
        # keys and values, layers, slots, heads, 12 + 5 tokens (the longest that is drawn), size of a head, float32
        assert each.cache_bytes == 2 * 2 * 2 * 4 * 17 * 8 * 4
        assert each.e2e_cdf[-1].share == 1.0
        assert each.output_tokens_per_s > 0
    static, continuous = found.reports
    assert static.output_tokens == continuous.output_tokens
    assert continuous.occupancy > static.occupancy
    assert continuous.decode_steps < static.decode_steps
    shown = capsys.readouterr().out
    for word in ("TTFT, static", "ITL, continuous", "TPOT, static", "E2E, continuous", "output tokens/s", "p99"):
        assert word in shown
    assert read_json(ServingResult, "folder/serve.json") == found
    assert "| TTFT, static |" in Path("folder/serve.md").read_text(encoding="utf-8")
    html = Path("folder/serve.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 2
    assert "Share of requests answered within a time" in html


@pytest.mark.parametrize(
    ("words", "arrivals"),
    [
        (["--arrivals", "poisson", "--rate", "200"], "Poisson, 200 requests/s, 5 in all"),
        (["--arrivals", "closed", "--clients", "2"], "closed loop of 2 clients, 5 requests in all"),
    ],
)
def test_other_arrivals(result, words: list[str], arrivals: str) -> None:
    found = result("-c", "llama/pretrain", *TINY, *LOAD, *words, "--batching", "continuous", "--dtype", "bfloat16")
    (report,) = found.reports
    assert (report.arrivals, report.finished, report.dtype) == (arrivals, 5, "bfloat16")


def test_a_model_of_transformers(result) -> None:
    pytest.importorskip("transformers")
    source = (
        "{model_type: gpt2, vocab_size: 61, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 32, bos_token_id: 0, "
        "eos_token_id: 0}"
    )
    found = result("-c", "hf/causal_lm", "--model.source", source, *LOAD)
    assert [each.finished for each in found.reports] == [5, 5]
    assert found.reports[0].model.startswith("GPT2LMHeadModel")


def test_defaults_fit_into_the_model(result) -> None:
    found = result("-c", "llama/pretrain", *TINY, "--requests", "2", "--batching", "static")
    assert (found.reports[0].prompt_tokens, found.reports[0].output_tokens) == (2 * 32, 2 * 32)


def test_the_checkpoint_is_what_is_served(tmp_path: Path) -> None:
    torch.manual_seed(9)
    trained = LlamaLM(hidden_size=32, ffn_size=48, num_layers=2, max_seq_len=64)
    torch.save({"state_dict": trained.state_dict()}, "it.ckpt")
    words = ["-c", "llama/pretrain", *TINY]
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": None}
    served = model_of_recipe(words, checkpoint=Path("it.ckpt"), **options)
    weights = served.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained.model.state_dict().items())
    with pytest.raises(ValueError, match="do not fit the model"):
        model_of_recipe([*words, "--model.num_layers", "3"], checkpoint=Path("it.ckpt"), **options)
    with pytest.raises(UserError, match=r"--checkpoint no.ckpt: there is no such file"):
        model_of_recipe(words, checkpoint=Path("no.ckpt"), **options)


def test_adapters_of_a_recipe_are_not_served_silently(result) -> None:
    found = result("-c", "lora_fa/finetune", "--model.pretrained", "null", *TINY, *LOAD, "--batching", "static")
    assert any("LoRAFA was not run" in note for note in found.reports[0].notes)


def test_adapters_of_peft_are_not_served_silently(result) -> None:
    pytest.importorskip("peft")
    recipes = ["-c", "bench/llama", "-c", "bench/models/tiny", "-c", "bench/techniques/L"]
    found = result(*recipes, *LOAD, "--batching", "static")
    assert any("PEFTAdapter was not run" in note for note in found.reports[0].notes)


def test_a_place_that_cannot_be_written_is_found_before_the_load(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for words, message in (
        (["--out", str(tmp_path / "taken")], "the folder cannot be made"),
        (["--json", str(tmp_path)], "that is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            main(["-c", "there is none", *words])


def test_what_is_not_finished_in_time_is_said_and_ends_with_1(result, capsys) -> None:
    load = ["--requests", "3", "--prompt-tokens", "4", "--new-tokens", "2", "--arrivals", "poisson", "--rate", "0.001"]
    found = result("-c", "llama/pretrain", *TINY, *load, "--timeout", "0.3", "--batching", "static", expected=1)
    assert (found.reports[0].finished, found.reports[0].failed) == (0, 3)
    assert "3 of 3 requests were not finished in time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no recipe given"),
        (["-c", "x", "--requests", "0"], "--requests 0"),
        (["-c", "x", "--max-batch", "0"], "--max-batch 0"),
        (["-c", "x", "--prompt-tokens", "0"], "--prompt-tokens 0"),
        (["-c", "x", "--timeout", "0"], "--timeout 0"),
        (["-c", "x", "--timeout", "nan"], "--timeout nan"),
        (["-c", "x", "--arrivals", "poisson"], "--arrivals poisson with no --rate.*Add --rate"),
        (["-c", "x", "--arrivals", "closed"], "--arrivals closed with no --clients"),
        (["-c", "x", "--rate", "3"], "--arrivals burst with --rate 3.*Leave it out"),
        (["-c", "x", "--arrivals", "poisson", "--rate", "-1"], "--rate -1: it must be above 0"),
        (["-c", "x", "--arrivals", "closed", "--clients", "0"], "--clients 0: it must be above 0"),
        (["-c", "x", "--new-tokens", "9-2"], "--new-tokens 9-2"),
        (["-c", "x", "--device", "meta"], "--device meta: no model runs there"),
        (["-c", "x", "--device", "gpu9"], "--device gpu9: torch knows no such device"),
        (["-c", "x", "--device", "cuda:77"], r"--device cuda:77: there are \d+ CUDA devices"),
        (["-c", "llama/pretrain", *TINY, "--new-tokens", "40", "--prompt-tokens", "30"], r"30 \+ 40 = 70 tokens"),
        (["-c", "acp_sgd/digits", "--trainer.strategy", "auto"], "language models only"),
    ],
)
def test_wrong_values_end_with_a_sentence(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)


@pytest.mark.parametrize(("text", "tokens"), [("7", 7), ("2-9", (2, 9)), (" 3 - 3 ", (3, 3))])
def test_new_tokens(text: str, tokens: Any) -> None:
    assert parse_new_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "0-4", "5-", "-5", "1.5", "many", "1-2-3"])
def test_bad_new_tokens(text: str) -> None:
    with pytest.raises(UserError, match="a number above 0, or a range"):
        parse_new_tokens(text)


def test_a_plotted_distribution_keeps_its_end() -> None:
    for n in (1, 59, 60, 61, 1000):
        points = curve(cdf([float(value) for value in range(n)]))
        assert len(points) <= 60
        assert points[-1] == (n - 1, 1.0)
        assert points == sorted(points)


def test_the_command_itself(capsys) -> None:
    words = ["bench", "serve", "-c", "llama/pretrain", "--requests", "8", "--prompt-tokens", "32", "--new-tokens", "16"]
    assert command_line(words) == 0
    assert "TTFT, continuous" in capsys.readouterr().out


def test_the_headline_says_which_is_faster_only_beyond_noise() -> None:
    def report(batching: str, wall_s: float) -> ServingReport:
        times = RequestTimes(0.0, 1.0, (1.0, wall_s), n_prompt=3, n_out=2)
        return ServingRun(batching, "burst of 1", 1, (times,), ((1, 2),), 1, (1,), 0).report()

    faster = headline([report("static", 4.0), report("continuous", 2.0)])[0]
    assert "Continuous batching gives 2.00 times" in faster
    assert "the median latency is 2\u00a0s instead of 4\u00a0s" in faster
    assert "the same output tokens/s within 5 %" in headline([report("static", 2.05), report("continuous", 2.0)])[0]


def test_a_run_that_was_cut_off_is_compared_with_nothing() -> None:
    def report(batching: str, *, finished: int) -> ServingReport:
        done = RequestTimes(0.0, 1.0, (1.0, 2.0), n_prompt=3, n_out=2)
        times = tuple(done if number < finished else None for number in range(4))
        return ServingRun(batching, "burst of 4", 1, times, ((1, 2),) * 4, 1, (1,), 0).report()

    said = headline([report("static", finished=2), report("continuous", finished=4)])
    assert not any("times the output" in each or "instead of" in each for each in said)
    assert said[0].startswith("Continuous batching gives")
    assert "2 of 4 requests were not finished in time" in said[1]
