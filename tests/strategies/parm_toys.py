"""A tiny mixture of experts to train under ParmStrategy, and the same training in one process, in plain torch.

Everything is float64: sums in another order over a few steps differ by some 1e-15, a wrong gradient rule by 1e-3.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_efficient.moe import MoELayer, aux_loss, balance_loads
from lightning_efficient.strategies import ParmStrategy
from tests.support.trainers import make_trainer

BATCHES, ROWS, TOKENS, DIM, EXPERTS, HIDDEN = 6, 8, 3, 8, 4, 16
TOLERANCE = 1e-10

Batch = tuple[Tensor, Tensor]
Sizes = tuple[int, int, int]


def momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.2, momentum=0.9)


class MoEModule(pl.LightningModule):
    """Two MoE layers between dense ones, built in `configure_model`.

    Args:
        seed: of the weights.
        optimizer: makes it of the module.
        on_meta: build the layers without memory.
        dropout: after the first layer.
        experts: E.
        **moe: of the MoE layers.
    """

    net: nn.Sequential

    def __init__(
        self,
        seed: int = 0,
        *,
        optimizer: Callable[[nn.Module], Optimizer] = lambda module: momentum(module.parameters()),
        on_meta: bool = False,
        dropout: float = 0.0,
        experts: int = EXPERTS,
        **moe: Any,
    ) -> None:
        super().__init__()
        self.seed, self.make_optimizer, self.on_meta, self.dropout = seed, optimizer, on_meta, dropout
        self.experts = experts
        self.moe = {"capacity_factor": None, "bias": True, "activation": "gelu", **moe}
        self.losses: list[float] = []
        self.dtype_of_weights = torch.float64
        self.register_buffer("steps", torch.tensor(1000 * seed))

    @override
    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        with torch.random.fork_rng(), torch.device("meta") if self.on_meta else nullcontext():
            torch.manual_seed(self.seed)
            self.net = nn.Sequential(
                nn.Linear(DIM, DIM),
                MoELayer(DIM, HIDDEN, self.experts, **self.moe),
                nn.Dropout(self.dropout),
                nn.Linear(DIM, DIM),
                MoELayer(DIM, HIDDEN, self.experts, **self.moe),
                nn.Linear(DIM, DIM),
            ).to(self.dtype_of_weights)

    def loss(self, batch: Batch) -> Tensor:
        x, y = (each.to(self.net[0].weight.dtype) for each in batch)  # type: ignore[union-attr]
        return F.mse_loss(self.net(x), y) + aux_loss(self)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.steps += 1
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if not isinstance(self.trainer.strategy, ParmStrategy):
            balance_loads(self)

    @override
    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self)


def joint_batches() -> list[Batch]:
    """What all data-parallel ranks see together, (ROWS, TOKENS, DIM) each."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(BATCHES, ROWS, TOKENS, DIM, generator=generator, dtype=torch.float64)
    y = (x.roll(1, -1).tanh() + x.abs()).detach()
    return list(zip(x, y, strict=True))


def share(batch: Batch, rank: int, ranks: int) -> Batch:
    x, y = batch
    return x[rank::ranks], y[rank::ranks]


class Data(pl.LightningDataModule):
    """Each data-parallel rank's share of the joint batches, some left out at the start.

    Args:
        skip: so many joint batches.
        drop: this rank's last batches.
    """

    def __init__(self, *, skip: int = 0, drop: int = 0) -> None:
        super().__init__()
        self.skip, self.drop = skip, drop

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        told = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        rank, ranks = told["rank"], told["num_replicas"]
        shares = [share(batch, rank, ranks) for batch in joint_batches()[self.skip : BATCHES - self.drop]]
        dataset = TensorDataset(torch.cat([x for x, _ in shares]), torch.cat([y for _, y in shares]))
        return DataLoader(dataset, batch_size=ROWS // ranks)


def parm(sizes: Sizes, **kwargs: Any) -> ParmStrategy:
    """A strategy that measures nothing, unless told to."""
    return ParmStrategy(*sizes, **{"schedule": "s1_hier/1", **kwargs})


def fit(
    world_size: int,
    strategy: Any,
    module: pl.LightningModule | None = None,
    *,
    data: Data | None = None,
    ckpt_path: str | None = None,
    **trainer_kwargs: Any,
) -> tuple[Any, pl.Trainer]:
    """Train for an epoch."""
    module = MoEModule() if module is None else module
    trainer = make_trainer(world_size, strategy=strategy, **{"precision": "32-true", "max_epochs": 1, **trainer_kwargs})
    trainer.fit(module, data or Data(), ckpt_path=ckpt_path)
    return module, trainer


def message_of(*args: Any, **kwargs: Any) -> str:
    """Fit and return type and text of the error that it ends with."""
    try:
        fit(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """All of them whole, on every rank."""
    return {name: whole(each) for name, each in module.state_dict().items()}


def train_alone(
    data_ranks: int,
    *,
    clip: float | None = None,
    clip_value: float | None = None,
    accumulate: int = 1,
    module: MoEModule | None = None,
) -> MoEModule:
    """Train in one process, on the same batches: the loss is the mean over the data-parallel ranks' own."""
    module = MoEModule() if module is None else module
    module.configure_model()
    optimizer = module.configure_optimizers()
    for number, batch in enumerate(joint_batches(), start=1):
        losses = [module.loss(share(batch, rank, data_ranks)) for rank in range(data_ranks)]
        module.losses.append(sum(each.item() for each in losses) / data_ranks)
        for loss in losses:
            (loss / data_ranks / accumulate).backward()
        module.steps += 1
        if number % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            if clip_value is not None:
                nn.utils.clip_grad_value_(module.parameters(), clip_value)
            optimizer.step()
            balance_loads(module)
            optimizer.zero_grad()
    return module


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference over all tensors, which must have the same names and shapes."""
    assert actual.keys() == expected.keys()
    assert all(actual[name].shape == expected[name].shape for name in expected)
    return max(float((actual[name].double() - expected[name].double()).abs().max()) for name in expected)
