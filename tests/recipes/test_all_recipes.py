"""Every shipped recipe is described, parses against the real signatures, and trains two steps offline."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_efficient.callbacks import LoRAFA, PEFTAdapter
from lightning_efficient.cli import EfficientCLI, main
from lightning_efficient.cli.recipes import Recipe, shipped_recipes
from lightning_efficient.optimizers import Eva, EvaP
from lightning_efficient.strategies import ParmStrategy
from tests.support.ranks import run_ranks

RECIPES = [recipe for recipe in shipped_recipes() if not recipe.sweep]
COMPRESSED = {"quickstart", *(f"{name}/digits" for name in ("acp_sgd", "power_sgd", "top_k", "sign_sgd"))} | {
    "acp_sgd/char_llama",
    "acp_sgd/multi_node",
    "bench/techniques/ACP",
    "lora_fa/acp_sgd",
}
SHARDED = {"bench/techniques/Z2", "bench/techniques/Z3"}
PARM = {f"moe/{name}" for name in ("parm", "deepspeed_order", "parm_gpu", "hf_mixtral")}
ON_CUDA_ALONE = {f"bench/techniques/{name}" for name in ("Q", "QL", "Z2O", "Z3O")}
EVA = {"eva/published_digits_ae", "eva/eva_f_char_llama", "eva/eva_f_resnet_digits", "eva/eva_p_char_llama"} | {
    "lora_fa/eva_p",
    "bench/techniques/EVA",
}
LORA_FA = {"lora_fa/finetune", "lora_fa/hf_causal_lm", "lora_fa/acp_sgd", "lora_fa/eva_p"}
BENCH_LFA = "bench/techniques/LFA"

# Enough to build, train twice, validate once, and leave nothing behind.
TWO_STEPS = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.limit_train_batches=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
]
SMALL_LLAMA = ["--model.hidden_size=32", "--model.ffn_size=64", "--model.num_heads=2", "--model.num_layers=2"]
SHORT_TEXT = ["--data.block_size=32", "--data.batch_size=2"]
# Which of the measured schedules wins is for other tests.
UNMEASURED = ["--trainer.strategy.init_args.schedule=s1_hier/2"]


@dataclass(frozen=True)
class Case:
    """How a recipe is run here: before it, other recipes; after it, what makes it fit; whether it names checkpoints."""

    base: tuple[str, ...] = ()
    changes: list[str] = field(default_factory=list)
    checkpoints: bool = False


CASES = {
    "acp_sgd/char_llama": Case(changes=SHORT_TEXT),
    # Two of its eight ranks, as one node of CPUs.
    "acp_sgd/multi_node": Case(
        changes=[
            *SMALL_LLAMA,
            *SHORT_TEXT,
            "--trainer.num_nodes=1",
            "--trainer.devices=2",
            "--trainer.precision=32-true",
        ]
    ),
    "bench/llama": Case(changes=SHORT_TEXT),
    **{
        f"bench/models/{name}": Case(base=("bench/llama",), changes=[*SMALL_LLAMA, *SHORT_TEXT])
        for name in ("tiny", "small", "1.3b", "7b", "13b")
    },
    # Grouped queries: more heads than those of keys and values.
    "bench/models/70b": Case(
        base=("bench/llama",), changes=[*SMALL_LLAMA, *SHORT_TEXT, "--model.num_kv_heads=1", "--model.vocab_size=256"]
    ),
    "bench/models/hf": Case(base=("bench/llama",), changes=SHORT_TEXT),
    **{
        f"bench/techniques/{name}": Case(base=("bench/llama",), changes=SHORT_TEXT)
        for name in ("F", "R", "L", "Q", "QL", "LFA", "Z2", "Z2O", "Z3", "Z3O", "ACP", "EVA")
    },
    "eva/eva_f_char_llama": Case(changes=SHORT_TEXT),
    "eva/eva_p_char_llama": Case(changes=SHORT_TEXT),
    "hf/causal_lm": Case(changes=SHORT_TEXT),
    "llama/pretrain": Case(changes=SHORT_TEXT),
    # The real chain, a fine-tuning from a pretrained file, is a test of its own below.
    "lora_fa/acp_sgd": Case(changes=[*SHORT_TEXT, "--model.pretrained=null"]),
    "lora_fa/eva_p": Case(changes=[*SHORT_TEXT, "--model.pretrained=null"]),
    "lora_fa/finetune": Case(changes=[*SHORT_TEXT, "--model.pretrained=null"]),
    "lora_fa/hf_causal_lm": Case(changes=SHORT_TEXT, checkpoints=True),
    "lora_fa/pretrain": Case(changes=SHORT_TEXT, checkpoints=True),
    "models/llama_160m": Case(base=("llama/pretrain",), changes=[*SMALL_LLAMA, *SHORT_TEXT]),
    "models/llama_1.3b": Case(base=("llama/pretrain",), changes=[*SMALL_LLAMA, *SHORT_TEXT]),
    "moe/parm": Case(changes=[*SHORT_TEXT, "--trainer.strategy.init_args.trials=0"], checkpoints=True),
    "moe/deepspeed_order": Case(base=("moe/parm",), changes=SHORT_TEXT),
    # Four of its eight ranks.
    "moe/parm_gpu": Case(
        changes=[
            *SMALL_LLAMA,
            *SHORT_TEXT,
            *UNMEASURED,
            "--model.num_kv_heads=2",
            "--model.num_experts=4",
            "--trainer.devices=4",
            "--trainer.strategy.init_args.expert_parallel_size=2",
        ]
    ),
    "moe/hf_mixtral": Case(changes=[*SHORT_TEXT, *UNMEASURED]),
    "quickstart": Case(changes=SHORT_TEXT),
}


def words(recipe: Recipe) -> list[str]:
    case = CASES.get(recipe.name, Case())
    return ["fit", *(word for name in (*case.base, recipe.name) for word in ("-c", name))]


def every_recipe() -> Any:
    return pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def test_there_are_recipes() -> None:
    assert {recipe.name for recipe in RECIPES} >= COMPRESSED | EVA | LORA_FA | PARM | CASES.keys()


@every_recipe()
def test_the_first_line_says_what_it_does(recipe: Recipe) -> None:
    assert 20 < len(recipe.description) < 120
    assert not recipe.description.endswith(".")


@every_recipe()
def test_it_parses_unchanged_and_what_is_parsed_parses_to_the_same(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = parsed(words(recipe), capsys)
    assert whole.items() >= {"seed_everything": 0, "optimizer_guard": True}.items()

    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(whole))
    assert parsed(["fit", "-c", str(tmp_path / "whole.yaml")], capsys) == whole


def parsed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def fit_two_steps(rank: int, world_size: int, arguments: list[str]) -> dict[str, float]:
    """What a rank has to show after two steps."""
    trainer = EfficientCLI(args=arguments).trainer
    shown = {"steps": float(trainer.global_step), "val_loss": float(trainer.callback_metrics["val_loss"])}
    if (compressor := getattr(trainer.strategy, "compressor", None)) is not None:
        shown |= {"reductions": compressor.stats.steps, "bytes_sent": compressor.stats.bytes_sent}
    if isinstance(optimizer := trainer.optimizers[0], (Eva, EvaP)):
        shown |= {"preconditioned_steps": optimizer.stats.counted_steps}
    if isinstance(trainer.strategy, ParmStrategy):
        stats = trainer.strategy.stats
        shown |= {"expert_rows": stats.rows, "moe_bytes": stats.layers.total_bytes}
        shown |= {name: float(trainer.callback_metrics[name]) for name in ("aux_loss", "dropped")}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (LoRAFA, PEFTAdapter)):
            shown |= callback.stats
    return shown


@pytest.mark.distributed
@every_recipe()
def test_it_trains_two_steps_offline(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if recipe.name in ON_CUDA_ALONE:
        pytest.skip("needs CUDA")
    if recipe.name == "bench/techniques/L":
        pytest.importorskip("peft")
    if "hf" in recipe.name:
        pytest.importorskip("transformers")
    if "digits" in recipe.name:
        pytest.importorskip("sklearn")
    world_size = 2 if recipe.name in COMPRESSED | SHARDED else 4 if recipe.name in PARM else 1
    case = CASES.get(recipe.name, Case())

    checkpoints = [f"--trainer.enable_checkpointing={str(case.checkpoints).lower()}"]
    arguments = [*words(recipe), *TWO_STEPS, *checkpoints, *case.changes]
    shown = run_ranks(fit_two_steps, world_size, arguments, timeout=100)

    for each in shown:
        assert each["steps"] == 2
        assert math.isfinite(each["val_loss"])
        assert each["val_loss"] == shown[0]["val_loss"]
        if recipe.name in COMPRESSED:
            assert each["reductions"] == 2
            assert each["bytes_sent"] > 0
        if recipe.name in EVA:
            assert each["preconditioned_steps"] == 2
        if recipe.name in LORA_FA:
            assert each["lora_fa/adapted"] == 28
            assert each["lora_fa/fell_back"] == 0
            assert each["lora_fa/saved_mib"] > 0
        if recipe.name in PARM:
            assert min(each["expert_rows"], each["moe_bytes"], each["aux_loss"]) > 0
            assert 0 <= each["dropped"] < 1
        if recipe.name == BENCH_LFA:
            assert each["lora_fa/adapted"] == 28
        if recipe.name == "bench/techniques/L":
            assert each["peft/layers"] == 28


@pytest.mark.distributed
def test_what_one_recipe_pretrains_the_next_fine_tunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lora_fa/pretrain", "lora_fa/finetune"):
        run_ranks(fit_two_steps, 1, ["fit", "-c", name, *TWO_STEPS, *SHORT_TEXT], timeout=100)
    exported = load_file(tmp_path / "exports/lora_fa/adapter_model.safetensors")
    assert len(exported) == 56
    assert all(torch.any(tensor != 0) for tensor in exported.values())
    (checkpoint,) = tmp_path.glob("checkpoints/*.ckpt")
    whole = torch.load(tmp_path / "pretrained/tiny_llama.ckpt", weights_only=True)["state_dict"]
    adapter = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert len(adapter) == len(exported)
    assert not adapter.keys() & whole.keys()


def test_fine_tuning_without_the_pretrained_file_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", "lora_fa/finetune", "--trainer.accelerator=cpu"]) == 2
    assert "the recipe lora_fa/pretrain does" in capsys.readouterr().err
