"""The arithmetic any data-parallel strategy owes its user: many ranks equal one process on the joined batch.

Lightning's own test suite checks plumbing only: a strategy whose ranks never exchange anything passes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LEARNING_RATE, MOMENTUM = 0.1, 0.9
ROWS, FEATURES, BATCHES = 8, 6, 6

StrategyMaker = Callable[[], str | Strategy]


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to train.

    Attributes:
        accumulate: Batches per optimizer step.
        seed_by_rank: Each rank starts from weights and buffers of its own; rank 0's must win.
        unused: The model has a parameter that no loss depends on.
        precision: The Trainer's.
    """

    accumulate: int = 1
    seed_by_rank: bool = False
    unused: bool = False
    precision: Any = "64-true"


class Regression(pl.LightningModule):
    """Two layers, and a buffer that counts forward passes."""

    steps: torch.Tensor

    def __init__(self, *, seed: int, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, 3)).double()
        if unused:
            self.unused = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(1000 * seed))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.steps += 1
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def joined_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches all ranks see together, each of shape `(ROWS, FEATURES)` and `(ROWS, 3)`."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(BATCHES, ROWS, FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randn(BATCHES, ROWS, 3, generator=generator, dtype=torch.float64)
    return list(zip(x, y, strict=True))


def train_rank(
    rank: int,
    world_size: int,
    strategy: StrategyMaker,
    setting: Setting,
    model_class: type[Regression] = Regression,
) -> dict[str, torch.Tensor]:
    """Train this rank's share of every batch under a Trainer and return the final parameters and buffers."""
    shares = [(x[rank::world_size], y[rank::world_size]) for x, y in joined_batches()]
    dataset = TensorDataset(torch.cat([x for x, _ in shares]), torch.cat([y for _, y in shares]))
    model = model_class(seed=rank if setting.seed_by_rank else 0, unused=setting.unused)
    if setting.precision != "64-true":
        model = model.float()
        dataset = TensorDataset(*(t.float() for t in dataset.tensors))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy(),
        precision=setting.precision,
        max_epochs=1,
        accumulate_grad_batches=setting.accumulate,
        # Lightning's own sampler shuffles training data whatever the loader says.
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(dataset, batch_size=ROWS // world_size))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train_reference(setting: Setting) -> dict[str, torch.Tensor]:
    """The same training without Lightning, ranks or strategy: one process, the joined batches, plain torch."""
    model = Regression(seed=0, unused=setting.unused)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for number, batch in enumerate(joined_batches(), start=1):
        (model.training_step(batch, 0) / setting.accumulate).backward()
        if number % setting.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return dict(model.state_dict())


def worst_difference(result: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference over all tensors, which must have the same names."""
    assert result.keys() == reference.keys()
    return max(float((result[name].double() - reference[name].double()).abs().max()) for name in reference)
