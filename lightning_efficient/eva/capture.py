"""Capture the Kronecker vectors of a module's layers while it trains.

A forward hook sums the layer's input and hands the sum to a hook on the output tensor; that one, which runs only where
the graph is really back-propagated, stages the pair, which counts once the weight has received the gradient of that
pass. So an evaluation pass, a dropped forward, the second forward of activation checkpointing, and a gradient with
respect to inputs leave no trace, and accumulated micro-batches add up.

Pending vectors lie in one flat tensor with the same layout on every rank, whatever each of them used: the collective of
a step is one all-reduce of it.

Dimension letters: L layers; A entries of all layers' inputs; R outputs of all layers.
"""

import contextlib
import weakref
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient._compat import base_of_view, graph_task_id, tensor_version
from lightning_efficient.eva.layers import Layer
from lightning_efficient.eva.layout import Layout, send
from lightning_efficient.eva.vectors import conv_taps, count_rows, input_sum, output_sum

K = TypeVar("K")
GScale = Literal["reference", "expectation"]

_nothing = contextlib.nullcontext()
_cached_taps = lru_cache(maxsize=256)(conv_taps)


class Vectors(NamedTuple):
    """The vectors of one optimizer step, averaged over rows and ranks; NaN for layers that no rank has used.

    Attributes:
        a_A: mean input of each layer.
        g_R: output gradient of each layer; None where it is not captured.
        finite: whether every rank's sums were finite, a scalar.
    """

    a_A: Tensor
    g_R: Tensor | None
    finite: Tensor


class _Captured(NamedTuple):
    """Sums over the rows of one layer."""

    a: Tensor
    g: Tensor | None
    rows: int


def _add(captured: dict[K, _Captured], key: K, new: _Captured) -> None:
    # Out of place: a may be the sum of several layers that read one tensor.
    old = captured.get(key)
    if old is not None:
        g = None if old.g is None or new.g is None else old.g + new.g
        new = _Captured(old.a + new.a, g, old.rows + new.rows)
    captured[key] = new


class KVCapture:
    """Hooks on layers, put on by :meth:`watch`, and what they have captured since the last :meth:`clear`.

    Args:
        layers: those to watch; each has a module.
        layout: of these layers.
        samples: how many samples of each batch count, from the first on; ``None``: all.
        outputs: whether output gradients are wanted too.
        g_scale: ``"expectation"``: output gradients are summed over rows, as a bias does, and a subset of samples
            stands for all; ``"reference"``: averaged over the rows that count, as the published code does.
        dtype: of the sums.
        device: of the sums.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        layout: Layout,
        *,
        samples: int | None,
        outputs: bool,
        g_scale: GScale,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.enabled = True
        self.layout = layout
        self.samples = samples
        self.outputs = outputs
        self.g_scale = g_scale
        self.dtype = dtype
        self._layers = list(layers)
        self._last_input: tuple[weakref.ref[Tensor], int, Tensor] | None = None
        sizes = [sum(layout.input_sizes), sum(layout.output_sizes) if outputs else 0, len(layers)]
        self._pending = torch.zeros(sum(sizes), dtype=dtype, device=device)
        parts: tuple[Tensor, Tensor, Tensor] = self._pending.split(sizes)
        self._a_A, self._g_R, self._rows_L = parts
        self._a = self._a_A.split(layout.input_sizes)
        self._g = self._g_R.split(layout.output_sizes) if outputs else ()
        self._rows = self._rows_L.unbind()
        zeros = torch.zeros_like(self._pending)
        self._no_a = zeros[: sizes[0]].split(layout.input_sizes)
        self._no_g = zeros[: sizes[1]].split(layout.output_sizes) if outputs else ()
        self._sent_rows: tuple[list[int], Tensor] | None = None
        self._forget_eager()
        self._listening: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        # A module takes its hooks along when it is pickled; a reference to a tensor cannot go.
        return {**self.__dict__, "_last_input": None}

    def watch(self) -> None:
        """Put the hooks on."""
        for index, layer in enumerate(self._layers):
            assert layer.module is not None
            on_forward = partial(self._on_forward, index)
            self._handles.append(layer.module.register_forward_hook(on_forward, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off; graphs built before still commit, to nobody."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._listening.clear()

    def clear(self) -> None:
        """Forget what was captured since the last collection."""
        # Through .data, which counts as no change: a compiled graph has saved the tensor for its backward, and Trainers
        # zero gradients between forward and backward.
        self._pending.data.zero_()
        self._forget_eager()
        self._last_input = None

    def _forget_eager(self) -> None:
        self._staged: dict[tuple[int, int], _Captured] = {}
        self._kept: dict[int, _Captured] = {}

    @property
    def rows(self) -> Tensor:
        """Rows captured since the last :meth:`clear`, by layer, once :meth:`reduce` was called."""
        return self._rows_L

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _on_forward(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if not (self.enabled and module.training and torch.is_grad_enabled() and output.requires_grad):
            return
        if not module.weight.requires_grad:
            return
        if index not in self._listening and not torch.compiler.is_compiling():
            # Only now: a frozen weight takes no such hook, and may have been frozen when the others were put on.
            self._listening.add(index)
            hook = partial(self._on_accumulated, index)
            self._handles.append(self._layers[index].weight.register_post_accumulate_grad_hook(hook))
        x = args[0] if args else kwargs["input"]
        rows, share = count_rows(module, output, samples=self.samples)
        device = x.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _nothing:
            a = self._input_sum(module, x)
        # An in-place operation on a view gives the view a new history, and hooks on the old one never run; those on
        # its base do.
        base = base_of_view(output)
        target = output if base is None or base.numel() != output.numel() else base
        target.register_hook(partial(self._on_backward, index, module, a, rows, share, output.shape))

    def _on_backward(
        self, index: int, module: nn.Module, a: Tensor, rows: int, share: float, shape: torch.Size, dy: Tensor
    ) -> None:
        with torch.no_grad():
            g = None
            if self.outputs:
                g = output_sum(module, dy.view(shape), samples=self.samples, dtype=self.dtype)
                if share != 1 and self.g_scale == "expectation":
                    g = g * share
            if torch.compiler.is_compiling():
                # What a compiled graph writes must be a tensor: an entry in a dict would be made once, at compile time.
                self._a[index].add_(a.reshape(-1))
                self._rows[index].add_(rows)
                if g is not None:
                    self._g[index].add_(g)
                return
            # By pass too: a reentrant checkpoint runs a backward pass inside of another.
            _add(self._staged, (index, graph_task_id()), _Captured(a, g, rows))

    def _on_accumulated(self, index: int, weight: Tensor) -> None:
        """Keep what this backward pass has staged, now that the weight has received its gradient."""
        staged = self._staged.pop((index, graph_task_id()), None)
        if staged is not None:
            _add(self._kept, index, staged)

    def _input_sum(self, module: nn.Module, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return input_sum(module, x, samples=self.samples, dtype=self.dtype, taps=conv_taps)
        if not isinstance(module, nn.Linear):
            return input_sum(module, x, samples=self.samples, dtype=self.dtype, taps=_cached_taps)
        # Query, key and value projections read one tensor: sum it once.
        version = tensor_version(x)
        if self._last_input is not None and self._last_input[0]() is x and self._last_input[1] == version:
            return self._last_input[2]
        a = input_sum(module, x, samples=self.samples, dtype=self.dtype, taps=_cached_taps)
        self._last_input = (weakref.ref(x), version, a)
        return a

    # ---- collection ------------------------------------------------------------------------------------------------

    def reduce(self, group: dist.ProcessGroup | None, world_size: int) -> None:
        """Sum the pending vectors over the ranks: one all-reduce, of the same size on each."""
        if self._kept:
            found = [self._kept.get(index) for index in range(len(self._layers))]
            self._pending += torch.cat(
                [none if each is None else each.a.reshape(-1) for each, none in zip(found, self._no_a, strict=True)]
                + [
                    each.g if each and each.g is not None else none
                    for each, none in zip(found, self._no_g, strict=False)
                ]
                + [self._send_rows([0 if each is None else each.rows for each in found])]
            )
            self._forget_eager()
        if world_size > 1:
            dist.all_reduce(self._pending, group=group)

    def _send_rows(self, counts: list[int]) -> Tensor:
        """Row counts on the device, sent only where they have changed."""
        if self._sent_rows is None or self._sent_rows[0] != counts:
            self._sent_rows = counts, send(torch.tensor(counts, dtype=self.dtype), self._pending.device)
        return self._sent_rows[1]

    def vectors(self, *, world_size: int, loss_scale: Tensor | float | None) -> Vectors:
        r"""Turn the pending sums into vectors.

        With sums over all rows r of all ranks and micro-batches, and :math:`n` the samples of a batch over those that
        count::

            a = sum x_r / rows
            g = sum n dy_r / ranks    "expectation"
            g = sum dy_r / rows       "reference"

        Args:
            world_size: ranks that were summed.
            loss_scale: what the loss was multiplied with; None: 1.
        """
        a_A = self._a_A / self._rows_L[self.layout.layer_of_input_A]
        g_R = None
        if self.outputs:
            rows_R = self._rows_L[self.layout.layer_of_row_R]
            count_R = rows_R if self.g_scale == "reference" else torch.where(rows_R > 0, world_size, 0)
            g_R = self._g_R / (count_R if loss_scale is None else count_R * loss_scale)
        return Vectors(a_A, g_R, self._pending.isfinite().all())
