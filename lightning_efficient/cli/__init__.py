"""The command line: `lightning-efficient fit|validate|test|predict|recipes|doctor|compression`."""

from typing import TYPE_CHECKING, Any

from lightning_efficient.cli.main import main

if TYPE_CHECKING:
    from lightning_efficient.cli.efficient_cli import EfficientCLI

__all__ = ["EfficientCLI", "main"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `recipes list` does not import every model.
    if name == "EfficientCLI":
        from lightning_efficient.cli.efficient_cli import EfficientCLI

        return EfficientCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
