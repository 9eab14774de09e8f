"""Handwritten digits, 8x8 pixels, from scikit-learn's own package: a vision task without a download."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_efficient.data._examples import LabelledTensors, seeded_generator
from lightning_efficient.data._module import InMemoryDataModule, Splits, require_fractions


class DigitsData(InMemoryDataModule):
    """The 1797 images of ``sklearn.datasets.load_digits`` with their labels 0 to 9, split by class.

    Batches are ``(images, labels)``: float32 (B, 1, 8, 8), or (B, 64) with ``flat``, grey values in [0, 1]; int64 (B,).

    Args:
        batch_size: images per process and batch.
        flat: rows of 64 values instead of images.
        val_fraction: part of every class for validation, in (0, 1).
        test_fraction: part of every class for testing, in [0, 1 - val_fraction).
        seed: decides the split and the order.

    Raises:
        ValueError: an argument is out of range.
        ModuleNotFoundError: scikit-learn is not installed (when the data is first needed).
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        flat: bool = False,
        *,
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        require_fractions(val_fraction, test_fraction)
        self.flat = flat
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    @override
    def make_splits(self) -> Splits:
        """Load the images and split each class in the same proportions."""
        images, labels = load_digits()
        inputs = images.flatten(1) if self.flat else images.unsqueeze(1)
        train, val, test = stratified_split(labels, (self.val_fraction, self.test_fraction), seed=self.seed)
        return Splits(
            LabelledTensors(inputs[train], labels[train]),
            LabelledTensors(inputs[val], labels[val]),
            LabelledTensors(inputs[test], labels[test]) if self.test_fraction > 0 else None,
        )


def stratified_split(labels_I: Tensor, fractions: tuple[float, ...], *, seed: int) -> list[Tensor]:
    """Split rows so that every class appears in each part in the same proportion, to the nearest row.

    Args:
        labels_I: the class of each row, (I,).
        fractions: size of each part after the first; the first part is what remains.
        seed: decides which rows go where.

    Returns:
        ``1 + len(fractions)`` sorted tensors of row numbers that together hold every row once.
    """
    parts: list[list[Tensor]] = [[] for _ in range(1 + len(fractions))]
    for label in sorted(set(labels_I.tolist())):
        rows = (labels_I == label).nonzero().squeeze(1)
        generator = seeded_generator(seed, "split", label)
        rows = rows[torch.randperm(len(rows), generator=generator, device="cpu")]
        sizes = [round(fraction * len(rows)) for fraction in fractions]
        for part, piece in zip(parts, torch.split(rows, [len(rows) - sum(sizes), *sizes]), strict=True):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


def load_digits() -> tuple[Tensor, Tensor]:
    """Return images (1797, 8, 8) in [0, 1] and labels (1797,).

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "DigitsData needs scikit-learn, which holds the images, but it is not installed. "
            "Install it with: pip install 'lightning-efficient[data]'"
        ) from error
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32) / 16  # stored as 0 to 16
    return images, torch.from_numpy(digits.target).to(torch.int64)
