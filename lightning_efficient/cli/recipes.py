"""Recipes: the LightningCLI YAML files that ship with the package, and how `-c NAME` finds one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from lightning_efficient.cli.errors import CommandParser, UserError, nearest

_SUFFIXES = ("", ".yaml", ".yml")


@dataclass(frozen=True)
class Recipe:
    """One shipped recipe.

    Attributes:
        name: The name to pass to `-c`: its path below the recipes folder, without `.yaml`.
        path: Where the file is.
        description: The first comment line of the file.
        sweep: Whether it is for `bench`, and not for `fit`.
    """

    name: str
    path: Path
    description: str
    sweep: bool = False

    @property
    def group(self) -> str:
        """The technique or model family, i.e. the first folder of the name."""
        return self.name.split("/")[0] if "/" in self.name else "start here"


def shipped_recipes_folder() -> Path:
    """Return the folder of the shipped recipes: inside an installed package, or beside it in a source checkout.

    Raises:
        UserError: The installation has no recipes.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError(f"The shipped recipes are missing (no 'recipes' in {package}): reinstall lightning-efficient.")


def shipped_recipes() -> list[Recipe]:
    """Return every shipped recipe, ordered by name, those without a folder first."""
    folder = shipped_recipes_folder()
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts) > 1, path.as_posix()))
    return [
        Recipe(
            name=path.relative_to(folder).with_suffix("").as_posix(),
            path=path,
            description=_first_comment(path),
            sweep=_is_sweep(path),
        )
        for path in paths
    ]


def find_recipe(name: str) -> Path:
    """Find a recipe in the working folder, then among the shipped ones; `.yaml` may be left out.

    Args:
        name: A path, or the name of a shipped recipe such as `acp_sgd/digits`.

    Returns:
        The file's path.

    Raises:
        UserError: There is no such recipe; the message has the places searched and the nearest names.
    """
    places = [Path.cwd(), shipped_recipes_folder()]
    for place in places:
        for suffix in _SUFFIXES:
            path = place / f"{name}{suffix}"
            if path.is_file():
                return path
    matches = _nearest_recipes(name)
    hint = f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
    searched = ", then ".join(str(place) for place in places)
    raise UserError(
        f"There is no recipe '{name}': looked in {searched}, with and without .yaml.{hint} "
        "'lightning-efficient recipes list' shows the shipped ones."
    )


def require_recipe(words: Sequence[str], why: str) -> None:
    """Check that the words of a command line name a recipe.

    Args:
        words: what the command was given.
        why: what the recipe is needed for, to be read after a colon.

    Raises:
        UserError: There is neither `-c` nor `--config`.
    """
    if not any(re.fullmatch(r"-c.*|--config(=.*)?", word) for word in words):
        raise UserError(
            f"no recipe given: {why}. Name one with -c, e.g. -c quickstart; 'lightning-efficient recipes list' shows "
            "them."
        )


def main(argv: Sequence[str]) -> int:
    """Run `lightning-efficient recipes list|show|copy`.

    Args:
        argv: The words after `recipes`.

    Returns:
        The exit code.

    Raises:
        UserError: An unknown recipe, or a destination that exists.
    """
    parser = CommandParser(prog="lightning-efficient recipes", description="The shipped recipes.")
    actions = parser.add_subparsers(dest="action", metavar="{list,show,copy}")
    actions.add_parser("list", help="list the shipped recipes (the default)")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name", help="name of a recipe, e.g. acp_sgd/digits")
    copy = actions.add_parser("copy", help="copy a recipe, to edit it")
    copy.add_argument("name", help="name of a recipe, e.g. acp_sgd/digits")
    copy.add_argument("destination", nargs="?", default=".", help="file or folder to write (default: this folder)")
    copy.add_argument("--force", action="store_true", help="overwrite an existing file")
    arguments = parser.parse_args(list(argv))

    if arguments.action == "show":
        _print_recipe(find_recipe(arguments.name))
    elif arguments.action == "copy":
        written = copy_recipe(arguments.name, Path(arguments.destination), force=arguments.force)
        Console(soft_wrap=True).print(f"Wrote {written}. Run it: lightning-efficient fit -c {written}")
    else:
        _print_list()
    return 0


def copy_recipe(name: str, destination: Path, *, force: bool = False) -> Path:
    """Copy a recipe to a file or into a folder.

    Args:
        name: The recipe's name.
        destination: A file to write, or an existing folder.
        force: Whether an existing file may be overwritten.

    Returns:
        The file that was written.

    Raises:
        UserError: There is no such recipe, or the file exists and `force` is false.
    """
    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() and not force:
        raise UserError(f"{target} exists already: it was left alone. Give another DEST, or --force to overwrite it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def _print_list() -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("recipe", "technique", "what it does"):
        table.add_column(column, overflow="fold", no_wrap=column != "what it does")
    for recipe in shipped_recipes():
        table.add_row(recipe.name, recipe.group, recipe.description)
    console = Console()
    console.print(table)
    sweeps = " or ".join(recipe.name for recipe in shipped_recipes() if recipe.sweep)
    console.print("\nrun one:   lightning-efficient fit -c NAME\nedit one:  lightning-efficient recipes copy NAME")
    if sweeps:
        console.print(f"sweep:     lightning-efficient bench -c {sweeps}")


def _print_recipe(path: Path) -> None:
    console = Console(soft_wrap=True)
    text = path.read_text(encoding="utf-8")
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"))
    else:
        # Piped into a file it must be the very recipe.
        console.file.write(text)


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _is_sweep(path: Path) -> bool:
    """A sweep names the recipe that it varies; LightningCLI has no such key."""
    return any(line.startswith("recipe:") for line in path.read_text(encoding="utf-8").splitlines())


def _nearest_recipes(name: str) -> list[str]:
    names = [recipe.name for recipe in shipped_recipes()]
    local = [path.name for path in Path.cwd().glob("*.y*ml")]
    wanted = name.removesuffix(".yaml").removesuffix(".yml")
    matches = nearest(wanted, names + local)
    by_last_part = {full.rsplit("/", 1)[-1]: full for full in names}
    matches += [by_last_part[part] for part in nearest(wanted.rsplit("/", 1)[-1], by_last_part)]
    return list(dict.fromkeys(matches))[:3]
