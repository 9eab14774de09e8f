"""The command line on ranks that are forked with everything imported, which saves most of a command's time.

That the installed command starts, and launches ranks of its own, is tested in `tests/cli/test_processes.py` and with
the wheel.
"""

import os
import sys
from pathlib import Path

from tests.support.ranks import RankOutcome, rank_outcomes


def run_command(
    words: list[str], folder: Path, *, world_size: int = 1, import_path: str = "", timeout: float = 120.0
) -> list[RankOutcome]:
    """Run `lightning-efficient WORDS` in a folder on ranks that a launcher has started; each returns its exit code.

    Args:
        words: What follows the program's name.
        folder: The working folder.
        world_size: The number of ranks; as many as the command's Trainer asks for.
        import_path: A folder to import from, as with `python -m`.
        timeout: Seconds.
    """
    group = world_size > 1
    return rank_outcomes(_rank, world_size, words, str(folder), import_path, timeout=timeout, group=group)


def _rank(rank: int, world_size: int, words: list[str], folder: str, import_path: str) -> int:
    from lightning_efficient.cli import main

    os.chdir(folder)
    if import_path:
        sys.path.insert(0, import_path)
    sys.argv = ["lightning-efficient", *words]
    try:
        return main(words)
    except SystemExit as exit_:
        return int(exit_.code or 0)
