"""`MoELayer`: a mixture of experts in place of a feed-forward net, on one process or spread over many."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_efficient._compat import graph_task_id
from lightning_efficient.moe.experts import Activation, Experts
from lightning_efficient.moe.inputs import InputCheck
from lightning_efficient.moe.pipeline import LayerStats, run_schedule
from lightning_efficient.moe.router import Capacity, DropPolicy, Normalize, Router
from lightning_efficient.moe.schedule import SCHEDULES, Schedule
from lightning_efficient.moe.topology import MoETopology


class Scheduler(Protocol):
    """Decides by which schedule a layer runs."""

    def schedule_for(self, layer: MoELayer, x_SM: Tensor) -> Schedule:
        """Return the schedule for these tokens; all ranks are asked together, and must get the same."""
        ...


class FixedSchedule:
    """Always the same schedule.

    Args:
        schedule: that one.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def schedule_for(self, layer: MoELayer, x_SM: Tensor) -> Schedule:
        """Return the schedule."""
        return self.schedule


class MoELayer(nn.Module):
    r"""A mixture of experts: tokens (..., M) in, (..., M) out.

    .. math:: y = \sum_{j=1}^{k} w_j \, E_{e_j}(x)

    with the k experts :math:`e_j` of highest probability under the router, and its weights. After each forward
    :attr:`aux_loss` is the weighted sum of the load-balancing loss and the z-loss; add
    :func:`~lightning_efficient.moe.aux_loss` of the whole model to the loss of training.

    As made, the layer is whole and runs on one process. :func:`~lightning_efficient.moe.parallelize` spreads it.

    Args:
        dim: M, size of a token.
        hidden: H, hidden size of an expert.
        num_experts: E.
        top_k: k, experts per token.
        activation: of the experts: ``swiglu``, ``gelu`` or ``relu``.
        bias: give the experts' maps a bias.
        capacity_factor: an expert has room for f times its even share of the assignments; the rest is dropped: those
            tokens get nothing from it. None: dropless, as much room as is needed.
        eval_capacity_factor: the same in evaluation; None: as in training.
        min_capacity: slots that an expert has at least.
        drop_policy: who keeps a slot of a full expert: ``position`` or ``probs``.
        normalize: when the weights of a token's experts are divided by their sum: ``before_drop``, ``after_drop`` or
            ``never``.
        jitter: noise on the router's inputs in training.
        aux_loss_coef: weight of the load-balancing loss.
        z_loss_coef: weight of the z-loss.
        balance_rate: u of :class:`~lightning_efficient.moe.SelectionBias`, which evens loads without a loss; 0: none.
            ParmStrategy moves the biases; a loop of your own calls :func:`~lightning_efficient.moe.balance_loads`.

    Attributes:
        aux_loss: of the last forward; None before.
        spent: whether backward has used it, and the layer has not run since.
        stats: what the last forward did.
        topology: the groups of ranks.
        scheduler: decides in which order the layer communicates.

    Raises:
        ValueError: a size or an option is wrong.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: Activation = "swiglu",
        bias: bool = False,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 4,
        drop_policy: DropPolicy = "position",
        normalize: Normalize = "before_drop",
        jitter: float = 0.0,
        aux_loss_coef: float = 1e-2,
        z_loss_coef: float = 0.0,
        balance_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.router = Router(
            dim,
            num_experts,
            top_k,
            capacity=Capacity(capacity_factor, eval_capacity_factor, min_capacity),
            drop_policy=drop_policy,
            normalize=normalize,
            jitter=jitter,
            balance_rate=balance_rate,
        )
        self.experts = Experts(num_experts, dim, hidden, activation=activation, bias=bias)
        self.aux_loss_coef = aux_loss_coef
        self.z_loss_coef = z_loss_coef
        self.aux_loss: Tensor | None = None
        self.stats: LayerStats | None = None
        self.spent, self._forwards = False, 0
        self.topology = MoETopology()
        self.scheduler: Scheduler = FixedSchedule(SCHEDULES["s1"])
        self.check: InputCheck | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what hangs on the graph of the last forward: a layer that has run can be copied."""
        return {**self.__dict__, "aux_loss": None, "stats": None}

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes of what is sent are decided by the tokens
    def forward(self, x: Tensor) -> Tensor:
        """Send each token through its experts.

        Args:
            x: tokens, (..., M); equal on all ranks of an MP group, and equally many on all ranks.

        Raises:
            ValueError: the last dimension is not M.
        """
        if x.shape[-1] != self.experts.dim:
            raise ValueError(
                f"Tokens have size {x.shape[-1]}, and the layer was made for dim={self.experts.dim}: its last "
                "dimension must match. Change the layer's dim."
            )
        x_SM = x.reshape(-1, x.shape[-1])
        if self.check is not None:
            self.check(x_SM)
        y_SM, stats = self.run(x_SM, self.scheduler.schedule_for(self, x_SM))
        balance, z = self.router.losses(stats.load, stats.tokens)
        aux_loss = self.aux_loss_coef * balance + self.z_loss_coef * z
        # What a checkpoint computes again has been told before, and its graph would be kept by whoever held the loss.
        if graph_task_id() == -1:
            self._note(aux_loss, replace(stats, load=stats.load.detach()))
        return y_SM.view(x.shape)

    def _note(self, aux_loss: Tensor, stats: LayerStats) -> None:
        self.aux_loss, self.stats, self.spent = aux_loss, stats, False
        self._forwards += 1
        if aux_loss.requires_grad:
            # By number and weakly: a hook that held the loss or the layer would keep both.
            spend, number = weakref.WeakMethod(self._spend), self._forwards
            aux_loss.register_hook(lambda _: call(number) if (call := spend()) is not None else None)
        if self.training and self.router.balance is not None and self.router.weight.requires_grad:
            self.router.balance.count(self.router.counts(stats.load))

    def _spend(self, number: int) -> None:
        """Backward has used the loss of a forward: its graph is gone."""
        if self._forwards == number and self.aux_loss is not None:
            self.aux_loss, self.spent = self.aux_loss.detach(), True

    @property
    def lost_gradient(self) -> bool:
        """Whether the auxiliary loss should train the router, and cannot: the forward ran without gradients."""
        wanted = self.training and self.router.weight.requires_grad and bool(self.aux_loss_coef or self.z_loss_coef)
        has_none = self.aux_loss is not None and not self.aux_loss.requires_grad
        return wanted and has_none and not self.spent and torch.is_grad_enabled()

    def run(self, x_SM: Tensor, schedule: Schedule) -> tuple[Tensor, LayerStats]:
        """Run the layer by a schedule, and keep nothing.

        Args:
            x_SM: tokens.
            schedule: in which order.

        Raises:
            ValueError: the schedule cannot do what the layer is set to.
        """
        seed = None
        if self.training and self.router.jitter:
            if schedule.split == "gather" and self.topology.esp.size > 1:
                raise ValueError(
                    "jitter with schedule 'paper': that baseline routes tokens of other ranks, whose noise it does not "
                    "know. Set jitter to 0, or choose another schedule."
                )
            # From torch's generator, which ranks of an MP group share as they share their tokens, and which
            # checkpointing puts back before it computes the layer again.
            seed = int(torch.randint(2**62, ()).item()) + self.topology.dp.rank
        return run_schedule(x_SM, self.router, self.experts, topology=self.topology, schedule=schedule, seed=seed)


def moe_layers(module: nn.Module) -> Iterator[tuple[str, MoELayer]]:
    """Yield the MoE layers of a module, with their names."""
    for name, each in module.named_modules():
        if isinstance(each, MoELayer):
            yield name, each


def aux_loss(module: nn.Module) -> Tensor:
    """Return the sum of the auxiliary losses that the module's MoE layers had in their last forward.

    Where some layers ran since the last backward and others did not, as with layers that are dropped at random, those
    of the others are left out.

    Args:
        module: with MoE layers.

    Raises:
        ValueError: it has none, or one has not run.
    """
    layers = dict(moe_layers(module))
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no MoE layer, and so no auxiliary loss. Remove the call, or add a MoELayer."
        )
    ran = {name: layer for name, layer in layers.items() if layer.aux_loss is not None}
    if not ran:
        raise ValueError(
            f"No MoE layer of {type(module).__name__} has run yet: there is no auxiliary loss. Call the model first."
        )
    fresh = {name: layer for name, layer in ran.items() if not layer.spent} or ran
    for name, layer in fresh.items():
        if layer.lost_gradient:
            warnings.warn(
                f"The auxiliary loss of the MoE layer {name!r} has no gradient, and evens no loads: its forward ran "
                "without gradients. Activation checkpointing must be the kind with use_reentrant=False.",
                stacklevel=2,
            )
    losses = [layer.aux_loss for layer in fresh.values() if layer.aux_loss is not None]
    return torch.stack(losses).sum()


def balance_loads(module: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Move the selection biases of a module's MoE layers; all ranks call it together, after each optimizer step.

    It sums the counts of all layers over the data-parallel ranks, in one all-reduce; where layers were not spread, over
    all ranks that there are. Layers with ``balance_rate=0`` have no bias, and those of frozen routers stay: where none
    is left, nothing is done.

    Args:
        module: with MoE layers.
        optimizer: that took the step: only layers whose routers it trains are moved. The others may be between a
            forward and a checkpoint's second one. Default: all layers.
    """
    stepped = None if optimizer is None else {each for group in optimizer.param_groups for each in group["params"]}
    layers = [
        layer
        for _, layer in moe_layers(module)
        if layer.router.weight.requires_grad and (stepped is None or layer.router.weight in stepped)
    ]
    balances = [layer.router.balance for layer in layers if layer.router.balance is not None]
    if not balances:
        return
    counts = [each.take_counts() for each in balances]
    alone, group = _counted_together(layers[0].topology)
    if not alone:
        flat = torch.cat(counts)
        dist.all_reduce(flat, group=group)
        counts = list(flat.split([len(each) for each in counts]))
    for each, counts_E in zip(balances, counts, strict=True):
        each.move(counts_E)


def _counted_together(topology: MoETopology) -> tuple[bool, dist.ProcessGroup | None]:
    """Whether a rank counts alone, and with whom otherwise: under DDP and FSDP2 layers know nothing of other ranks."""
    if topology.world_size > 1:
        return topology.dp.size == 1, topology.dp.process_group
    return not dist.is_initialized() or dist.get_world_size() == 1, None
