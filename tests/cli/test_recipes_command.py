"""`recipes list|show|copy`, and where `-c` looks."""

from pathlib import Path

import pytest

from lightning_efficient.cli import main
from lightning_efficient.cli.errors import UserError
from lightning_efficient.cli.recipes import find_recipe, shipped_recipes, shipped_recipes_folder


def test_the_working_folder_comes_before_the_shipped_recipes(workplace: Path) -> None:
    assert find_recipe("quickstart") == shipped_recipes_folder() / "quickstart.yaml"

    (workplace / "quickstart.yaml").write_text("seed_everything: 1\n")

    assert find_recipe("quickstart") == workplace / "quickstart.yaml"


@pytest.mark.parametrize("name", ["acp_sgd/digits", "acp_sgd/digits.yaml"])
def test_the_suffix_may_be_left_out(name: str) -> None:
    assert find_recipe(name) == shipped_recipes_folder() / "acp_sgd" / "digits.yaml"


def test_a_bare_file_name_suggests_its_folder() -> None:
    with pytest.raises(UserError, match="acp_sgd/char_llama"):
        find_recipe("char_llama")


def test_list_has_every_recipe_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0

    words = capsys.readouterr().out.split()
    for recipe in shipped_recipes():
        assert recipe.name in words
        assert recipe.description.split()[0] in words


def test_show_prints_the_file_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "quickstart"]) == 0

    assert capsys.readouterr().out == (shipped_recipes_folder() / "quickstart.yaml").read_text()


def test_copy_refuses_to_overwrite_without_force(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "copy", "quickstart", "mine.yaml"]) == 0
    (workplace / "mine.yaml").write_text("my edit")

    assert main(["recipes", "copy", "quickstart", "mine.yaml"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (workplace / "mine.yaml").read_text() == "my edit"

    assert main(["recipes", "copy", "quickstart", "mine.yaml", "--force"]) == 0
    assert (workplace / "mine.yaml").read_text() == find_recipe("quickstart").read_text()


def test_copy_into_a_folder_keeps_the_name(workplace: Path) -> None:
    assert main(["recipes", "copy", "acp_sgd/digits"]) == 0

    assert (workplace / "digits.yaml").read_text() == find_recipe("acp_sgd/digits").read_text()
