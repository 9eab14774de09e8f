"""What the tests of `Dissect` train: a module with a few switches, and batches of several kinds."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_efficient.callbacks import Dissect
from lightning_efficient.dissect import DissectReport
from tests.support.trainers import make_trainer

SIZE, ROWS = 8, 4
SHORT: dict[str, Any] = {"warmup": 1, "clean": 3, "dissect": 2, "memory": 1, "print_report": False}
NEEDED = 7


class Toy(pl.LightningModule):
    """Two blocks with dropout; `Validated` is one that has validation, too.

    Args:
        checkpointed: whether the blocks are computed twice.
    """

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.losses: list[float] = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = block(), block()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def loss(self, batch: Any) -> Tensor:
        x = batch.to(self.dtype)
        for each in (self.first, self.second):
            x = checkpoint(each, x, use_reentrant=False) if self.checkpointed else each(x)
        loss: Tensor = x.float().square().mean()
        return loss

    @override
    def configure_optimizers(self) -> Any:
        return Adam(self.parameters(), lr=0.01)


class Validated(Toy):
    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.first(batch.to(self.dtype))


class Rivals(pl.LightningModule):
    """Two nets, each with its own optimizer, which the module calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 1)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        for number, optimizer in enumerate(self.optimizers()):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(self.judge(self.maker(batch)).mean() * (-1) ** number)
            optimizer.step()

    @override
    def configure_optimizers(self) -> Any:
        return [SGD(self.maker.parameters(), lr=0.01), SGD(self.judge.parameters(), lr=0.01)]


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(SIZE, SIZE))


class Rows(Dataset[Tensor]):
    def __init__(self, length: int) -> None:
        self.data = torch.randn(length, SIZE, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]


class Batches:
    """An iterable that is no DataLoader."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(Rows(self.batches * ROWS).data.split(ROWS))


def batches(count: int) -> DataLoader[Tensor]:
    return DataLoader(Rows(count * ROWS), batch_size=ROWS)


def fit(
    module: pl.LightningModule, callback: Any = None, data: Any = None, *, val: Any = None, **kwargs: Any
) -> pl.Trainer:
    """Train on twenty batches, with the callback if there is one.

    Args:
        module: what trains.
        callback: a `Dissect`, or a list of callbacks.
        data: batches; default: twenty.
        val: batches to validate on.
        **kwargs: of the Trainer.
    """
    callbacks = callback if isinstance(callback, list) else [callback] if callback is not None else []
    trainer = make_trainer(1, **{"precision": 32, "max_epochs": 1, "callbacks": callbacks, **kwargs})
    torch.manual_seed(3)
    trainer.fit(module, batches(20) if data is None else data, val)
    return trainer


def dissected(tmp_path: Any, module: pl.LightningModule | None = None, **kwargs: Any) -> DissectReport:
    """The report of a fit; words of `Dissect` go to it, others to `fit`."""
    own = {key: kwargs.pop(key) for key in list(kwargs) if key in (*SHORT, "tokens_fn", "peak_flops")}
    callback = Dissect(**{**SHORT, **own}, out=str(tmp_path))
    fit(module or Toy(), callback, **kwargs)
    assert callback.report is not None
    return callback.report


def hooks_left(module: nn.Module) -> list[str]:
    return [
        f"{name}.{kind}"
        for name, each in module.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if getattr(each, kind)
    ]
