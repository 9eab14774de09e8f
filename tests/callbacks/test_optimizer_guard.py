"""OptimizerGuard: exactly one group for what trains, none for what is frozen."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient.callbacks import OptimizerGuard
from lightning_efficient.callbacks.optimizer_guard import check_optimizers

# Lightning 2.6 calls a torch function that torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")


def net(depth: int = 2) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth)))


def test_a_full_optimizer_passes() -> None:
    module = net()

    check_optimizers(module, [SGD(module.parameters(), lr=0.1)])


def test_several_optimizers_may_split_the_parameters() -> None:
    module = net()

    check_optimizers(module, [SGD(module[0].parameters(), lr=0.1), SGD(module[1].parameters(), lr=0.1)])


def test_a_frozen_parameter_outside_passes() -> None:
    module = net()
    module[0].requires_grad_(False)

    check_optimizers(module, [SGD(module[1].parameters(), lr=0.1)])


def test_tied_parameters_count_once() -> None:
    module = net()
    module[1].weight = module[0].weight

    check_optimizers(module, [SGD(module.parameters(), lr=0.1)])


def test_missing_parameters_are_named_up_to_five() -> None:
    module = net(4)

    with pytest.raises(MisconfigurationException, match="8 parameters are trainable but in no optimizer") as error:
        check_optimizers(module, [SGD([nn.Parameter(torch.zeros(1))], lr=0.1)])

    assert "(0.weight, 0.bias, 1.weight, 1.bias, 2.weight, and 3 more)" in str(error.value)
    assert "configure_optimizers" in str(error.value)


def test_a_frozen_parameter_in_an_optimizer_is_an_error() -> None:
    module = net()
    module[0].weight.requires_grad_(False)

    with pytest.raises(MisconfigurationException, match=r"1 parameter is frozen but in an optimizer.*\(0\.weight\)"):
        check_optimizers(module, [SGD(module.parameters(), lr=0.1)])


def test_a_parameter_of_two_optimizers_is_an_error() -> None:
    module = net()
    optimizers = [SGD(module.parameters(), lr=0.1), SGD([module[1].bias], lr=0.1)]

    with pytest.raises(MisconfigurationException, match=r"more than one optimizer group.*\(1\.bias\)"):
        check_optimizers(module, optimizers)


def test_all_faults_are_told_at_once() -> None:
    module = net()
    module[0].weight.requires_grad_(False)

    with pytest.raises(MisconfigurationException, match=r"in no optimizer.*frozen but in an optimizer"):
        check_optimizers(module, [SGD([module[0].weight, module[0].bias, module[1].bias], lr=0.1)])


def test_a_tensor_left_over_from_a_replaced_module_is_warned_about() -> None:
    module = net()
    optimizer = SGD([*module.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1)

    with pytest.warns(UserWarning, match="1 tensors in the optimizers are not parameters of Sequential"):
        check_optimizers(module, [optimizer])


# Importing torch.distributed.optim warns about torch.jit, which torch itself uses there.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_zero_redundancy_optimizer_counts_as_holding_all(tmp_path: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        module = net()
        check_optimizers(module, [ZeroRedundancyOptimizer(module.parameters(), SGD, lr=0.1)])
        with pytest.raises(MisconfigurationException, match=r"1\.weight"):
            check_optimizers(module, [ZeroRedundancyOptimizer(module[0].parameters(), SGD, lr=0.1)])
    finally:
        dist.destroy_process_group()


class Model(pl.LightningModule):
    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.net = net()

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        loss = self.net(batch[0]).square().mean()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SGD(self.parameters(), lr=0.1)


class LateAdapter(pl.Callback):
    """Adds a module after the optimizer was built: the fault the guard is for."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.adapter = nn.Linear(3, 3)


def fit(model: Model, *callbacks: pl.Callback) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(2, 3)), batch_size=2))


@pytest.mark.parametrize("manual", [False, True])
def test_the_guard_checks_a_real_fit_and_counts_what_it_checked(manual: bool) -> None:
    guard = OptimizerGuard()

    fit(Model(manual=manual), guard)

    assert (guard.stats.checks, guard.stats.trainable, guard.stats.elements, guard.stats.frozen) == (1, 4, 24, 0)


def test_an_adapter_added_too_late_stops_the_fit_before_its_first_step() -> None:
    model = Model()
    before = model.net[0].weight.clone()

    with pytest.raises(MisconfigurationException, match=r"adapter\.weight, adapter\.bias"):
        fit(model, LateAdapter(), OptimizerGuard())

    assert torch.equal(model.net[0].weight, before)
