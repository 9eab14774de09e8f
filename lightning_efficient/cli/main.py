"""Dispatch: the first word picks the command; each command is imported only when it runs."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

import lightning_efficient
from lightning_efficient.cli.errors import EXIT_BAD_INPUT, UserError, debugging, did_you_mean, report

TRAINER_COMMANDS = {
    "fit": "train a model as a recipe says",
    "validate": "run one evaluation epoch over the validation set",
    "test": "run one evaluation epoch over the test set",
    "predict": "run a model over the prediction set",
}
TOOL_COMMANDS = {
    "recipes": "list, show or copy the shipped recipes",
    "doctor": "show versions, devices, extras and system tools, and what is missing for what",
    "compression": "recommend rank and bucket size for this model and link",
    "parm": "choose the schedule of a mixture-of-experts layer on these machines",
    "dissect": "train a recipe for some steps and say where their time and memory went",
    "bench": "measure techniques, serving or collectives, and write tables and a page",
}

_USAGE = """\
usage: lightning-efficient COMMAND [options]

Efficient training as drop-in parts for PyTorch Lightning, from recipes (YAML).

train and evaluate:
{trainer}

tools:
{tools}

options:
  -h, --help      show this text; COMMAND --help shows a command's options
  --version       show the version

examples:
  lightning-efficient fit -c quickstart
  lightning-efficient fit -c acp_sgd/digits --trainer.max_epochs 3
  lightning-efficient recipes copy acp_sgd/char_llama mine.yaml

LIGHTNING_EFFICIENT_DEBUG=1 shows the traceback of an error.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: The words after the program's name; `sys.argv[1:]` when None.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C. Other errors propagate with their traceback.
    """
    argv = list(sys.argv[1:] if args is None else args)
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("-h", "--help", "help"):
        sys.stdout.write(_usage())
        return 0
    if command == "--version":
        sys.stdout.write(f"lightning-efficient {lightning_efficient.__version__}\n")
        return 0
    if not command:
        sys.stderr.write(_usage())
        return EXIT_BAD_INPUT
    if command in TRAINER_COMMANDS:
        return _guarded(_train, argv)
    if command in TOOL_COMMANDS:
        return _guarded(_tool(command), rest)
    if command.startswith("-"):
        return report(
            f"'{command}' comes before the command. Write the command first: lightning-efficient fit {command} ..."
        )
    hint = did_you_mean(command, [*TRAINER_COMMANDS, *TOOL_COMMANDS])
    return report(f"There is no command '{command}'.{hint} 'lightning-efficient --help' lists them.")


def _guarded(run: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        return run(argv)
    except (UserError, MisconfigurationException) as error:
        if debugging():
            raise
        return report(str(error))
    except (ValueError, RuntimeError, FileNotFoundError, ModuleNotFoundError) as error:
        # Raised by our own code it is about the user's input and says what to do; from elsewhere it may be a bug.
        if debugging() or not _raised_here(error):
            raise
        return report(str(error))
    except KeyboardInterrupt:
        return 130


def _raised_here(error: Exception) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).startswith("lightning_efficient.")


def _train(argv: Sequence[str]) -> int:
    from lightning_efficient.cli.efficient_cli import EfficientCLI

    EfficientCLI(args=list(argv))
    return 0


def _tool(command: str) -> Callable[[Sequence[str]], int]:
    if command == "recipes":
        from lightning_efficient.cli import recipes

        return recipes.main
    if command == "doctor":
        from lightning_efficient.cli import doctor

        return doctor.main
    if command == "dissect":
        from lightning_efficient.cli import dissect

        return dissect.main
    if command == "parm":
        from lightning_efficient.cli import parm

        return parm.main
    if command == "bench":
        from lightning_efficient.cli import bench

        return bench.main
    from lightning_efficient.cli import compression

    return compression.main


def _usage() -> str:
    def lines(commands: dict[str, str]) -> str:
        return "\n".join(f"  {name:<14}  {text}" for name, text in commands.items())

    return _USAGE.format(trainer=lines(TRAINER_COMMANDS), tools=lines(TOOL_COMMANDS))
