"""Choose A from the first training batches, and leave no trace of that in what trains afterwards."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_efficient import _compat
from lightning_efficient.lora_fa import LoRAFAConfig, calibrate
from lightning_efficient.lora_fa.inject import adapted_layers


def choose_directions(
    trainer: pl.Trainer, pl_module: pl.LightningModule, backbone: nn.Module, config: LoRAFAConfig, batches: int
) -> None:
    """Replace every A by the directions that ``config.init`` finds in the first batches of each rank.

    The module's ``training_step`` runs on them, in eval mode, twice; all ranks get the same A.

    Raises:
        RuntimeError: layers are sharded, optimization is manual, the training data is empty, or training_step returns
            no loss where one is needed.
    """
    method: Any = config.init
    _check(pl_module, backbone, config)
    try:
        with isolate_rng(), _evaluating(pl_module):
            first = _first_batches(trainer, batches)
            if not first:
                raise RuntimeError(f"init={method!r} needs a batch, and the training data has none.")
            calibrate(
                backbone,
                partial(_run, trainer, pl_module, first, backward=method == "gradient"),
                method=method,
                seed=config.seed,
                reduce=lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"),
            )
    finally:
        for parameter in pl_module.parameters():
            parameter.grad = None
    with torch.no_grad():  # equal sums can still turn into different bits on different machines
        for layer in adapted_layers(backbone).values():
            for down in layer.lora_A.values():
                # From the CPU: each rank would unpickle a CUDA tensor on the sender's GPU.
                down.weight.copy_(trainer.strategy.broadcast(down.weight.cpu()))


def _check(pl_module: pl.LightningModule, backbone: nn.Module, config: LoRAFAConfig) -> None:
    if any(hasattr(p, "full_tensor") for p in backbone.parameters()):
        raise RuntimeError(
            f"init={config.init!r} needs whole layers, and they are sharded. Calibrate on one process, export the "
            "adapter and load it with load_peft, or use init='orthogonal'."
        )
    if not pl_module.automatic_optimization:
        raise RuntimeError(
            f"init={config.init!r} runs training_step before training, and with manual optimization that would train. "
            "Call lightning_efficient.lora_fa.calibrate yourself, or use init='orthogonal'."
        )


def _first_batches(trainer: pl.Trainer, count: int) -> list[Any]:
    loaders = _compat.training_batches(trainer)
    for loader in loaders.flattened:
        data = loader.dataset if isinstance(loader, DataLoader) else loader
        if iter(data) is data if isinstance(data, Iterable) else False:
            raise RuntimeError(
                f"The training data ({type(data).__name__}) can be read only once, and choosing A would use up its "
                "first batches. Let its __iter__ start anew, or use init='orthogonal'."
            )
    with _generators_kept(loaders.flattened):
        return [batch for (batch, _, _), _ in zip(loaders, range(count), strict=False)]


def _run(trainer: pl.Trainer, pl_module: pl.LightningModule, batches: list[Any], backward: bool) -> None:
    for index, batch in enumerate(batches):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = _compat.before_batch_transfer(pl_module, batch)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        with_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
        with trainer.precision_plugin.train_step_context(), torch.set_grad_enabled(backward):
            loss = pl_module.training_step(batch, index) if with_index else pl_module.training_step(batch)
        if backward:
            value = loss["loss"] if isinstance(loss, dict) else loss
            if not isinstance(value, Tensor):
                raise RuntimeError(
                    "init='gradient' needs a training_step that returns the loss. Use init='eva' or 'orthogonal'."
                )
            value.backward()


@contextmanager
def _evaluating(pl_module: pl.LightningModule) -> Iterator[None]:
    """Without dropout, and with nothing logged: `self.log` works in the Trainer's loops only."""
    modes = {each: each.training for each in pl_module.modules()}
    silent = dict.fromkeys(("log", "log_dict"), _nothing)
    pl_module.eval()
    pl_module.__dict__.update(silent)
    try:
        yield
    finally:
        for name in silent:
            del pl_module.__dict__[name]
        for each, training in modes.items():
            each.training = training
            if isinstance(each, Metric):
                each.reset()


@contextmanager
def _generators_kept(loaders: list[Any]) -> Iterator[None]:
    """Generators that loaders and samplers were given, which no seed of the process governs."""
    owners = [each for loader in loaders for each in (loader, getattr(loader, "sampler", None))]
    found = [each for each in (getattr(owner, "generator", None) for owner in owners) if each is not None]
    states = [each.get_state() for each in found]
    try:
        yield
    finally:
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
