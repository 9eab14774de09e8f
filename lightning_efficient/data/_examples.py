"""What a split of data is: items held in memory, an order for training, and a gather that makes a batch.

Dimension letters: B batch, T block length (tokens), N tokens in the split, I items in the split.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Batch: TypeAlias = "dict[str, Tensor] | tuple[Tensor, Tensor]"


def seeded_generator(seed: int, *labels: str | int) -> torch.Generator:
    """Return a CPU generator that depends on ``(seed, *labels)`` only, never on the global random state.

    The seed and the labels are hashed, so that neighbouring seeds and epochs share no stream (``seed + epoch`` would
    make epoch 1 of seed 0 the same as epoch 0 of seed 1).
    """
    digest = hashlib.sha256("/".join(str(part) for part in (seed, *labels)).encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Examples(Protocol):
    """A split: ``num_items`` items, each named by one integer."""

    @property
    def num_items(self) -> int:
        """Items in one pass; the same in every epoch."""

    def items(self) -> Tensor:
        """Return the items in reading order, (I,) int64, for evaluation."""

    def shuffled_items(self, generator: torch.Generator) -> Tensor:
        """Return the items in a training order, (I,) int64, that depends on ``generator`` only."""

    def batch(self, items_B: Tensor) -> Batch:
        """Gather the items into a batch."""


@dataclass(frozen=True)
class TokenBlocks:
    """A token stream ``tokens`` (N,) cut into blocks of ``block_size``; an item is the position where its block starts.

    Evaluation reads the blocks one after another from the first token; a last piece shorter than a block is left out.
    Training shifts the grid of blocks by a random phase each epoch and visits the blocks in a random order, so that an
    epoch reads each token about once and block borders differ from epoch to epoch.
    """

    tokens: Tensor
    block_size: int

    @property
    def num_items(self) -> int:
        """Blocks in one pass. One fewer than fit where that leaves room for every phase."""
        return max(1, (len(self.tokens) - self.block_size) // self.block_size)

    def items(self) -> Tensor:
        """Return the starts of all blocks that fit, without overlap."""
        last_start = len(self.tokens) - 1 - self.block_size
        return torch.arange(0, last_start + 1, self.block_size, device="cpu")

    def shuffled_items(self, generator: torch.Generator) -> Tensor:
        """Return the starts of one epoch's blocks: a random phase, then a random order."""
        room = len(self.tokens) - 1 - self.num_items * self.block_size
        phase = torch.randint(room + 1, (), generator=generator, device="cpu")
        return phase + self.block_size * torch.randperm(self.num_items, generator=generator, device="cpu")

    def batch(self, items_B: Tensor) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``labels``, both (B, T) int64; a label is the token that comes next."""
        window_BT1 = self.tokens[items_B[:, None] + torch.arange(self.block_size + 1, device="cpu")].long()
        return {"input_ids": window_BT1[:, :-1].contiguous(), "labels": window_BT1[:, 1:].contiguous()}


@dataclass(frozen=True)
class LabelledTensors:
    """Inputs (I, ...) with one label each (I,); an item is a row."""

    inputs: Tensor
    labels: Tensor

    @property
    def num_items(self) -> int:
        """Rows."""
        return len(self.labels)

    def items(self) -> Tensor:
        """Return all rows in order."""
        return torch.arange(self.num_items, device="cpu")

    def shuffled_items(self, generator: torch.Generator) -> Tensor:
        """Return a random permutation of the rows."""
        return torch.randperm(self.num_items, generator=generator, device="cpu")

    def batch(self, items_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(inputs (B, ...), labels (B,))``."""
        return self.inputs[items_B], self.labels[items_B]
