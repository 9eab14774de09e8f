"""Where commands write: looked at before they work, so that nothing that took time is lost for a folder."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_efficient.cli.errors import UserError


def require_folder(folder: Path, option: str) -> None:
    """Make a folder, and check that files can be written to it.

    Args:
        folder: that one.
        option: that names it, for the error.

    Raises:
        UserError: It cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder}: the folder cannot be made ({error}). Give another.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder}: nothing can be written there. Give another folder, or its permissions.")


def require_file(path: Path, option: str) -> None:
    """Make the folder of a file, and check that the file can be written.

    Args:
        path: of the file.
        option: that names it, for the error.

    Raises:
        UserError: It is a folder, or its own folder cannot be made or written to.
    """
    if path.is_dir():
        raise UserError(f"{option} {path}: that is a folder. Name a file in it.")
    require_folder(path.parent, option)
