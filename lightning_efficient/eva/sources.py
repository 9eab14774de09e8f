"""Where the vectors of a step come from: a module's layers (Eva, Eva-f), or the gradients themselves (Eva-s).

Dimension letters: A entries of the active layers' input vectors; R their outputs.
"""

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_efficient.eva.capture import KVCapture
from lightning_efficient.eva.config import EvaConfig
from lightning_efficient.eva.gradient_vectors import axis_means, outer_of_axes
from lightning_efficient.eva.layers import Layer
from lightning_efficient.eva.layout import Layout
from lightning_efficient.eva.matrices import has_matrix_view
from lightning_efficient.eva.running import RunningVectors, running_average

States = Sequence[dict[str, Any]]
"""The optimizer's state of each layer's weight, in the layers' order."""

T = TypeVar("T")


def wide_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the type of vectors and scalars: float32, or wider where a weight is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class LayerVectors:
    """Vectors captured from layers while their module trains; averages in the optimizer's state.

    Args:
        layers: those to watch, each with a module.
        config: of the optimizer.
        group: the process group; None: all ranks.

    Raises:
        NotImplementedError: the weights lie on several devices.
    """

    def __init__(self, layers: Sequence[Layer], config: EvaConfig, group: dist.ProcessGroup | None) -> None:
        devices = {layer.weight.device for layer in layers}
        if len(devices) > 1:
            raise NotImplementedError(
                f"The weights lie on {', '.join(sorted(map(str, devices)))}: Eva needs them on one device. Move the "
                "model to one, or put the other weights into a parameter group with fallback=True."
            )
        (self.device,) = devices
        self.layers = list(layers)
        self.dtype = wide_dtype(layer.weight for layer in layers)
        self._layout = Layout.of(layers, self.device)
        self._config, self._group = config, group
        self._capture = KVCapture(
            layers,
            self._layout,
            samples=config.kv_samples,
            outputs=config.needs_outputs,
            g_scale=config.g_scale,
            dtype=self.dtype,
            device=self.device,
        )
        kinds = {"kv_a": self._layout.input_sizes}
        if config.needs_outputs:
            kinds["kv_g"] = self._layout.output_sizes
        self._running = RunningVectors(self.layers, kinds, dtype=self.dtype, device=self.device)

    def check(self, states: States) -> None:
        """Compare the sizes of a loaded state with the layers; raises ValueError."""
        self._running.gather(states)

    def watch(self) -> None:
        """Put the hooks on."""
        self._capture.watch()

    def capture(self, enabled: bool) -> None:
        """Say whether the coming forward passes count."""
        self._capture.enabled = enabled

    def clear(self) -> None:
        """Forget what was captured since the last step."""
        self._capture.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        self._capture.remove()

    def reduce(self) -> None:
        """Sum what was captured over the ranks: the one collective of a step."""
        self._capture.reduce(self._group, self._world_size())

    def unseen(self, active: Sequence[bool]) -> list[str]:
        """Return the names of active layers that no rank has captured since the last step. Waits for the device."""
        rows = self._capture.rows.tolist()
        return [
            layer.name
            for layer, is_active, count in zip(self.layers, active, rows, strict=True)
            if is_active and count == 0
        ]

    def refresh(self, states: States, loss_scale: Tensor | float | None) -> Tensor:
        """Average what was captured into the state; return whether it was finite and counted, a scalar."""
        vectors = self._capture.vectors(world_size=self._world_size(), loss_scale=loss_scale)
        new = vectors.a_A if vectors.g_R is None else torch.cat((vectors.a_A, vectors.g_R))
        averages = running_average(
            self._running.gather(states), new, new_weight=self._config.kv_new_weight, accept=vectors.finite
        )
        self._running.scatter(states, averages)
        self._capture.clear()
        return vectors.finite

    def vectors(self, states: States, active: Sequence[bool]) -> tuple[Tensor, Tensor | None]:
        """Return the averages of the active layers, (A,) and (R,) or None; 0 where there is no value yet."""
        flat = self._running.gather(states).nan_to_num(nan=0.0)
        sizes = (self._layout.input_sizes, self._layout.output_sizes if self._config.needs_outputs else [])
        a_A, g_R = flat.split([sum(each) for each in sizes])
        if not all(active):
            a_A = torch.cat(_chosen(a_A.split(sizes[0]), active))
            if self._config.needs_outputs:
                g_R = torch.cat(_chosen(g_R.split(sizes[1]), active))
        return a_A, g_R if self._config.needs_outputs else None

    def _world_size(self) -> int:
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1


class GradientVectors:
    """Means of each gradient over all axes but one; sums or averages of them in the optimizer's state.

    Under data parallelism gradients are equal on all ranks, and so are these: nothing is sent.

    Args:
        layers: the weights, each of two axes or more.
        config: of the optimizer.
    """

    def __init__(self, layers: Sequence[Layer], config: EvaConfig) -> None:
        self.layers = list(layers)
        self.device = layers[0].weight.device
        self.dtype = wide_dtype(layer.weight for layer in layers)
        self._config = config
        self._running: dict[tuple[bool, ...], RunningVectors] = {}

    def refresh(self, states: States, active: Sequence[bool]) -> Tensor:
        """Average the means of the active gradients into the state; return whether they were finite, a scalar."""
        states = _chosen(states, active)
        means = [axis_means(each.weight.grad, self.dtype) for each in _chosen(self.layers, active)]  # type: ignore[arg-type]
        new = torch.cat([mean.others for mean in means] + [mean.first_O for mean in means])
        finite = new.isfinite().all()
        running = self._running_of(active)
        averages = running_average(running.gather(states), new, new_weight=self._config.kv_new_weight, accept=finite)
        running.scatter(states, averages)
        return finite

    def vectors(self, states: States, active: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Return the input-side and output-side vectors of the active layers, (A,) and (R,)."""
        flat = self._running_of(active).gather(_chosen(states, active)).nan_to_num(nan=0.0)
        chosen = _chosen(self.layers, active)
        sizes = [_axes_size(layer) for layer in chosen]
        *others, first_R = flat.split([*sizes, flat.numel() - sum(sizes)])
        a = [outer_of_axes(each, layer.weight.shape) for each, layer in zip(others, chosen, strict=True)]
        return torch.cat(a), first_R

    def watch(self) -> None:
        """Do nothing: gradients are there when they are needed."""

    clear = remove = watch

    def capture(self, enabled: bool) -> None:
        """Do nothing."""

    def check(self, states: States) -> None:
        """Compare the sizes of a loaded state with the weights; raises ValueError."""
        self._running_of([True] * len(self.layers)).gather(states)

    def _running_of(self, active: Sequence[bool]) -> RunningVectors:
        key = tuple(active)
        if key not in self._running:
            chosen = _chosen(self.layers, active)
            kinds = {"kv_a": [_axes_size(each) for each in chosen], "kv_g": [each.outputs for each in chosen]}
            self._running[key] = RunningVectors(chosen, kinds, dtype=self.dtype, device=self.device)
        return self._running[key]


def _chosen(all_: Sequence[T], active: Sequence[bool]) -> list[T]:
    return list(itertools.compress(all_, active))


def _axes_size(layer: Layer) -> int:
    return sum(layer.weight.shape[1:])


def bare_layers(groups: Sequence[dict[str, Any]], names: dict[int, str], skipped: Collection[int]) -> list[Layer]:
    """Return every weight of two axes or more as a layer without a module (Eva-s), if its memory is that of a matrix.

    Args:
        groups: parameter groups; those with ``fallback`` are left out.
        names: of parameters, by id.
        skipped: ids of those to leave out.
    """
    return [
        Layer(names.get(id(p), f"param_groups[{i}]['params'][{j}]"), p)
        for i, group in enumerate(groups)
        if not group["fallback"]
        for j, p in enumerate(group["params"])
        if isinstance(p, nn.Parameter) and p.ndim >= 2 and id(p) not in skipped and has_matrix_view(p)
    ]
