"""What the command line says when the input is wrong: one sentence, and the nearest valid name."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable
from typing import NoReturn

from typing_extensions import override

EXIT_BAD_INPUT = 2
DEBUG_VARIABLE = "LIGHTNING_EFFICIENT_DEBUG"


class UserError(Exception):
    """Bad input whose message is complete: the command line prints it alone, without a traceback."""


def nearest(name: str, candidates: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return the candidates that look most like `name`, best first.

    Args:
        name: What the user wrote.
        candidates: The valid names.
        limit: The most names to return.

    Returns:
        Up to `limit` names; empty when nothing is close enough to be a plausible typing error.
    """
    by_folded = {candidate.lower(): candidate for candidate in sorted(set(candidates), reverse=True)}
    return [by_folded[match] for match in difflib.get_close_matches(name.lower(), by_folded, n=limit, cutoff=0.6)]


def did_you_mean(name: str, candidates: Iterable[str], *, prefix: str = "") -> str:
    """Return `" Did you mean 'x'?"`, or an empty string where no candidate is close.

    Args:
        name: What the user wrote.
        candidates: The valid names.
        prefix: Written before the suggested name, e.g. `--`.
    """
    matches = nearest(name, candidates, limit=1)
    return f" Did you mean '{prefix}{matches[0]}'?" if matches else ""


def debugging() -> bool:
    """Tell whether the user asked for tracebacks, with `LIGHTNING_EFFICIENT_DEBUG=1`."""
    return os.environ.get(DEBUG_VARIABLE, "").lower() not in ("", "0", "false")


def report(message: str) -> int:
    """Print one error to stderr, naming the rank where there are several, and return the exit code for bad input."""
    rank = os.environ.get("LOCAL_RANK", "0")
    who = "" if rank == "0" else f"[rank {rank}] "
    sys.stderr.write(f"{who}error: {message}\n")
    sys.stderr.flush()
    return EXIT_BAD_INPUT


class CommandParser(argparse.ArgumentParser):
    """argparse, with one line for an error instead of the usage, and the nearest valid choice."""

    @override
    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            choices = [choice.strip(" '") for choice in found[2].split(",")]
            message = f"'{found[1]}' is not one of {', '.join(choices)}.{did_you_mean(found[1], choices)}"
        report(f"{message} See '{self.prog} --help'.")
        sys.exit(EXIT_BAD_INPUT)
