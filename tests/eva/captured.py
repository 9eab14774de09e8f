"""Read what a capture holds, layer by layer, and compute what it must hold from a plain copy of the net."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.eva import KVCapture, Layout, find_layers

ByLayer = dict[str, Tensor]


class Watch:
    """A capture of all layers of a model, with all samples and the expectation convention unless told otherwise."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.plain = copy.deepcopy(model)
        layers = find_layers(model, model.parameters()).layers
        self.layers = {layer.name: layer for layer in layers}
        self._layout = Layout.of(layers, torch.device("cpu"))
        dtype = torch.promote_types(torch.float32, next(model.parameters()).dtype)
        defaults = {"samples": None, "outputs": True, "g_scale": "expectation"}
        self.capture = KVCapture(
            layers, self._layout, dtype=dtype, device=torch.device("cpu"), **{**defaults, **settings}
        )
        self.capture.watch()

    def vectors(self, loss_scale: float | None = None) -> tuple[ByLayer, ByLayer]:
        """Mean inputs and output gradients since the last :meth:`KVCapture.clear`, flat, by layer; NaN where unused."""
        self.capture.reduce(None, 1)
        vectors = self.capture.vectors(world_size=1, loss_scale=loss_scale)
        a = vectors.a_A.split(self._layout.input_sizes)
        g = () if vectors.g_R is None else vectors.g_R.split(self._layout.output_sizes)
        return dict(zip(self.layers, a, strict=True)), dict(zip(self.layers, g, strict=bool(g)))

    def bias_gradients(self) -> ByLayer:
        """The gradients of the biases of the watched model."""
        return {n: each.bias.grad for n, each in self.layers.items() if each.bias is not None}  # type: ignore[misc]

    def mean_inputs(self, *batches: Tensor, samples: int | None = None) -> ByLayer:
        """Mean row of each layer's input when the copy sees these batches, by the gradient of a uniform output."""
        seen: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        modules = {name: self.plain.get_submodule(name) for name in self.layers}
        handles = [
            module.register_forward_hook(lambda m, args, y, name=name: seen[name].append(args[0].detach().clone()))
            for name, module in modules.items()
        ]
        with torch.no_grad():
            for x in batches:
                self.plain(x)
        for handle in handles:
            handle.remove()
        means = {}
        for name, inputs in seen.items():
            sums, rows = zip(*(sum_of_rows(modules[name], x, samples) for x in inputs), strict=True)
            means[name] = torch.stack(sums).sum(0) / sum(rows)
        return means


def sum_of_rows(module: nn.Module, x: Tensor, samples: int | None = None) -> tuple[Tensor, int]:
    """What the weight sees, summed over rows: its gradient where the gradient of every output is 1; and the rows."""
    module = copy.deepcopy(module)
    module._forward_hooks.clear()
    if samples is not None:
        x = x[:samples]
    with torch.enable_grad():
        output = module(x)
        (gradient,) = torch.autograd.grad(output.sum(), module.weight)
    groups = getattr(module, "groups", 1)
    return gradient.unflatten(0, (groups, -1))[:, 0].flatten(), output.numel() // len(module.weight)


def agree(actual: ByLayer, expected: ByLayer, *, rtol: float = 1e-12) -> None:
    """Equal up to ``rtol`` of the largest entry of each vector, for every layer of ``expected``."""
    assert expected
    for name, vector in expected.items():
        atol = rtol * vector.abs().max().item()
        torch.testing.assert_close(actual[name], vector.to(actual[name].dtype), rtol=0, atol=atol)
