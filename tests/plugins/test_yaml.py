"""Every plugin through LightningCLI: what a recipe says is what is built, printed and built again."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_efficient.callbacks import LoRAFA
from lightning_efficient.optimizers import Eva, EvaP
from tests.plugins.table import ROWS
from tests.plugins.tiny import TinyData, TinyModule
from tests.support.trainers import QUIET, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended to run from within Python")


def run_cli(*args: str) -> LightningCLI:
    return LightningCLI(
        TinyModule, TinyData, run=False, save_config_callback=None, seed_everything_default=False, args=list(args)
    )


def recipe(path: Path, sections: dict[str, Any]) -> str:
    trainer = {**QUIET, "devices": 2, **sections["trainer"]}
    path.write_text(yaml.safe_dump({**sections, "trainer": trainer}))
    return str(path)


def settings(plugin: object) -> dict[str, Any]:
    """What the plugin was told: its public attributes that are plain values."""
    if isinstance(plugin, Eva):
        return {**plugin.defaults, "config": plugin.config}
    if isinstance(plugin, EvaP):
        return {**plugin.defaults, "rank": plugin.rank, "backend": plugin.backend}
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    told = {k: v for k, v in vars(plugin).items() if not k.startswith("_") and isinstance(v, plain)}
    return {**told, "config": plugin.config} if isinstance(plugin, LoRAFA) else told


def built(name: str, path: str) -> tuple[type, dict[str, Any]]:
    cli = run_cli("--config", path)
    plugin = ROWS[name].plugin(cli.trainer, cli.model)
    return type(plugin), settings(plugin)


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_survives_the_round_trip(name: str, tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe.yaml", ROWS[name].yaml)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match="0"):
        run_cli("--config", path, "--print_config")
    (tmp_path / "printed.yaml").write_text(printed.getvalue())

    assert built(name, path) == built(name, str(tmp_path / "printed.yaml"))
    assert not dist.is_initialized()  # constructors do no work


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_builds_what_python_builds(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    plugin = row.plugin(make_trainer(2, **row.trainer()), row.module(row.optimizer))
    assert built(name, recipe(tmp_path / "recipe.yaml", row.yaml)) == (type(plugin), settings(plugin))


@pytest.mark.parametrize("name", ROWS)
def test_an_unknown_argument_is_named(name: str, tmp_path: Path) -> None:
    misspelt, key = _with_misspelling(ROWS[name].yaml)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit, match="2"):
        run_cli("--config", recipe(tmp_path / "recipe.yaml", misspelt))
    assert key in said.getvalue()


def _with_misspelling(section: Any) -> tuple[Any, str]:
    """The same section with an argument too many in its innermost `init_args`."""
    key = "nonesuch"
    if isinstance(section, list):
        return [_with_misspelling(each)[0] for each in section], key
    if not isinstance(section, dict):
        return section, key
    inner = section.get("init_args", {}).values()
    if "class_path" in section and not any(isinstance(v, dict) and "class_path" in v for v in inner):
        return {**section, "init_args": {**section.get("init_args", {}), key: 3}}, key
    return {k: _with_misspelling(v)[0] for k, v in section.items()}, key
