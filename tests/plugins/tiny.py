"""A module and data small enough to train in milliseconds, the same batches on any number of ranks."""

from collections.abc import Callable, Iterator

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_efficient.moe import MoELayer

BATCHES, ROWS, FEATURES, CLASSES = 3, 16, 12, 4
"""Three steps an epoch: an odd number, so that what alternates from step to step is resumed in the other phase."""

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[Iterator[nn.Parameter]], Optimizer]


def sgd(lr: float) -> MakeOptimizer:
    """Plain SGD, which has no state: all that a checkpoint must hold is the plugin's."""
    return lambda parameters: SGD(parameters, lr=lr)


PLAIN_SGD = sgd(0.5)


class TinyModule(pl.LightningModule):
    """Three layers whose matrices are worth compressing at rank 2.

    Args:
        optimizer: Makes the optimizer, once: a second fit goes on with the first one's, as with all other state.
    """

    def __init__(self, optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.5)) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        self._make_optimizer = optimizer
        self._optimizer: Optimizer | None = None
        self.losses: list[float] = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 14), nn.Tanh(), nn.Linear(14, CLASSES)
            )

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x.to(next(self.parameters()).dtype)), y)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.net(batch[0].to(next(self.parameters()).dtype)).argmax(-1)

    @override
    def configure_optimizers(self) -> Optimizer:
        self._optimizer = self._optimizer or self._make_optimizer(self.parameters())
        return self._optimizer


class TinyMoEModule(TinyModule):
    """A layer of four experts between two dense ones; nothing is dropped, and the loss is a mean over rows."""

    def __init__(self, optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.5)) -> None:
        super().__init__(optimizer)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(FEATURES, 16),
                nn.Tanh(),
                MoELayer(16, 16, 4, capacity_factor=None, aux_loss_coef=0.0),
                nn.Linear(16, CLASSES),
            )

    @override
    def configure_model(self) -> None:
        """The strategy spreads the experts after this."""


class TinyData(pl.LightningDataModule):
    """`BATCHES` joint batches of `ROWS` rows, dealt out to the ranks.

    Args:
        accumulate: Cut each rank's share of a batch into so many.
    """

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.accumulate = accumulate

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        return loader(self.trainer.global_rank, self.trainer.world_size, self.accumulate)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def loader(rank: int, world_size: int, accumulate: int = 1) -> DataLoader[Batch]:
    """This rank's share of every joint batch."""
    shares = [share(batch, rank, world_size) for batch in joint_batches()]
    dataset = TensorDataset(torch.cat([x for x, _ in shares]), torch.cat([y for _, y in shares]))
    return DataLoader(dataset, batch_size=ROWS // world_size // accumulate)


def joint_batches() -> Iterator[Batch]:
    """What all ranks see together: `x` of shape (ROWS, FEATURES), and the class a fixed linear map gives it."""
    generator = torch.Generator().manual_seed(7)
    teacher = torch.randn(FEATURES, CLASSES, generator=generator, dtype=torch.float64)
    for _ in range(BATCHES):
        x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
        yield x, (x @ teacher).argmax(-1)


def share(batch: Batch, rank: int, world_size: int) -> Batch:
    x, y = batch
    return x[rank::world_size], y[rank::world_size]


def flat_weights(module: nn.Module) -> Tensor:
    """A copy of all parameters as one vector."""
    return torch.cat([_whole(p.detach()).flatten() for p in module.parameters()]).clone()


def _whole(tensor: Tensor) -> Tensor:
    """A collective where ranks hold parts of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
