"""`lightning-efficient dissect`: train a recipe for a few steps, and say where their time and memory went."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_efficient.callbacks import Dissect
from lightning_efficient.cli.errors import CommandParser, UserError
from lightning_efficient.cli.files import require_file, require_folder
from lightning_efficient.cli.recipes import require_recipe
from lightning_efficient.cli.short_run import ShortRunCLI
from lightning_efficient.dissect import DissectReport, Window, write_json

_DESCRIPTION = """\
Trains a recipe for a few steps and prints where their time and memory went: throughput and peak memory from clean
steps, then a table of modules from profiled ones. Nothing is saved but the report.
Options not listed here go to the recipe, as with 'fit': --trainer.devices 2, --model.size tiny, ...
"""
_EXAMPLES = """\
examples:
  lightning-efficient dissect -c quickstart
  lightning-efficient dissect -c lora_fa/finetune --model.pretrained null --out my_report
"""


def main(argv: Sequence[str]) -> int:
    """Run `dissect` with the words after it.

    Args:
        argv: e.g. `["-c", "quickstart", "--clean", "50"]`.

    Returns:
        The exit code: 0.

    Raises:
        UserError: If there is no recipe, or a number of steps is wrong.
    """
    options, recipe_args = _parser().parse_known_args(list(argv))
    require_recipe(recipe_args, "a model and its data are needed to measure them")
    require_folder(Path(options.out), "--out")
    if options.json:
        require_file(options.json, "--json")
    dissect_recipe(recipe_args, _callback(options), json=options.json)
    return 0


def dissect_recipe(recipe_args: Sequence[str], callback: Dissect, *, json: Path | None = None) -> DissectReport:
    """Train a recipe for as many steps as a callback needs.

    Args:
        recipe_args: the recipe and its overrides, as words of the command line.
        callback: measures.
        json: also write the report to this file.

    Returns:
        The report, on every rank.

    Raises:
        UserError: The fit ended before the measurement did.
    """
    cli = ShortRunCLI(recipe_args, callback, steps=callback.steps_needed, left_out=(Dissect,))
    if callback.report is None:
        raise UserError(
            "the fit ended before the measurement: something in the recipe stopped it, such as a callback that sets "
            "should_stop. Leave it out, or ask for fewer steps (--warmup, --clean)."
        )
    if json is not None and cli.trainer.is_global_zero:
        write_json(callback.report, json)
    return callback.report


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="lightning-efficient dissect",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="lightning-efficient dissect -c RECIPE [options] [recipe overrides]",
    )
    default = Window()
    parser.add_argument("--warmup", type=int, default=default.warmup, metavar="N", help="steps before (default: 5)")
    parser.add_argument("--clean", type=int, default=default.clean, metavar="N", help="steps to time (default: 20)")
    parser.add_argument("--dissect", type=int, default=default.dissect, metavar="N", help="to profile (default: 2)")
    parser.add_argument("--memory", type=int, default=default.memory, metavar="N", help="to count, 0 or 1 (default: 1)")
    parser.add_argument("--peak-flops", type=float, metavar="F", help="dense peak of a device in FLOP/s, for MFU")
    parser.add_argument("--out", metavar="DIR", default="dissect", help="folder of the report (default: dissect)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report to this file")
    parser.add_argument("--quiet", action="store_true", help="do not print the report")
    return parser


def _callback(options: argparse.Namespace) -> Dissect:
    return Dissect(
        options.warmup,
        options.clean,
        dissect=options.dissect,
        memory=options.memory,
        peak_flops=options.peak_flops,
        out=options.out,
        print_report=not options.quiet,
        stop_after=True,
    )
