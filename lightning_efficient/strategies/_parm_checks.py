"""What `ParmStrategy` refuses before it costs time, because it would hang or fail in the middle of a step."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.optim import Optimizer

from lightning_efficient.moe import MoETopology
from lightning_efficient.moe.agreement import every_rank_has
from lightning_efficient.moe.parameter_groups import kind_of


def refuse_scaler(precision_plugin: Any) -> None:
    """Refuse precisions that scale losses.

    Raises:
        ValueError: the plugin has a scaler.
    """
    if getattr(precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"precision={precision_plugin.precision!r} scales losses, and torch's scaler takes no experts, which are "
            "DTensors, beside other parameters. Set precision to bf16-mixed, bf16-true or 32-true."
        )


def refuse_mixed_groups(optimizer: Optimizer) -> None:
    """Refuse what torch would refuse in the first step.

    Raises:
        ValueError: a group that is stepped at once has experts and other parameters.
    """
    for number, group in enumerate(optimizer.param_groups):
        option = next((name for name in ("foreach", "fused") if group.get(name)), None)
        trainable = [each for each in group["params"] if each.requires_grad]
        if option is not None and len({kind_of(each) for each in trainable}) > 1:
            raise ValueError(
                f"{type(optimizer).__name__}({option}=True) has experts and other parameters in its group {number}: "
                "torch steps over DTensors or over plain tensors at once, not over both. Pass "
                "lightning_efficient.moe.parameter_groups(self) instead of self.parameters(), or leave "
                f"{option} out."
            )


def require_equal_shares(dataloader: object, topology: MoETopology) -> None:
    """Check that all ranks predict equally many samples: Lightning repeats none, and ranks with more would wait.

    Raises:
        ValueError: on every rank, where they do not.
    """
    sampler = getattr(getattr(dataloader, "batch_sampler", None), "sampler", getattr(dataloader, "sampler", None))
    counts = every_rank_has(len(sampler) if isinstance(sampler, Sized) else 0, topology.world)
    if min(counts) != max(counts):
        raise ValueError(
            f"predict gives {min(counts)} samples to one rank and {max(counts)} to another: experts are shared, so all "
            f"ranks must bring equally many. Predict a number of samples that the {topology.dp.size} data-parallel "
            "ranks divide, or on one device."
        )
