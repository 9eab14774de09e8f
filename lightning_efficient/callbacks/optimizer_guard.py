"""`OptimizerGuard`: every trainable parameter is in exactly one optimizer group, and nothing frozen is in any."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

_SHOWN = 5


@dataclass(frozen=True)
class OptimizerGuardStats:
    """What the guard has checked.

    Attributes:
        checks: Times a fit was checked.
        trainable: Trainable parameters of the last check, tied ones counted once.
        elements: Their elements.
        frozen: Frozen parameters of the last check.
    """

    checks: int = 0
    trainable: int = 0
    elements: int = 0
    frozen: int = 0


class OptimizerGuard(Callback):
    """Stops a fit that would silently not train some parameters, or train frozen ones.

    At `on_train_start`, after `configure_optimizers` and after the checkpoint is restored, each parameter with
    `requires_grad` must be in exactly one parameter group over all optimizers, and no frozen parameter may be in any.
    Adapters that a callback injects after the optimizer was built are the usual culprit: they train for hours without
    moving.

    Tied parameters count once. Several optimizers may split the parameters between them. Under DeepSpeed, whose
    optimizer holds flattened copies, nothing can be compared: the guard says so and checks nothing.

    Attributes:
        stats: What was checked, an `OptimizerGuardStats`.

    Raises:
        MisconfigurationException: At `on_train_start`, naming up to five parameters for each fault.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stats = OptimizerGuardStats()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            rank_zero_warn("OptimizerGuard checked nothing: DeepSpeed's optimizer holds flattened copies.")
            return
        check_optimizers(pl_module, trainer.optimizers)
        parameters = list(pl_module.parameters())
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        self.stats = OptimizerGuardStats(
            checks=self.stats.checks + 1,
            trainable=len(trainable),
            elements=sum(parameter.numel() for parameter in trainable),
            frozen=len(parameters) - len(trainable),
        )

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stats.checks:
            rank_zero_info(
                f"OptimizerGuard: {self.stats.trainable} trainable parameters ({self.stats.elements:,} elements), each "
                f"in exactly one optimizer group; {self.stats.frozen} frozen, none in any."
            )


def check_optimizers(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Check that the optimizers hold each trainable parameter of a module once, and no frozen one.

    Parameters are compared by identity, tied ones count once. A tensor in an optimizer that is no parameter of the
    module is warned about: it may be left over from before a module was replaced.

    Args:
        module: The module that is trained.
        optimizers: All its optimizers.

    Raises:
        MisconfigurationException: A parameter is missing, held twice, or held though frozen.
    """
    held = Counter(
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    )
    named = dict(module.named_parameters())
    faults = [
        _fault(
            [name for name, parameter in named.items() if parameter.requires_grad and not held[id(parameter)]],
            "trainable but in no optimizer, so they would never change",
            "Build the optimizer in configure_optimizers, from self.parameters(), after all modules exist; "
            "or freeze them with requires_grad_(False).",
        ),
        _fault(
            [name for name, parameter in named.items() if not parameter.requires_grad and held[id(parameter)]],
            "frozen but in an optimizer, which keeps them for nothing and trains them once unfrozen",
            "Give it [p for p in self.parameters() if p.requires_grad]; or unfreeze them.",
        ),
        _fault(
            [name for name, parameter in named.items() if parameter.requires_grad and held[id(parameter)] > 1],
            "in more than one optimizer group, so each step changes them several times",
            "Put each into one group of one optimizer.",
        ),
    ]
    if text := " ".join(fault for fault in faults if fault):
        raise MisconfigurationException(text)
    if strangers := len(held.keys() - {id(parameter) for parameter in named.values()}):
        rank_zero_warn(
            f"{strangers} tensors in the optimizers are not parameters of {type(module).__name__}: they may be left "
            "over from before a module was replaced. Build the optimizer after all modules exist."
        )


def _fault(names: Sequence[str], what: str, remedy: str) -> str:
    if not names:
        return ""
    return f"{len(names)} {'parameter is' if len(names) == 1 else 'parameters are'} {what} ({_some(names)}). {remedy}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
