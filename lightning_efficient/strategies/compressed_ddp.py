"""DDP with compressed gradients, as a Lightning Strategy."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_efficient import _compat
from lightning_efficient.compression import COMPRESSORS, Compressor, check_replicas, register_compressor
from lightning_efficient.compression.replicas import check_same_parameters

CHECKPOINT_KEY = "gradient_compression"

_REFUSED = {
    "ddp_comm_hook": "the compressor owns DDP's communication hook",
    "ddp_comm_state": "the compressor owns DDP's communication hook",
    "ddp_comm_wrapper": "the compressor owns DDP's communication hook",
    "model_averaging_period": "post-local SGD replaces the communication hook the compressor needs",
    "skip_all_reduce_unused_params": "it takes parameters away from the buckets the compressor sees",
    "delay_all_reduce_named_params": "it takes parameters away from the buckets the compressor sees",
    "param_to_hook_all_reduce": "it takes parameters away from the buckets the compressor sees",
}


class CompressedDDPStrategy(DDPStrategy):
    """Distributed data parallel training that sends compressed gradients, on CPU and GPU alike.

    The hook fires once per bucket and synchronised backward pass; while gradients accumulate nothing is sent. What the
    compressor carries from step to step is stored in Trainer checkpoints under ``"gradient_compression"``, by parameter
    name, and resumes on any number of ranks and any ``bucket_cap_mb``.

    Args:
        compressor: a :class:`~lightning_efficient.compression.Compressor`, or the name of one with its defaults:
            "acp_sgd", "power_sgd", "top_k", "sign_sgd", "half". None is ``ACPSGD()``.
        replica_check_every_n_steps: compare the ranks' parameters bit by bit every so many optimizer steps; 0 never.
        save_error: store the error buffers in checkpoints. They are as large as the gradients, and averaging them is a
            dense all-reduce; without them a resumed run starts with no carried error.
        **kwargs: of :class:`~lightning.pytorch.strategies.DDPStrategy` and
            :class:`~torch.nn.parallel.DistributedDataParallel`, such as ``bucket_cap_mb``, ``timeout``,
            ``find_unused_parameters``.

    Raises:
        ValueError: an argument that DDP alone would take over, or an unknown compressor.
        TypeError: an argument that neither DDPStrategy nor DistributedDataParallel knows.

    Example::

        import lightning_efficient
        from lightning.pytorch import Trainer

        trainer = Trainer(devices=2, accelerator="cpu", strategy="acp_sgd")
    """

    def __init__(
        self,
        compressor: Compressor | str | None = None,
        *,
        replica_check_every_n_steps: int = 0,
        save_error: bool = True,
        **kwargs: Any,
    ) -> None:
        for name, reason in _REFUSED.items():
            if kwargs.get(name):
                raise ValueError(f"{name} cannot be set with gradient compression: {reason}. Leave {name} out.")
        if replica_check_every_n_steps < 0:
            raise ValueError(
                f"replica_check_every_n_steps is {replica_check_every_n_steps}: it counts steps. Set 0 to never check."
            )
        super().__init__(**kwargs)
        _check_known(self._ddp_kwargs)
        self.compressor = _build(compressor)
        self.replica_check_every_n_steps = replica_check_every_n_steps
        self.save_error = save_error
        self._restored: dict[str, Any] | None = None
        self._resuming = False
        self._optimizer_steps = 0
        self._compressed: LightningModule | None = None
        self._steps_at_update = 0
        self._warned_of_backwards = False

    # ---- set-up ----------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        # What a run that failed before configure_ddp left behind must not reach this one.
        self._restored, self._resuming = None, False

    @override
    def configure_ddp(self) -> None:
        assert isinstance(self.model, LightningModule)
        self._check_static_graph(self.model)
        trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        check_same_parameters(trainable, self._ddp_kwargs.get("process_group"))
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        register_compressor(self.model, self.compressor, loss_scale=self._loss_scale())
        if self._restored is not None:
            self.compressor.load_state_dict(self._restored)
        elif self._resuming:
            self.compressor.reset()
            rank_zero_warn(
                "the checkpoint holds no gradient compression state: error feedback starts from zero. Resume from a "
                "checkpoint written with this strategy (and not with save_weights_only=True) to continue exactly."
            )
        self._restored, self._resuming = None, False
        self._steps_at_update = self.compressor.stats.steps
        self._compressed = self._module

    def _check_static_graph(self, module: LightningModule) -> None:
        trainer = module.trainer
        accumulates = trainer.accumulate_grad_batches > 1 or any(
            isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches()
            for callback in trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        )
        if self._ddp_kwargs.get("static_graph") and accumulates:
            raise MisconfigurationException(
                "static_graph=True with accumulate_grad_batches > 1: torch fails in the first accumulated backward "
                "(pytorch/pytorch#143580). Set static_graph=False or accumulate_grad_batches=1."
            )

    def _loss_scale(self) -> Callable[[], Tensor | None] | None:
        scaler = getattr(self.precision_plugin, "scaler", None)
        return None if scaler is None else lambda: _compat.loss_scale(scaler)

    # ---- steps -----------------------------------------------------------------------------------------------------

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._check_backwards(optimizer)
        self._optimizer_steps += 1
        every = self.replica_check_every_n_steps
        if every and self._optimizer_steps % every == 0:
            group = self._ddp_kwargs.get("process_group")
            check_replicas(self._module.named_parameters(), group, step=self._module.trainer.global_step + 1)
        return output

    def _check_backwards(self, optimizer: Optimizer) -> None:
        """Warn once where synchronised backward passes pile up before an update, which manual optimization allows."""
        backwards = self.compressor.stats.steps - self._steps_at_update
        self._steps_at_update = self.compressor.stats.steps
        # Gradients are zeroed before each backward that Lightning runs itself, and in the closures of LBFGS.
        if self._module.automatic_optimization or isinstance(optimizer, LBFGS) or self._warned_of_backwards:
            return
        if backwards > len(self.optimizers):  # each optimizer's own backward may come before the first update
            self._warned_of_backwards = True
            rank_zero_warn(
                "several synchronised backward passes ran in one optimizer step: gradients that were already averaged "
                "are compressed again. Run all passes but the last under trainer.model.no_sync()."
            )

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        weights_only = "optimizer_states" not in checkpoint
        if not weights_only and self._compressed is self._module:
            # After an exception the other ranks may not be here: nothing collective may start.
            together = self._module.trainer.state.status != TrainerStatus.INTERRUPTED
            if not together and self.save_error:
                rank_zero_warn("saving after an exception: the checkpoint holds no error buffers of the compressor.")
            checkpoint[CHECKPOINT_KEY] = self.compressor.state_dict(
                sync=together, include_error=together and self.save_error
            )
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            state = checkpoint.get(CHECKPOINT_KEY)
            if not isinstance(self.model, DistributedDataParallel):  # restoring comes before configure_ddp
                self._restored, self._resuming = state, True
            elif state is not None:  # in the middle of fit the tuner puts back what it saved before its trials
                self.compressor.load_state_dict(state)
        return checkpoint

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    # ---- end -------------------------------------------------------------------------------------------------------

    @override
    def teardown(self) -> None:
        if isinstance(self.model, DistributedDataParallel):
            self._report()
        super().teardown()

    def _report(self) -> None:
        stats = self.compressor.stats
        if stats.steps:
            rank_zero_info(
                f"{type(self.compressor).__name__}: {stats.steps} steps sent {_size(stats.bytes_sent)} per rank "
                f"instead of {_size(stats.bytes_dense)} ({stats.ratio:.1f}x fewer bytes, "
                f"{stats.collectives / stats.steps:.1f} collectives per step)"
            )
        elif self._optimizer_steps:
            rank_zero_warn("gradient compression did nothing: no synchronised backward pass reached its hook.")


def _check_known(ddp_kwargs: Iterable[str]) -> None:
    """Refuse now what DistributedDataParallel would refuse once all processes run."""
    known = inspect.signature(DistributedDataParallel).parameters
    if unknown := sorted(set(ddp_kwargs) - known.keys()):
        raise TypeError(
            f"CompressedDDPStrategy got an unexpected argument {unknown[0]!r}: neither DDPStrategy nor "
            "DistributedDataParallel has it. Remove it; settings of a compressor go to the compressor itself."
        )


def _build(compressor: Compressor | str | None) -> Compressor:
    if compressor is None:
        return COMPRESSORS["acp_sgd"]()
    if isinstance(compressor, Compressor):
        return compressor
    if compressor not in COMPRESSORS:
        raise ValueError(
            f"unknown compressor {compressor!r}: the names are {', '.join(COMPRESSORS)}. Use one of them, or pass a "
            "Compressor object."
        )
    return COMPRESSORS[compressor]()


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"
