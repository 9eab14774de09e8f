from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_efficient.cli.bench.cases import Machine, expand, fingerprint, select, why_not
from lightning_efficient.cli.bench.runner import case_command
from lightning_efficient.cli.bench.sweep import Sweep, parse_sweep, read_sweep
from lightning_efficient.cli.bench.techniques import TECHNIQUES
from lightning_efficient.cli.errors import UserError

EVERYTHING = frozenset({"peft", "bitsandbytes"})
ON_CPU, ON_GPUS = Machine(0, EVERYTHING), Machine(8, EVERYTHING)


def sweep(matrix: dict[str, Any], **more: Any) -> Sweep:
    return parse_sweep({"recipe": "bench/llama", "matrix": matrix, **more})


def test_a_matrix_becomes_all_of_its_cells_and_the_base_once_more() -> None:
    cases = expand(sweep({"model": ["tiny"], "technique": ["none", "R+F"], "seq": [64, 128], "world": [1]}))
    assert [case.case_id for case in cases] == [
        "tiny/none/seq64/world1",
        "tiny/none/seq128/world1",
        "tiny/F+R/seq64/world1",
        "tiny/F+R/seq128/world1",
        "tiny/none/seq64/world1/again",
        "tiny/none/seq128/world1/again",
    ]
    assert cases[2].axes == {"model": "tiny", "technique": "F+R", "seq": 64, "world": 1}
    assert cases[4].words == cases[0].words


@pytest.mark.parametrize(
    ("matrix", "more"),
    [({"technique": ["none"]}, {}), ({"technique": ["F"]}, {}), ({"technique": ["none", "F"]}, {"control": False})],
)
def test_the_base_runs_once_where_nothing_is_compared(matrix: dict[str, Any], more: dict[str, Any]) -> None:
    assert not any("again" in case.case_id for case in expand(sweep(matrix, **more)))


def test_a_case_is_a_command_of_recipes_and_words() -> None:
    one = sweep(
        {"model": ["tiny"], "technique": ["F+LFA"], "micro_batch": [2], "world": [2], "clip": [0.5], "bias": [True]},
        keys={"clip": "trainer.gradient_clip_val", "bias": "model.init_args.bias"},
        overrides=["--trainer.precision=bf16-true"],
        window={"warmup": 1, "clean": 3},
    )
    (case,) = expand(one)
    words = case_command(case, one, Path("/x"))[3:]
    assert [Path(word).stem for word in words if word.endswith(".yaml")] == ["llama", "tiny", "F", "LFA"]
    assert " ".join(words[9:17]) == "--warmup 1 --clean 3 --dissect 2 --memory 1"
    assert words[-9:] == [
        "--trainer.precision=bf16-true",
        *("--data.batch_size", "2", "--trainer.devices", "2"),
        *("--trainer.gradient_clip_val", "0.5", "--model.init_args.bias", "true"),
    ]
    assert case.case_id == "tiny/F+LFA/mb2/world2/clip=0.5/bias=True"


def test_batches_rise_and_auto_doubles_up_to_the_limit() -> None:
    rising = expand(sweep({"micro_batch": [8, 1, 4]}))
    assert [case.axes["micro_batch"] for case in rising] == [1, 4, 8]
    auto = expand(sweep({"micro_batch": "auto"}, limits={"max_micro_batch": 48}))
    assert [case.axes["micro_batch"] for case in auto] == [1, 2, 4, 8, 16, 32]
    assert all(case.auto for case in auto)


@given(
    st.lists(st.sampled_from(["none", "F", "R", "F+R", "R+LFA", "L", "EVA"]), min_size=1, unique=True),
    st.lists(st.integers(1, 999), min_size=1, max_size=4, unique=True),
    st.lists(st.text("ab/_ .", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
)
def test_ids_and_folders_are_unique_or_the_sweep_is_refused(
    techniques: list[str], seqs: list[int], words: list[str]
) -> None:
    one = sweep({"technique": techniques, "seq": seqs, "word": words}, keys={"word": "model.init_args.word"})
    try:
        cases = expand(one)
    except UserError:
        assert len(words) > 1  # two words that make one folder name
        return
    assert len({case.case_id for case in cases}) == len({case.folder for case in cases}) == len(cases)


def test_the_same_combination_in_two_orders_is_one_case() -> None:
    with pytest.raises(UserError, match=r"two cells are named F\+R/world1"):
        expand(sweep({"technique": ["F+R", "R+F"]}))


@pytest.mark.parametrize(
    ("technique", "world", "machine", "reason"),
    [
        ("none", 1, ON_CPU, ""),
        ("F+R", 2, ON_CPU, ""),
        ("ACP", 1, ON_CPU, "ACP needs 2 processes or more; world is 1."),
        ("ACP", 2, ON_CPU, ""),
        ("Z2", 1, ON_GPUS, "Z2 needs 2 processes or more; world is 1."),
        ("Z3", 2, ON_CPU, ""),
        ("Z3O", 2, ON_CPU, "Z3O needs CUDA, and there is no GPU here."),
        ("Z3O", 2, ON_GPUS, ""),
        (
            "R+L+Z2",
            2,
            ON_GPUS,
            "L with Z2 is not supported: adapters come after the sharding, which cannot take them.",
        ),
        ("QL", 1, ON_CPU, "QL needs CUDA, and there is no GPU here."),
        ("QL", 1, ON_GPUS, ""),
        ("F+L", 1, Machine(0, frozenset()), "L needs peft: pip install 'lightning-efficient[peft]'."),
        (
            "QL",
            1,
            Machine(1, frozenset({"peft"})),
            "QL needs bitsandbytes: pip install 'lightning-efficient[quantized]'.",
        ),
        ("F", 4, Machine(2, EVERYTHING), "world 4 needs 4 GPUs, and there are 2 here."),
    ],
)
def test_what_cannot_run_says_why(technique: str, world: int, machine: Machine, reason: str) -> None:
    one = sweep({"technique": [technique], "world": [world]})
    (case,) = expand(one)
    assert why_not(case, one, machine) == reason


def test_rules_of_the_file_replace_the_table() -> None:
    one = sweep({"technique": ["none", "L+EVA"]}, rules={"needs_cuda": ["none"], "exclusive": [["L", "LFA"]]})
    cases = expand(one)
    assert why_not(cases[0], one, ON_CPU) == "none needs CUDA, and there is no GPU here."
    assert why_not(cases[1], one, ON_CPU) == ""
    with pytest.raises(UserError, match=r"by the rule 'exclusive: \[L, EVA\]'"):
        expand(sweep({"technique": ["L+EVA"]}, rules={"exclusive": [["L", "EVA"]]}))


def test_cpu_in_the_overrides_means_no_gpus() -> None:
    for words in (["--trainer.accelerator=cpu"], ["--trainer.accelerator", "cpu"]):
        assert Machine.here(sweep({}, overrides=words)).gpus == 0


@pytest.mark.parametrize(("accelerator", "gpus"), [("cpu", 0), ("auto", 1)])
def test_a_recipe_for_the_cpu_means_no_gpus(
    accelerator: str, gpus: int, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (workplace / "mine.yaml").write_text(f"trainer: {{accelerator: {accelerator}}}\n")
    assert Machine.here(sweep({}, recipe="mine.yaml")).gpus == gpus
    assert Machine.here(sweep({}, recipe="mine.yaml", overrides=["--trainer.accelerator=gpu"])).gpus == 1


def test_an_unknown_model_is_refused_with_the_places_searched() -> None:
    with pytest.raises(UserError, match="There is no recipe 'tinny': looked in"):
        expand(sweep({"model": ["tinny"]}))


def test_the_fingerprint_tells_what_runs(workplace: Path) -> None:
    Path("mine.yaml").write_text("seed_everything: 1\n")

    def hashed(**more: Any) -> str:
        one = parse_sweep({"recipe": "mine.yaml", "matrix": {"technique": ["none", "F"]}, **more})
        return fingerprint(one, expand(one))

    first = hashed()
    assert hashed(limits={"timeout_s": 9}, report={"out": "elsewhere"}) == first
    assert hashed(window={"clean": 9}) != first
    assert hashed(limits={"threads": 1}) != first
    assert hashed(overrides=["--trainer.precision=bf16-true"]) != first
    Path("mine.yaml").write_text("seed_everything: 2\n")
    assert hashed() != first


def test_filters() -> None:
    cases = expand(sweep({"technique": ["none", "F", "F+R"], "seq": [64, 128]}))
    chosen = select(cases, ["technique=F,F+R", "seq=128"])
    assert [case.case_id for case in chosen] == ["F/seq128/world1", "F+R/seq128/world1"]
    for wrong, message in (
        ("technique", "Write technique=F"),
        ("tech=F", "of technique, seq"),
        ("seq=7", "are 64, 128"),
    ):
        with pytest.raises(UserError, match=message):
            select(cases, [wrong])


def test_every_letter_is_in_the_quick_or_the_paper_sweep() -> None:
    named = {
        letter
        for name in ("bench/quick", "bench/paper")
        for value in read_sweep(name).matrix["technique"]
        for letter in str(value).split("+")
    }
    assert set(TECHNIQUES) - named == {"Q"}  # 4-bit weights without adapters are for serving
