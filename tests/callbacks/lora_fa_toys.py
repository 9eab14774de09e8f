"""A module with every kind of state that a checkpoint can hold, and ways to train it with LoRAFA."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_efficient.callbacks import LoRAFA
from tests.support.trainers import make_trainer

FEATURES, WIDTH, CLASSES, ROWS, STEPS = 10, 12, 3, 8, 8

ADAPTERS = {f"model.{i}.lora_{half}.default.weight" for i in (1, 3) for half in "AB"}
HEAD = {"head.weight", "head.bias"}
BUFFERS = {"model.2.running_mean", "model.2.running_var", "model.2.num_batches_tracked"}


def backbone(seed: int = 0) -> nn.Sequential:
    """Embedding-like first layer, two linears, a BatchNorm between them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.LayerNorm(FEATURES), nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        )


class Toy(pl.LightningModule):
    """A pretrained backbone in `model` and a new head beside it.

    Args:
        base_seed: decides the pretrained weights.
        fault: called in each training step.
    """

    def __init__(self, base_seed: int = 0, fault: Callable[["Toy"], None] = lambda toy: None) -> None:
        super().__init__()
        self.fault, self.losses, self.first_entries = fault, [], []
        self.model: Any = backbone(base_seed)
        with torch.random.fork_rng():
            torch.manual_seed(9)
            self.head = nn.Linear(WIDTH, CLASSES)

    @override
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.model(x.to(self.head.weight.dtype)))
        return out

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]).float(), batch[1])

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.fault(self)
        loss = self.loss(batch)
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        self.first_entries.append(float(batch[0].detach().flatten()[0]))
        return loss

    @override
    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), lr=0.02, eps=1e-5)  # float16 has no 1e-8


class EvalToy(Toy):
    """Can be validated, tested and asked too."""

    @override
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    @override
    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    @override
    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])


class LazyToy(Toy):
    """Builds its backbone in configure_model, as large models do."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = None

    @override
    def configure_model(self) -> None:
        if self.model is None:
            self.model = backbone()


def batches(steps: int = STEPS, shuffle: bool = False, **kwargs: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(steps * ROWS, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (steps * ROWS,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=ROWS, shuffle=shuffle, **kwargs)


def lora(**kwargs: Any) -> LoRAFA:
    return LoRAFA(**{"r": 3, "alpha": 6.0, **kwargs})


def fit(
    module: pl.LightningModule, *callbacks: Callback, ckpt_path: Any = None, loader: Any = None, **kwargs: Any
) -> pl.Trainer:
    """Train on one process in float32, one epoch of `STEPS` unless told otherwise."""
    trainer = make_trainer(1, callbacks=list(callbacks), **{"precision": "32-true", "max_epochs": 1, **kwargs})
    validating = batches(2) if isinstance(module, EvalToy) else None
    trainer.fit(module, batches() if loader is None else loader, validating, ckpt_path=ckpt_path)
    return trainer


def tensors(module: nn.Module, *kinds: str) -> dict[str, Tensor]:
    """Copies of the parameters whose names hold one of `kinds`; of all without any."""
    named: Iterator[tuple[str, Tensor]] = module.named_parameters()
    return {name: p.detach().clone() for name, p in named if not kinds or any(kind in name for kind in kinds)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())


def hooks_left(module: nn.Module) -> list[str]:
    """Where hooks of any kind are registered."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    kinds += ("_load_state_dict_post_hooks",)
    return [f"{name}.{kind}" for name, each in module.named_modules() for kind in kinds if getattr(each, kind)]
