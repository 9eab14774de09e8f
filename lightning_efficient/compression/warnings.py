"""Warnings that are said once per process."""

import warnings

_said: set[str] = set()


def warn_once(message: str) -> None:
    """Warn with ``message`` the first time it comes up in this process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)


def forget_warnings() -> None:
    """Let every message be said again; for tests."""
    _said.clear()
