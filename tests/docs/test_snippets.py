"""What README and docs tell the reader to type works: every block is executed, shortened to a few steps."""

import functools
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_efficient.cli.recipes import find_recipe
from tests.docs.snippets import ROOT, Snippet, all_snippets, read_snippets
from tests.support.commands import run_command
from tests.support.ranks import run_ranks

SNIPPETS = all_snippets()
RECIPE_KEYS = {"seed_everything", "trainer", "model", "data", "ckpt_path", "optimizer_guard"}
# What a reader would wait minutes for stops after two steps, or one case of a sweep; nothing else is changed.
SHORTER = {
    "fit": "--trainer.max_steps 2 --trainer.limit_val_batches 1 --trainer.enable_progress_bar false",
    "validate": "--trainer.limit_val_batches 1",
    "test": "--trainer.limit_test_batches 1",
    "predict": "--trainer.limit_predict_batches 1",
    "compression": "--steps 3",
    "dissect": "--warmup 1 --clean 2",
    "bench -c small.yaml": "--only technique=F",
}


def blocks(*languages: str) -> list[Snippet]:
    """The blocks of these languages that run; a text that stands on several pages does so once."""
    seen: dict[tuple[str, bool], Snippet] = {}
    for snippet in SNIPPETS:
        if snippet.language in languages and not snippet.file:
            seen.setdefault((snippet.text, bool(snippet.skip)), snippet)
    return list(seen.values())


def cases(snippets: list[Snippet], marks: Callable[[Snippet], list[pytest.MarkDecorator]] = lambda _: []) -> Any:
    return [
        pytest.param(each, id=each.where, marks=[pytest.mark.skip(reason=each.skip)] if each.skip else marks(each))
        for each in snippets
    ]


@dataclass(frozen=True)
class Command:
    """A command as it is typed, and what the page says that it prints."""

    words: list[str]
    prints: list[str]


def commands(snippet: Snippet) -> list[Command]:
    found: list[Command] = []
    for line in snippet.text.replace("\\\n", " ").splitlines():
        typed = line.removeprefix("$ ")
        if snippet.language == "console" and typed == line:
            found[-1].prints.append(line)
        elif words := shlex.split(typed, comments=True):
            found.append(Command(words, []))
    return found


def write_files(page: str, folder: Path) -> None:
    for snippet in SNIPPETS:
        if snippet.page == page and snippet.file:
            (folder / snippet.file).write_text(snippet.text, encoding="utf-8")


def run(words: list[str], folder: Path) -> str:
    """Run one command in ``folder`` and return what it printed; a command that nobody can check fails."""
    if words[:3] == ["python", "-m", "lightning_efficient"]:
        return run_cli(words[3:], folder, import_path=str(folder))
    if words[0] == "lightning-efficient":
        return run_cli(words[1:], folder)
    if words[0] == "make":
        # Running the target would run the tests within the tests; that it exists is what a page can get wrong.
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    pytest.fail(f"no rule to check `{shlex.join(words)}`. Skip the block with a reason, or write a rule.")


def run_cli(arguments: list[str], folder: Path, *, import_path: str = "") -> str:
    """Run the command line on as many ranks as the recipe asks for."""
    subcommand = arguments[0]
    if "--help" not in arguments:
        typed = shlex.join(arguments)
        fewer = next((words for what, words in SHORTER.items() if f"{typed} ".startswith(f"{what} ")), "")
        arguments = [*arguments, *shlex.split(fewer)]
    world_size = devices(arguments, folder) if subcommand in SHORTER else 1
    outcomes = run_command(arguments, folder, world_size=world_size, import_path=import_path)
    printed = "\n".join(outcome.output for outcome in outcomes)
    for outcome in outcomes:
        assert outcome.status == "returned", f"{shlex.join(arguments)}: {outcome.status}\n{outcome.error}\n{printed}"
    assert not any(outcome.value for outcome in outcomes) or "error: " in printed, printed
    return f"exit code {outcomes[0].value}\n{printed}"


def devices(arguments: list[str], folder: Path) -> int:
    """The ranks that a command trains on: `trainer.devices` of the last file or option that sets it."""
    count = 1
    for option, value in itertools.pairwise(arguments):
        if option == "-c":
            path = folder / value if (folder / value).exists() else find_recipe(value)
            settings = yaml.safe_load(path.read_text(encoding="utf-8")).get("trainer") or {}
            count = settings.get("devices", count)
    for option, value in itertools.pairwise(arguments):
        if option == "--trainer.devices":
            count = int(value)
    return count if isinstance(count, int) else 1


def is_a_first_try(snippet: Snippet) -> bool:
    return snippet.page == "README.md"


def script_rank(rank: int, world_size: int, script: str) -> None:
    os.chdir(Path(script).parent)
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script]
    # What the script itself starts is forked as well.
    torch.multiprocessing.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
    runpy.run_path(script, run_name="__main__")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("snippet", cases([each for each in blocks("python") if not is_a_first_try(each)]))
def test_python_block_runs(snippet: Snippet, tmp_path: Path) -> None:
    """On as many ranks as its Trainer asks for, forked with lightning imported, which saves most of the time."""
    asked = re.search(r"\bdevices=(\d+)", snippet.text)
    world_size = int(asked[1]) if asked else 1
    script = write_script(snippet, tmp_path)
    run_ranks(script_rank, world_size, str(script), timeout=150, group=world_size > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "snippet", cases(blocks("python"), lambda each: [] if is_a_first_try(each) else [pytest.mark.exhaustive])
)
def test_python_block_runs_as_a_script(snippet: Snippet, tmp_path: Path) -> None:
    """In an interpreter of its own: it imports all that it uses, and what it launches starts."""
    script = write_script(snippet, tmp_path)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, f"{snippet.where}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def write_script(snippet: Snippet, folder: Path) -> Path:
    write_files(snippet.page, folder)
    script = folder / "snippet.py"
    script.write_text(snippet.text, encoding="utf-8")
    return script


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("snippet", cases(blocks("yaml")))
def test_yaml_block_trains(snippet: Snippet, tmp_path: Path) -> None:
    keys = set(yaml.safe_load(snippet.text))
    assert keys <= RECIPE_KEYS, f"{snippet.where} is no recipe: unknown {sorted(keys - RECIPE_KEYS)}"
    write_files(snippet.page, tmp_path)
    (tmp_path / "block.yaml").write_text(snippet.text, encoding="utf-8")
    base = [] if "model" in keys else ["-c", "quickstart.yaml"]
    assert run(["lightning-efficient", "fit", *base, "-c", "block.yaml"], tmp_path).startswith("exit code 0")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("snippet", cases(blocks("bash", "console")))
def test_commands_work_and_print_what_the_page_says(snippet: Snippet, tmp_path: Path) -> None:
    write_files(snippet.page, tmp_path)
    for command in commands(snippet):
        printed = run(command.words, tmp_path)
        if snippet.language == "bash" and command.words[0] != "make":
            assert printed.startswith("exit code 0"), printed
        for line in command.prints:
            assert line in printed, f"{snippet.where}: {shlex.join(command.words)} does not print {line!r}:\n{printed}"


@pytest.mark.slow
@pytest.mark.distributed
def test_what_quickstart_says_to_try_next_works(tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    suggested = re.findall(r'@echo "  (lightning-efficient .*?)  +', makefile)
    assert len(suggested) >= 3
    on_a_page = {shlex.join(each.words) for block in blocks("bash") if not block.skip for each in commands(block)}
    for command in suggested:
        if command not in on_a_page:  # it runs with its page
            assert run(shlex.split(command), tmp_path).startswith("exit code 0"), command


def test_a_file_block_is_used_by_a_block_that_runs() -> None:
    for snippet in SNIPPETS:
        if snippet.file:
            names = (snippet.file, f"from {Path(snippet.file).stem} import", f"class_path: {Path(snippet.file).stem}.")
            others = [other.text for other in SNIPPETS if other.page == snippet.page and not other.skip]
            assert any(name in text for name in names for text in others), f"{snippet.where}: nothing uses it"


def test_a_block_is_read_with_its_marker() -> None:
    text = "<!-- snippet: skip (it would take an hour) -->\n```bash\nmake bench\n```\n\n```python\nx = 1\n```\n"
    skipped, plain = read_snippets(text, "page.md")
    assert (skipped.skip, skipped.text, skipped.line) == ("it would take an hour", "make bench\n", 2)
    assert (plain.skip, plain.language) == ("", "python")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- snippet: skip -->\n```bash\nls\n```\n", "needs a reason"),
        ("<!-- snippet: sikp (a typing error) -->\n```bash\nls\n```\n", "none of skip"),
        ("<!-- snippet: file x.yaml -->\n\ntext\n", "stands before no block"),
        ("```\nls\n```\n", "nobody can check"),
        ("```{code-block} python\nx\n```\n", "nobody can check"),
    ],
)
def test_a_block_cannot_escape_unnoticed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_snippets(text, "page.md")


def test_a_command_without_a_rule_fails(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="no rule to check"):
        run(["rm", "-rf", "x"], tmp_path)


def test_pages_have_blocks_of_each_kind() -> None:
    # Guards the tests above against running over nothing.
    assert {snippet.language for snippet in SNIPPETS if not snippet.skip} >= {"python", "yaml", "bash"}
    assert "README.md" in {snippet.page for snippet in SNIPPETS}
