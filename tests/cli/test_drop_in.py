"""One line puts an optimizer to work: stock LightningCLI, ours and a plain PyTorch loop train the same weights."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient.cli import EfficientCLI
from lightning_efficient.optimizers import Eva
from tests.support.trainers import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended to run from within Python")

EPOCHS, ROWS, FEATURES, CLASSES = 2, 12, 6, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "published": {},
    "Eva-f beside AdamW": {
        "variant": "eva_f",
        "lr": 0.02,
        "kv_samples": None,
        "g_scale": "expectation",
        "rescale": "clip",
        "weight_decay": 0.01,
        "fallback": "adamw",
        "fallback_lr": 0.003,
    },
    "Eva-s": {"variant": "eva_s", "damping": 1e-6},
}


class Classifier(pl.LightningModule):
    """A module as users have it, without an optimizer: layers, and a norm that has no Kronecker vectors."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(FEATURES, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, CLASSES))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class OfRecipes(Classifier):
    """The same as the recipes want it: the optimizer is an argument."""

    def __init__(self, optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3)) -> None:
        super().__init__()
        self.make_optimizer = optimizer

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(5 * ROWS, FEATURES, generator=generator, dtype=torch.float64)
        return DataLoader(TensorDataset(x, x[:, :CLASSES].argmax(-1)), batch_size=ROWS)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def by_hand(init_args: dict[str, Any]) -> Tensor:
    module = Classifier().double()
    optimizer = Eva(module.parameters(), **init_args).attach(module)
    for _ in range(EPOCHS):
        for batch in Data().train_dataloader():
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
    return weights(module)


def write(path: Path, **sections: Any) -> str:
    trainer = {**QUIET, "max_epochs": EPOCHS, **sections.pop("trainer", {})}
    path.write_text(yaml.safe_dump({"trainer": trainer, **sections}))
    return str(path)


@pytest.mark.parametrize("name", SETTINGS)
def test_both_command_lines_and_a_plain_loop_train_the_same_weights(name: str, workplace: Path) -> None:
    optimizer = {"class_path": "lightning_efficient.optimizers.Eva", "init_args": SETTINGS[name]}
    callback = {"class_path": "lightning_efficient.callbacks.AttachOptimizer"}
    stock = write(workplace / "stock.yaml", trainer={"callbacks": [callback]}, optimizer=optimizer)
    ours = write(
        workplace / "ours.yaml",
        model={"class_path": "tests.cli.test_drop_in.OfRecipes", "init_args": {"optimizer": optimizer}},
        data={"class_path": "tests.cli.test_drop_in.Data"},
    )

    by_stock = LightningCLI(
        Classifier, Data, save_config_callback=None, seed_everything_default=0, args=["fit", "--config", stock]
    )
    by_ours = EfficientCLI(args=["fit", "-c", ours])

    expected = by_hand(SETTINGS[name])
    assert torch.equal(weights(by_stock.model), expected)
    assert torch.equal(weights(by_ours.model), expected)
    assert not torch.equal(expected, weights(Classifier().double()))
