"""`EvaP`: curvature along the leading direction of the momentum, around :mod:`lightning_efficient.eva.leading`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_efficient.eva.compiled import compile_alone
from lightning_efficient.eva.config import fallback_ratio
from lightning_efficient.eva.layers import FoundLayers, Layer
from lightning_efficient.eva.layout import send
from lightning_efficient.eva.leading import leading_step, start_directions
from lightning_efficient.eva.matrices import as_matrices, is_channels_last, rows_in_memory_order, rows_in_weight_order
from lightning_efficient.eva.report import LayerReport
from lightning_efficient.eva.sources import wide_dtype
from lightning_efficient.optimizers.fallback import adamw_step, momentum_buffer
from lightning_efficient.optimizers.layerwise import LayerwiseOptimizer, evaluate

PowerBackend = Literal["eager", "compiled"]


@dataclass(frozen=True)
class EvaPStats:
    """What an :class:`EvaP` has done.

    Attributes:
        counted_steps: steps that preconditioned layers, since the optimizer was made.
        layers: that it preconditioned in the last of them.
    """

    counted_steps: int = 0
    layers: int = 0


class EvaP(LayerwiseOptimizer):
    r"""Low-rank curvature along the leading directions of the momentum, found by one power step in each training step.

    For the weights of ``Linear`` and convolution layers: momentum, rows brought to equal length, the ``rank`` leading
    directions brought down to the size of the others, an update of fixed root mean square. All other parameters follow
    AdamW, at the same learning rate unless ``fallback_lr`` says otherwise. State: the momentum, and ``rank`` vectors of
    a layer's inputs; a training step takes a few percent longer than with AdamW. The equations are in
    :mod:`lightning_efficient.eva.leading`.

    Not from the papers: Eva-s curves along the mean of the gradient's rows and columns, and Eva-f along the mean input;
    behind LayerNorm neither is where the curvature is. The method card says what was measured, and that Muon, which
    treats all directions so, still does better for each step.

    It needs the module, to know which weights are layers: call :meth:`attach`, or add
    :class:`~lightning_efficient.callbacks.AttachOptimizer` to the Trainer. Nothing is captured, and under data
    parallelism nothing is sent: gradients are equal on all ranks, and so is all that follows.

    Args:
        params: parameters or groups. A group may set ``lr``, ``momentum``, ``damping``, ``weight_decay``, ``betas``,
            ``eps``, and ``fallback: True``, which sends all of it to AdamW.
        lr: learning rate, of AdamW's size: an update has a root mean square of 0.2 of it.
        rank: leading directions, each of them a vector of inputs; 1 is the cheapest, 0 only normalises rows. So it is
            for layers with no more rows or columns than directions.
        momentum: :math:`\mu`, of a Nesterov average.
        damping: least share of a leading direction that is left.
        weight_decay: decoupled, for all parameters.
        fallback_lr: learning rate of AdamW; the ratio to ``lr`` stays, whatever a schedule does. ``None``: ``lr``.
        betas: of AdamW.
        eps: of AdamW.
        backend: ``"eager"``, or ``"compiled"`` (inductor).

    Attributes:
        rank: leading directions.
        backend: what the step runs on.
        stats: what it has done.

    Raises:
        ValueError: a value is out of range or unknown.
        TypeError: a parameter is complex, or ``lr`` is a tensor.
        NotImplementedError: a parameter is sharded (a DTensor).

    Example::

        optimizer = EvaP(model.parameters(), lr=0.01).attach(model, skip=["*lm_head"])
    """

    _wide_keys = ("leading",)
    _settings = ("rank", "backend", "stats")
    _layers: list[Layer]
    _rho: dict[str, Tensor]
    _function: Callable[..., list[Tensor]] | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        *,
        rank: int = 4,
        momentum: float = 0.8,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        fallback_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        backend: PowerBackend = "eager",
    ) -> None:
        if rank < 0:
            raise ValueError(f"rank is {rank}: it counts directions. Set 1 or more, or 0 to normalise rows only.")
        if backend not in get_args(PowerBackend):
            raise ValueError(f"backend is {backend!r}: there is no such backend. Use one of eager, compiled.")
        self.rank = rank
        self.backend = backend
        self.stats = EvaPStats()
        self._unwatch()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "weight_decay": weight_decay,
            "fallback": False,
            "fallback_ratio": fallback_ratio(fallback_lr, lr),
            "betas": tuple(betas),
            "eps": eps,
        }
        super().__init__(params, defaults)

    @override
    def _watch(self, found: FoundLayers) -> None:
        layers = [layer for layer in found.layers if layer.groups == 1]
        for layer in layers:
            self._check_directions(layer)
        self._layers = layers
        self._function = _step_of_all if self.backend == "eager" else compile_alone(_step_of_all)

    @override
    def _unwatch(self) -> None:
        self._layers, self._function, self._rho = [], None, {}

    @override
    def _reasons_of(self, found: FoundLayers) -> dict[str, str]:
        grouped = {f"{layer.name}.weight": "a convolution with groups" for layer in found.layers if layer.groups > 1}
        return {**found.reasons, **grouped}

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            RuntimeError: no module is attached.
            TypeError: a gradient is sparse.
        """
        if self._function is None:
            raise RuntimeError(
                "EvaP needs to know the layers: call optimizer.attach(model) or add AttachOptimizer to "
                "Trainer(callbacks=...)."
            )
        loss = evaluate(closure)
        self._check_dense()
        active = [layer for layer in self._layers if layer.weight.grad is not None]
        if active:
            with torch.autocast(active[0].weight.device.type, enabled=False):
                self._step_layers(active)
        done = {id(layer.weight) for layer in active}
        for group in self.param_groups:
            rest = [p for p in group["params"] if id(p) not in done and p.grad is not None]
            adamw_step(rest, self.state, group, lr=group["lr"] * group["fallback_ratio"])
        return loss

    def _step_layers(self, layers: list[Layer]) -> None:
        assert self._function is not None
        group_of = self._group_of()
        values: list[Any] = [(g["lr"], g["momentum"], g["damping"]) for g in self.param_groups]
        if self.backend == "compiled":  # a number would be compiled in, and anew for each value of a schedule
            dtype, device = wide_dtype(layer.weight for layer in layers), layers[0].weight.device
            values = [row.unbind() for row in send(torch.tensor(values, dtype=dtype), device)]
        tensors, directions, settings = [], [], []
        for layer in layers:
            order, group = is_channels_last(layer.weight), self.param_groups[group_of[id(layer.weight)]]
            buffer, grad = momentum_buffer(layer.weight, self.state), layer.weight.grad
            assert grad is not None
            tensors.append(
                tuple(as_matrices(each, 1, channels_last=order) for each in (layer.weight.detach(), buffer, grad))
            )
            directions.append(rows_in_memory_order(self._directions(layer), layer.weight, channels_last=order))
            settings.append(values[group_of[id(layer.weight)]])
            if group["weight_decay"]:
                layer.weight.mul_(1 - group["lr"] * group["weight_decay"])
        after = self._function(tensors, directions, settings)
        for layer, q_RD in zip(layers, after[: len(layers)], strict=True):
            order = is_channels_last(layer.weight)
            self.state[layer.weight]["leading"] = rows_in_weight_order(q_RD, layer.weight, channels_last=order)
        self._rho = {layer.name: rho for layer, rho in zip(layers, after[len(layers) :], strict=True)}
        self.stats = EvaPStats(self.stats.counted_steps + 1, len(layers))

    def _directions(self, layer: Layer) -> Tensor:
        state = self.state[layer.weight]
        if "leading" not in state:
            like = torch.empty(0, dtype=wide_dtype([layer.weight]), device=layer.weight.device)
            state["leading"] = start_directions(layer.fan_in, self._rank_of(layer), seed=layer.outputs, like=like)
        directions: Tensor = state["leading"]
        return directions

    def _rank_of(self, layer: Layer) -> int:
        return self.rank if self.rank < min(layer.outputs, layer.fan_in) else 0

    def _check_directions(self, layer: Layer) -> None:
        found = self.state.get(layer.weight, {}).get("leading")
        if found is not None and found.shape != (self._rank_of(layer), layer.fan_in):
            raise ValueError(
                f"The state of layer {layer.name!r} has {found.shape[0]} directions of {found.shape[1]} inputs, but "
                f"rank {self.rank} needs {self._rank_of(layer)} of {layer.fan_in}: it was saved with another rank or "
                "model. Set the rank of the checkpoint."
            )

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; directions keep their type, whatever that of the weights.

        Raises:
            ValueError: the state belongs to other shapes, or to another rank.
        """
        super().load_state_dict(state_dict)
        for layer in self._layers:
            self._check_directions(layer)

    def kv_report(self) -> dict[str, LayerReport]:
        """Say for each layer which share of its leading direction the last step took away, and why others have none.

        Waits for the device. Before the first step there are only the reasons.
        """
        report = {name: LayerReport(skipped=reason) for name, reason in self._reasons.items()}
        report.update((name, LayerReport(float(rho))) for name, rho in self._rho.items())
        return report


def _step_of_all(
    tensors: list[tuple[Tensor, Tensor, Tensor]],
    directions: list[Tensor],
    settings: list[tuple[float, float, float]],
) -> list[Tensor]:
    """Step all layers; return their new directions, then what each took away."""
    after = [
        leading_step(weight, buffer, grad, q_RD, lr=lr, momentum=momentum, damping=damping)
        for (weight, buffer, grad), q_RD, (lr, momentum, damping) in zip(tensors, directions, settings, strict=True)
    ]
    return [each.q_RD for each in after] + [each.rho for each in after]
