"""Data to train on without a download: seeded, sharded over ranks, and exact on resume."""

from lightning_efficient.data.digits import DigitsData
from lightning_efficient.data.synthetic import SyntheticTokens
from lightning_efficient.data.text import TextData

__all__ = ["DigitsData", "SyntheticTokens", "TextData"]
