"""What two ranks do and report for one row of the table; the tests beside this file judge it.

One start of two processes costs more than all the tiny trainings in it, so several share a start.
"""

import gc
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.plugins.table import ROWS, Row, Setting
from tests.plugins.tiny import BATCHES, TinyData, TinyModule, flat_weights
from tests.support.trainers import make_trainer

EPOCHS = 2


@dataclass(frozen=True)
class Training:
    """One rank's training in the row's own setting, and final weights in each oracle's."""

    losses: list[float]
    moved: float
    activity: float
    activity_before: float
    weights: Tensor
    in_oracles: dict[str, Tensor]
    hooks_left: list[str]
    ddp_left: bool
    threads_left: list[str]


def train(rank: int, world_size: int, name: str) -> Training:
    row = ROWS[name]
    in_oracles = {
        key: _fit(world_size, oracle, module=row.module, max_epochs=EPOCHS)[0] for key, oracle in row.oracles.items()
    }
    threads = set(threading.enumerate())
    module, at_start = row.module(row.optimizer), _AtStart()
    args = row.trainer()
    trainer = make_trainer(world_size, max_epochs=10, **{**args, "callbacks": [*args.get("callbacks", []), at_start]})
    before = row.activity(trainer)
    trainer.fit(module, TinyData())
    assert at_start.start is not None
    return Training(
        losses=module.losses,
        moved=float((flat_weights(module).double() - at_start.start).norm()),
        activity=row.activity(trainer),
        activity_before=before,
        weights=flat_weights(module),
        in_oracles={key: flat_weights(each) for key, each in in_oracles.items()},
        hooks_left=_hooks(module),
        ddp_left=at_start.alive(),
        threads_left=[t.name for t in set(threading.enumerate()) - threads],
    )


@dataclass(frozen=True)
class State:
    """One rank's final weights of `EPOCHS` epochs: in one go, stopped and resumed after the first, in two fits."""

    in_one_go: Tensor
    resumed: Tensor
    in_two_fits: Tensor
    steps_resumed: int
    checkpoint_keys: set[str]


def stop_and_go_on(rank: int, world_size: int, name: str, folder: str) -> State:
    row = ROWS[name]
    in_one_go, _ = _fit(world_size, row, module=row.module, max_epochs=EPOCHS)

    args = row.trainer()
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    args["callbacks"] = [*args.get("callbacks", []), saver]
    twice, trainer = _fit(
        world_size, row, module=row.module, trainer_args=args, enable_checkpointing=True, max_epochs=1
    )
    trainer.fit_loop.max_epochs = EPOCHS
    trainer.fit(twice, TinyData())

    path = Path(folder) / "epoch=0.ckpt"
    resumed, _ = _fit(world_size, row, module=row.module, ckpt_path=str(path), max_epochs=EPOCHS)
    return State(
        in_one_go=flat_weights(in_one_go),
        resumed=flat_weights(resumed),
        in_two_fits=flat_weights(twice),
        steps_resumed=len(resumed.losses),
        checkpoint_keys=set(torch.load(path, weights_only=True)),
    )


@dataclass(frozen=True)
class Modes:
    """One rank's results of the other ways to use a Trainer."""

    big_batch: Tensor
    accumulated: Tensor
    bf16_losses: list[float]
    bf16_weights: Tensor
    bf16_dtypes: set[torch.dtype]
    val_loss: float
    val_loss_plain: float
    predicted: Tensor
    predicted_plain: Tensor


def other_modes(rank: int, world_size: int, name: str) -> Modes:
    row = ROWS[name]
    module = row.module
    big, _ = _fit(world_size, row, module=module, max_epochs=EPOCHS)
    small, _ = _fit(
        world_size, row, TinyData(accumulate=2), module=module, max_epochs=EPOCHS, accumulate_grad_batches=2
    )
    bf16, _ = _fit(world_size, row, module=module, max_epochs=10, precision="bf16-mixed")
    plain: dict[str, Any] = {"strategy": "ddp"}
    plain.update({name: each for name, each in row.trainer().items() if name == "precision"})
    return Modes(
        big_batch=flat_weights(big),
        accumulated=flat_weights(small),
        bf16_losses=bf16.losses,
        bf16_weights=flat_weights(bf16),
        bf16_dtypes={p.dtype for p in bf16.parameters()},
        val_loss=_validate(world_size, row, row.trainer()),
        val_loss_plain=_validate(world_size, row, plain),
        predicted=_predict(world_size, row, row.trainer()),
        predicted_plain=_predict(world_size, row, plain),
    )


def _fit(
    world_size: int,
    setting: Setting,
    data: TinyData | None = None,
    *,
    module: type[TinyModule],
    trainer_args: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    **kwargs: Any,
) -> tuple[TinyModule, Trainer]:
    trained = module(setting.optimizer)
    if "precision" not in kwargs:  # a checkpoint is restored before the Trainer converts the module to float64
        trained.double()
    trainer = make_trainer(world_size, **{**(trainer_args or setting.trainer()), **kwargs})
    trainer.fit(trained, data or TinyData(), ckpt_path=ckpt_path)
    assert trainer.global_step == BATCHES * kwargs["max_epochs"]
    return trained, trainer


def _validate(world_size: int, row: Row, args: dict[str, Any]) -> float:
    (metrics,) = make_trainer(world_size, **args).validate(row.module(row.optimizer), TinyData(), verbose=False)
    return float(metrics["val_loss"])


def _predict(world_size: int, row: Row, args: dict[str, Any]) -> Tensor:
    predicted = make_trainer(world_size, **args).predict(row.module(row.optimizer), TinyData())
    return torch.cat(predicted)  # type: ignore[arg-type]


class _AtStart(Callback):
    """Watches a DDP wrapper without keeping it alive, and keeps the weights that training starts from."""

    def __init__(self) -> None:
        self._ref: weakref.ref[nn.Module] | None = None
        self.start: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            self._ref = weakref.ref(trainer.strategy.model)
        else:
            assert trainer.strategy.model is pl_module
        self.start = flat_weights(pl_module).double()

    def alive(self) -> bool:
        gc.collect()
        assert self.start is not None, "fit never started"
        return self._ref is not None and self._ref() is not None


_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _hooks(module: nn.Module) -> list[str]:
    """Where hooks are registered (torch lists them nowhere in public)."""
    on_modules = [f"{n}.{kind}" for n, m in module.named_modules() for kind in _MODULE_HOOKS if getattr(m, kind)]
    on_tensors = [f"{n}.{kind}" for n, p in module.named_parameters() for kind in _TENSOR_HOOKS if getattr(p, kind)]
    return on_modules + on_tensors
