"""`ParmStrategy`: mixtures of experts over MP, EP and ESP, each layer by the schedule that suits the links."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_efficient._compat import set_data_parallel_size
from lightning_efficient.moe import (
    GradientSync,
    Meter,
    MoESizes,
    MoEStats,
    MoETopology,
    balance_loads,
    clip_grad_norm,
    clip_grad_value,
    moe_layers,
    parallelize,
)
from lightning_efficient.moe.agreement import broadcast_weights, random_state_of_first, share_random_state
from lightning_efficient.moe.planning import LayerShape
from lightning_efficient.strategies._parm_checks import refuse_mixed_groups, refuse_scaler, require_equal_shares
from lightning_efficient.strategies._parm_schedules import Schedules, fixed_schedule, make_scheduler

CHECKPOINT_KEY = "parm"
_LONGEST_MEASUREMENT_S = 60.0

log = logging.getLogger(__name__)


class ParmStrategy(ModelParallelStrategy):
    """Trains models with :class:`~lightning_efficient.moe.MoELayer` over many ranks, on CPU and GPU alike.

    With P ranks, MP consecutive ones work on the same tokens and may hold shards of the dense weights (by a DTensor
    plan of your own over ``device_mesh["tensor_parallel"]``); the P / MP groups of them are data-parallel. EP * ESP
    consecutive ranks hold every expert once: experts are spread over EP, and the hidden size of each is cut in ESP
    parts. MP is independent of EP and ESP.

    The module builds its layers in ``configure_model``; this strategy spreads them when the hook has run, before
    anything on the meta device gets memory. Add :func:`~lightning_efficient.moe.aux_loss` of the module to the loss. A
    layer gets a schedule of its own by ``self.trainer.strategy.parallelize_moe(self)`` in ``configure_model`` and
    ``layer.scheduler = FixedSchedule(...)`` after it.

    Weights and buffers start as those of rank 0. Gradients are summed while backward runs, and whole when
    ``on_after_backward`` is called. ``gradient_clip_val`` and ``self.clip_gradients`` clip by the norm over all ranks;
    for that norm itself call :func:`~lightning_efficient.moe.grad_norm` with ``strategy.topology``: Lightning's
    ``grad_norm`` utility fails on experts, which are DTensors. To accumulate by hand, run all backward passes but the
    last within ``self.trainer.strategy.block_backward_sync()``. Compile submodules in ``configure_model``; Lightning
    takes no compiled LightningModule with this kind of strategy.

    Checkpoints hold whole expert tensors (E, ...), in a folder (resumed with any sizes) or in a single file (that also
    a Trainer without this strategy reads), and under ``"parm"`` the schedules, which a resumed run in the same setting
    keeps.

    Args:
        model_parallel_size: MP.
        expert_parallel_size: EP; ``"auto"``: all ranks, divided by ESP.
        expert_sharding_size: ESP.
        schedule: in which order layers communicate: a name, a name and chunks (``s1_hier/4``), or ``"auto"``: chosen
            for each shape of layer by measuring, when it first runs.
        chunks: in how many parts a layer runs, so that they overlap; ``"auto"``: chosen likewise.
        profile_cache: a JSON file to keep measurements in between runs.
        trials: runs of each shape of layer by schedules that may be the fastest, at most; 0: a model of the links
            decides alone.
        check_counts: compare the numbers of tokens of all ranks at the first MoE layer in each forward; where they
            differ, all ranks raise. Where other layers see other tokens, as in an encoder and a decoder, they are not
            compared there.
        verify_inputs: compare numbers and tokens of each MP group at every layer: slow, for debugging.
        bucket_mb: size of the buckets in which gradients are summed.
        save_distributed_checkpoint: write a folder with one file per rank, instead of a single file.
        process_group_backend: ``None``: nccl on GPUs, gloo on CPUs.
        timeout: seconds after which a collective fails, because another rank has died or hangs.

    Attributes:
        stats: what this rank did in the last fit.

    Raises:
        ValueError: a size is below 1, or there is no such schedule. In ``fit``: the sizes do not divide the number of
            ranks, or the experts of a layer.
    """

    def __init__(
        self,
        model_parallel_size: int = 1,
        expert_parallel_size: int | Literal["auto"] = "auto",
        expert_sharding_size: int = 1,
        *,
        schedule: str = "auto",
        chunks: int | Literal["auto"] = "auto",
        profile_cache: str | None = None,
        trials: int = 40,
        check_counts: bool = True,
        verify_inputs: bool = False,
        bucket_mb: float = 25.0,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
    ) -> None:
        MoESizes(
            model_parallel_size, 1 if expert_parallel_size == "auto" else expert_parallel_size, expert_sharding_size
        )
        fixed_schedule(schedule, chunks)
        if trials < 0 or bucket_mb <= 0 or timeout <= 0:
            raise ValueError(
                f"trials={trials}, bucket_mb={bucket_mb:g}, timeout={timeout:g}: trials are 0 or more, the others "
                "above 0. Leave them out for the defaults."
            )
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=model_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )
        self.model_parallel_size = model_parallel_size
        self.expert_parallel_size = expert_parallel_size
        self.expert_sharding_size = expert_sharding_size
        self.schedule = schedule
        self.chunks = chunks
        self.profile_cache = profile_cache
        self.trials = trials
        self.check_counts = check_counts
        self.verify_inputs = verify_inputs
        self.bucket_mb = bucket_mb
        self.timeout_s = timeout
        self.stats = MoEStats()
        self._topology: MoETopology | None = None
        self._schedules: Schedules | None = None
        self._formed_in: object = None
        self._sync: GradientSync | None = None
        self._meter: Meter | None = None

    @property
    def topology(self) -> MoETopology:
        """The groups of ranks, once processes have met."""
        if self._topology is None:
            raise RuntimeError("the groups of ranks are not formed yet: ask in configure_model or later.")
        return self._topology

    # ---- set-up ----------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        sizes = self._sizes(self.num_nodes * self.num_processes)
        set_data_parallel_size(self, self.num_nodes * self.num_processes // sizes.model_parallel)
        super().setup_environment()
        if self._formed_in is not dist.group.WORLD:
            self._topology = MoETopology.create(sizes, device_type=self.root_device.type, timeout=self._timeout)
            self._schedules = make_scheduler(
                self._topology,
                schedule=self.schedule,
                chunks=self.chunks,
                trials=self.trials,
                cache=self.profile_cache,
                timeout_s=min(self.timeout_s, _LONGEST_MEASUREMENT_S),
            )
            self._formed_in = dist.group.WORLD

    def _sizes(self, ranks: int) -> MoESizes:
        spread, cut = self.expert_parallel_size, self.expert_sharding_size
        sizes = MoESizes(self.model_parallel_size, max(1, ranks // cut) if spread == "auto" else spread, cut)
        sizes.check_world(ranks)
        return sizes

    def parallelize_moe(self, module: nn.Module) -> list[str]:
        """Spread the MoE layers of a module; those that are spread already stay as they are.

        Args:
            module: changed in place.

        Returns:
            The names of its MoE layers.

        Raises:
            ValueError: the sizes do not divide the experts of a layer.
        """
        return parallelize(
            module,
            self.topology,
            scheduler=self._schedules,
            check_counts=self.check_counts,
            verify_inputs=self.verify_inputs,
        )

    @override
    def setup(self, trainer: Trainer) -> None:
        module = self._module
        if is_overridden("configure_model", module) and not self.parallelize_moe(module):
            rank_zero_warn(
                f"ParmStrategy found no MoELayer in {type(module).__name__}: it does plain data parallelism. Build "
                "lightning_efficient.moe.MoELayer in configure_model, or choose strategy='ddp'."
            )
        # What is materialized now is drawn alike everywhere: experts, because each rank keeps another part.
        on_meta = any(each.is_meta for each in module.parameters())
        with random_state_of_first(self.topology.world) if on_meta else nullcontext():
            super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        super().model_to_device()
        broadcast_weights(self._module, self.topology)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            refuse_mixed_groups(optimizer)
        self._take_hooks_off()
        self.stats = MoEStats()
        self._sync = GradientSync(self._module, self.topology, bucket_mb=self.bucket_mb)
        self._meter = Meter(self._module, self.stats)
        self.stats.gradients = self._sync.traffic

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        refuse_scaler(self.precision_plugin)
        # Torch's functions take no DTensors and plain tensors together.
        self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
        self.precision_plugin.clip_grad_by_value = self._clip_by_value  # type: ignore[method-assign]

    @override
    def process_dataloader(self, dataloader: object) -> object:
        # Workers of an MP group augment alike: Lightning would seed them by rank.
        if int(os.environ.get("PL_SEED_WORKERS", 0)) and getattr(dataloader, "worker_init_fn", self) is None:
            rank = self.distributed_sampler_kwargs["rank"]
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=rank)  # type: ignore[attr-defined]
        if self._module.trainer.predicting:
            require_equal_shares(dataloader, self.topology)
        return super().process_dataloader(dataloader)

    # ---- steps -----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self) -> None:
        share_random_state(self.topology.mp)
        super().on_train_start()
        sizes, data = self.topology.sizes, self.topology.dp.size
        rank_zero_info(
            f"ParmStrategy: {self.world_size} ranks, MP {sizes.model_parallel} x DP {data}; experts over EP "
            f"{sizes.expert_parallel} x ESP {sizes.expert_sharding} x EDP {self.topology.edp.size}"
        )

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        assert self._meter is not None
        with self._meter.counting():
            return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self._sync is not None
        assert self._meter is not None
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        self._sync.begin(self._module)
        with self._meter.counting():
            self.precision_plugin.backward(closure_loss, self._module, optimizer, *args, **kwargs)
        self._sync.finish()  # before on_after_backward, which is to see whole gradients
        if self._sync.enabled:
            self.stats.steps += 1
            self.stats.buckets, self.stats.overlapped = self._sync.sent, self._sync.overlapped
        self._tell_schedules()
        closure_loss = self.precision_plugin.post_backward(closure_loss, self._module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, *args, **kwargs)
        balance_loads(self._module, optimizer)
        return result

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Leave the gradients of backward passes within this context on their ranks, to be summed with later ones."""
        if self._sync is None:
            yield
            return
        before, self._sync.enabled = self._sync.enabled, False
        try:
            yield
        finally:
            self._sync.enabled = before

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        clip_grad_norm(self.precision_plugin.main_params(optimizer), float(clip_val), self.topology)

    def _clip_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        clip_grad_value(self.precision_plugin.main_params(optimizer), float(clip_val))

    def _tell_schedules(self) -> None:
        """Say by which schedules layers run, when there are new ones."""
        assert self._schedules is not None
        for shape, schedule in self._schedules.untold().items():
            rank_zero_info(self._schedules.describe(shape))
            for logger in self._module.trainer.loggers:
                logger.log_hyperparams({f"parm/schedule/{_named(shape)}": schedule.label})

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        assert self._schedules is not None
        checkpoint[CHECKPOINT_KEY] = {"sizes": asdict(self.topology.sizes), "schedules": self._schedules.state_dict()}
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if CHECKPOINT_KEY in checkpoint:
            assert self._schedules is not None
            limited = any(layer.router.capacity.factor is not None for _, layer in moe_layers(self._module))
            self._schedules.load_state_dict(checkpoint[CHECKPOINT_KEY]["schedules"], may_drop=limited)
        return checkpoint

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    # ---- end -------------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        if _is_lost_contact(exception):
            log.error(
                "Rank %d waited in vain for another: it has died, hangs (timeout: %g s), or brought fewer batches. "
                "Look at the first error of the other ranks, and give all equally many batches of one size.",
                self.global_rank,
                self.timeout_s,
            )
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        if self._meter is not None:
            self._report()
        self._take_hooks_off()
        for name in ("clip_grad_by_norm", "clip_grad_by_value"):
            vars(self.precision_plugin).pop(name, None)
        super().teardown()

    def _take_hooks_off(self) -> None:
        for each in (self._sync, self._meter):
            if each is not None:
                each.remove()
        self._sync = self._meter = None

    def _report(self) -> None:
        stats = self.stats
        if not stats.steps:
            return
        by_axis = ", ".join(f"{axis} {_size(sent / stats.steps)}" for axis, sent in stats.bytes_by_axis.items() if sent)
        rank_zero_info(
            f"ParmStrategy: {stats.steps} steps sent {_size(stats.bytes_sent / stats.steps)} per rank and step"
            f"{f' ({by_axis})' if by_axis else ''}; experts of rank 0 computed {stats.rows} rows, "
            f"{stats.dropped_share:.2%} of its assignments were dropped; {stats.overlapped} of {stats.buckets} buckets "
            "of gradients left while backward ran"
        )


def _is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed: gloo says so in plain RuntimeErrors, with the place in its source."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _named(shape: LayerShape) -> str:
    room = "dropless" if shape.capacity_factor is None else f"f{shape.capacity_factor:g}"
    return f"{shape.tokens}x{shape.dim}_{shape.num_experts}x{shape.hidden}_{room}"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.1f} KiB"
