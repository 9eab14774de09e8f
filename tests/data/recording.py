"""A model that remembers which batches it was trained on, and a short stream to train it on."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_efficient.data import SyntheticTokens


class Recorder(LightningModule):
    """Logistic regression of a token on the one before; `seen` holds the batches trained on, in order."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(vocab_size, vocab_size)
        self.seen: list[list[list[int]]] = []

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(
            self.table(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"].tolist())
        return self._loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def short_stream(*, batch_size: int = 2, num_items: int = 10, seed: int = 0) -> SyntheticTokens:
    """`num_items` training blocks of 4 tokens, which can be told apart."""
    tokens = 4 * (num_items + 1)
    return SyntheticTokens(
        50, 4, batch_size=batch_size, noise=1.0, num_train_tokens=tokens, num_val_tokens=33, seed=seed
    )


def trainer(folder: Any, **kwargs: Any) -> Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet}
    return Trainer(**(defaults | kwargs))
