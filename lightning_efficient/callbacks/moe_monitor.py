"""How the mixtures of experts of a `ParmStrategy` are doing, in the logger while training runs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_efficient.moe import MoEStats


class MoEMonitor(Callback):
    """Logs what the MoE layers under a :class:`~lightning_efficient.strategies.ParmStrategy` drop and send.

    Every ``every_n_steps`` optimizer steps, to every logger of the Trainer, as seen by rank 0, since the last entry:

    ``moe/dropped_share``
        share of the assignments of tokens to experts that found no slot. Raise ``capacity_factor`` where it is large.
    ``moe/busiest_expert``
        load of the busiest expert of a layer over the mean load, on average over layers; 1 is even. Raise
        ``aux_loss_coef`` or ``balance_rate`` where it stays large.
    ``moe/rows_per_step``
        rows that its experts computed in forward, per step.
    ``moe/bytes_per_step``
        what it sent for a step: layers, forward and backward, and gradients.
    ``moe/bytes_per_step/<group>``
        the same by group of ranks: ``mp``, ``ep``, ``esp``, ``block`` (EP x ESP), ``dp``, ``edp``, ``world``.

    The device is waited for at entries only. Under another strategy it warns once and does nothing.

    Args:
        every_n_steps: optimizer steps between entries.

    Raises:
        ValueError: it is below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: it counts steps. Set 1 or more.")
        self.every_n_steps = every_n_steps
        self.stats: dict[str, float] = {}
        self._due = 0
        self._before: dict[str, float] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = {}
        self._plan(trainer.global_step)
        if _stats(trainer) is None:
            rank_zero_warn(
                f"MoEMonitor found {type(trainer.strategy).__name__}, which spreads no mixture of experts: there is "
                "nothing to log. Set strategy='parm', or remove the callback."
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stats = _stats(trainer)
        if stats is None or trainer.global_step < self._due:
            return
        self._plan(trainer.global_step)
        self.stats = self._collect(stats)
        for logger in trainer.loggers:
            logger.log_metrics(self.stats, step=trainer.global_step)
        pl_module.log("moe/dropped_share", self.stats["moe/dropped_share"], prog_bar=True, logger=False)

    def _plan(self, step: int) -> None:
        # A batch may take no step (accumulation) or several (manual optimization): a due date, not a remainder.
        self._due = (step // self.every_n_steps + 1) * self.every_n_steps

    def _collect(self, stats: MoEStats) -> dict[str, float]:
        now: dict[str, float] = {
            "steps": stats.steps,
            "forwards": stats.forwards,
            "assignments": stats.assignments,
            "dropped": stats.dropped,
            "peaks": stats.peaks,
            "rows_per_step": stats.rows,
            "bytes_per_step": stats.bytes_sent,
            **{f"bytes_per_step/{axis}": sent for axis, sent in stats.bytes_by_axis.items()},
        }
        new = {name: value - self._before.get(name, 0) for name, value in now.items()}
        self._before = now
        steps = max(1, new.pop("steps"))
        dropped = new.pop("dropped") / max(1, new.pop("assignments"))
        busiest = new.pop("peaks") / max(1, new.pop("forwards"))
        per_step = {f"moe/{name}": value / steps for name, value in new.items()}
        return {"moe/dropped_share": dropped, "moe/busiest_expert": busiest, **per_step}


def _stats(trainer: Trainer) -> MoEStats | None:
    stats = getattr(trainer.strategy, "stats", None)
    return stats if isinstance(stats, MoEStats) else None
