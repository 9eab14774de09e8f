"""Runs a recipe as a probe: the user's model, data and launcher, but plain DDP and nothing saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from lightning_efficient.callbacks import CompressionMonitor
from lightning_efficient.callbacks.link_probe import CompressionProbe, ProbeResult
from lightning_efficient.cli.short_run import ShortRunCLI
from lightning_efficient.compression import COMPRESSORS

# Arguments of CompressedDDPStrategy that plain DDP lacks, and the one that the answer is about.
_OF_THE_COMPRESSOR = ("compressor", "replica_check_every_n_steps", "save_error", "bucket_cap_mb")


def probe_recipe(recipe_args: Sequence[str], *, steps: int, single_process: bool) -> ProbeResult | None:
    """Train a recipe for a few steps and measure them.

    Args:
        recipe_args: the recipe and its overrides, as words of the command line.
        steps: steps to time.
        single_process: whether to use one device and measure compute only.

    Returns:
        The measurement, with gradient accumulation as the recipe has it; None on ranks other than 0.
    """
    cli = _ProbeCLI(recipe_args, steps=steps, single_process=single_process)
    result = cli.probe.result
    if result is None or not cli.trainer.is_global_zero:
        return None
    micro_batches = int(cli.config["fit"]["trainer"].get("accumulate_grad_batches") or 1)
    compute = result.workload
    earlier_s = (micro_batches - 1) * compute.no_communication_s  # an upper bound: it counts the optimizer's step again
    return replace(
        result,
        workload=replace(compute, forward_s=compute.forward_s + earlier_s),
        plain_step_s=None if result.plain_step_s is None else result.plain_step_s + earlier_s,
    )


class _ProbeCLI(ShortRunCLI):
    """`fit` with a probe, on plain DDP or on one device."""

    def __init__(self, recipe_args: Sequence[str], *, steps: int, single_process: bool) -> None:
        self.probe = CompressionProbe(steps=steps, needs_link=not single_process)
        self._single_process = single_process
        # The monitor needs a compressor.
        super().__init__(recipe_args, self.probe, steps=self.probe.steps_needed, left_out=(CompressionMonitor,))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        return super().instantiate_trainer(
            **kwargs,
            **self._parallelism(),
            accumulate_grad_batches=1,  # one micro-batch is timed; `probe_recipe` counts the others
            log_every_n_steps=0,
        )

    def _parallelism(self) -> dict[str, Any]:
        if self._single_process:
            return {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        strategy = self.config["fit"]["trainer"].get("strategy")
        if isinstance(strategy, str):
            return {"strategy": "ddp"} if strategy.lower() in COMPRESSORS else {}
        if isinstance(strategy, Namespace) and "compressor" in strategy.get("init_args", {}):
            arguments = {**strategy["init_args"].as_dict(), **strategy.get("dict_kwargs", {})}
            return {"strategy": DDPStrategy(**{k: v for k, v in arguments.items() if k not in _OF_THE_COMPRESSOR})}
        return {}
