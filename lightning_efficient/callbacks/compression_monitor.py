"""What gradient compression saves and what it leaves behind, in the logger while training runs."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_efficient.compression import Compressor, Observation


class CompressionMonitor(Callback):
    """Logs how the compressor of a :class:`~lightning_efficient.strategies.CompressedDDPStrategy` is doing.

    Every ``every_n_steps`` optimizer steps, to every logger of the Trainer, as seen by rank 0:

    ``compression/ratio``
        bytes plain DDP would have sent, over bytes sent, since the last entry.
    ``compression/bytes_per_step``
        payload bytes of this rank per synchronised backward pass, since the last entry.
    ``compression/captured_energy``
        share of the corrected gradient's squared norm that was sent. Near 1 compression hardly matters; when it falls
        while the loss stalls, raise the rank.
    ``compression/residual_norm``
        norm of the error carried to the next step. It levels off in a healthy run.
    ``compression/exposed_ms``
        milliseconds per step that backward waited after its last bucket was launched; on CPU only, because on other
        devices backward returns before it is done.

    The observed steps cost one pass over the error buffers; nothing is measured in between. A summary is given once at
    the end of fit.

    Under a strategy that does not compress it warns once and does nothing, so that a recipe can be compared with
    ``--trainer.strategy ddp``.

    Args:
        every_n_steps: optimizer steps between entries.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: it counts steps. Set 1 or more.")
        self.every_n_steps = every_n_steps
        self.stats: dict[str, float] = {}
        self._compressor: Compressor | None = None
        self._reset()

    def _reset(self) -> None:
        self._observation: Observation | None = None
        self._due = 0
        self._seen_steps = 0
        self._logged_steps = self._logged_sent = self._logged_dense = 0
        self._exposed_s: list[float] = []
        self._energies: list[float] = []
        self._exposed_total_s = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()
        self._plan(trainer.global_step)
        self._compressor = compressor = _find_compressor(trainer)
        if compressor is None:
            rank_zero_warn(
                f"CompressionMonitor found {type(trainer.strategy).__name__}, which does not compress gradients: there "
                "is nothing to log. Set strategy='acp_sgd' (or another CompressedDDPStrategy), or remove the callback."
            )
            return
        self._seen_steps = self._logged_steps = compressor.stats.steps
        self._logged_sent, self._logged_dense = compressor.stats.bytes_sent, compressor.stats.bytes_dense

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._compressor and self._observation is None and trainer.global_step + 1 >= self._due:
            self._observation = self._compressor.observe()

    def _plan(self, step: int) -> None:
        # A batch may take no step (accumulation) or several (manual optimization): a due date, not a remainder.
        self._due = (step // self.every_n_steps + 1) * self.every_n_steps

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        compressor = self._compressor
        if compressor and compressor.stats.steps > self._seen_steps:
            self._seen_steps = compressor.stats.steps
            if pl_module.device.type == "cpu":
                self._exposed_s.append(time.perf_counter() - compressor.launched_at)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._compressor is None or self._observation is None or trainer.global_step < self._due:
            return
        self._plan(trainer.global_step)
        metrics = self._collect(self._compressor, self._observation)
        self._observation = None
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        pl_module.log("compression/ratio", metrics["compression/ratio"], prog_bar=True, logger=False)

    def _collect(self, compressor: Compressor, observation: Observation) -> dict[str, float]:
        stats = compressor.stats
        steps = max(1, stats.steps - self._logged_steps)
        sent, dense = stats.bytes_sent - self._logged_sent, stats.bytes_dense - self._logged_dense
        metrics = {"ratio": dense / max(1, sent), "bytes_per_step": sent / steps}
        if observation.measured:
            metrics["captured_energy"] = observation.captured_energy
            metrics["residual_norm"] = observation.residual_norm
            self._energies.append(observation.captured_energy)
        if self._exposed_s:
            metrics["exposed_ms"] = 1e3 * sum(self._exposed_s) / len(self._exposed_s)
            self._exposed_total_s += sum(self._exposed_s)
        self._exposed_s = []
        self._logged_steps, self._logged_sent, self._logged_dense = stats.steps, stats.bytes_sent, stats.bytes_dense
        self.stats = {f"compression/{name}": value for name, value in metrics.items()}
        return self.stats

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._compressor is None:
            return
        self._exposed_total_s += sum(self._exposed_s)
        energy = f"captured energy {sum(self._energies) / len(self._energies):.1%}, " if self._energies else ""
        rank_zero_info(f"CompressionMonitor: {energy}backward waited {self._exposed_total_s:.1f} s for communication")


def _find_compressor(trainer: Trainer) -> Compressor | None:
    compressor = getattr(trainer.strategy, "compressor", None)
    return compressor if isinstance(compressor, Compressor) else None
