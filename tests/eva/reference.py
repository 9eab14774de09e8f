"""Eva written out in NumPy and float64, one layer and one formula at a time, to hold the optimizer against.

Nothing here is vectorised over layers, V is formed, and the vectors come from recorded inputs and output gradients.

Dimension letters: K groups; O outputs of a group; D entries of a row of its weight; N samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]

LAYERS = (nn.Linear, nn.Conv2d)


@dataclass
class Use:
    """One call of a layer: its input, its output, and the gradient that arrived there."""

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor
    dy: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Use]]:
    """Yield the list of the uses of all layers inside the block."""
    uses: list[Use] = []
    handles = [
        module.register_forward_hook(lambda m, args, y, name=name: uses.append(Use(name, m, args[0].detach(), y)))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    yield uses
    for handle in handles:
        handle.remove()


def backward(loss: Tensor, uses: Sequence[Use]) -> None:
    """Fill ``dy`` of each use, then the gradients of the parameters."""
    for use, dy in zip(uses, torch.autograd.grad(loss, [use.y for use in uses], retain_graph=True), strict=True):
        use.dy = dy
    loss.backward()


# ---- vectors of one use ----------------------------------------------------------------------------------------------


def input_rows(module: nn.Module, x: Tensor) -> Array:
    """Every input that the weight matrix sees, (rows, K * D), by ``F.unfold`` for a convolution with zero padding."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).double().numpy()
    assert isinstance(module, nn.Conv2d)
    patches = F.unfold(x.double(), module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.transpose(1, 2).flatten(0, 1).numpy()


def output_rows(module: nn.Module, dy: Tensor) -> Array:
    """Every output gradient of the weight matrix, (rows, K * O)."""
    rows = dy if isinstance(module, nn.Linear) else dy.movedim(1, -1)
    return rows.reshape(-1, rows.shape[-1]).double().numpy()


def kronecker_vectors(uses: Sequence[Use], *, samples: int | None, g_scale: str) -> tuple[Array, Array]:
    """The vectors of one layer over all its uses of one step, (K, D) and (K, O)."""
    x_rows, dy_rows, g = [], [], 0.0
    module = uses[0].module
    for use in uses:
        n = len(use.x) if samples is None else min(samples, len(use.x))
        x_rows.append(input_rows(module, use.x[:n]))
        dy_rows.append(output_rows(module, use.dy[:n]))
        g = g + len(use.x) / n * dy_rows[-1].sum(0)
    groups = getattr(module, "groups", 1)
    if g_scale == "reference":
        g = np.concatenate(dy_rows).mean(0)
    return np.concatenate(x_rows).mean(0).reshape(groups, -1), np.asarray(g).reshape(groups, -1)


# ---- one matrix ------------------------------------------------------------------------------------------------------


def precondition(G: Array, a: Array, g: Array | None, damping: float, *, relative: bool, divide: bool) -> Array:
    """Sherman-Morrison, with the bias as last column of G and last entry of a."""
    curvature = a @ a if g is None else (a @ a) * (g @ g)
    gamma = damping * curvature if relative else damping
    if gamma + curvature == 0:
        V = G.copy()
    elif g is None:
        V = G - np.outer(G @ a, a) / (gamma + curvature)
    else:
        V = G - (g @ G @ a) / (gamma + curvature) * np.outer(g, a)
    return V / gamma if divide and not relative else V


def axis_means(G: Array) -> list[Array]:
    """Eva-s: the mean over all axes but one, for each axis."""
    return [G.mean(axis=tuple(j for j in range(G.ndim) if j != i)) for i in range(G.ndim)]


# ---- the optimizer ---------------------------------------------------------------------------------------------------


@dataclass
class ReferenceEva:
    """The whole method for one parameter group; the arguments are those of :class:`Eva`, with its rescale resolved."""

    model: nn.Module
    lr: float = 0.1
    variant: str = "eva"
    damping: float = 0.03
    damping_mode: str = "absolute"
    kl_clip: float | None = 1e-3
    rescale: str = "clip"
    kv_new_weight: float | str = 0.95
    kv_samples: int | None = 16
    kv_every: int = 1
    g_scale: str = "reference"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    fallback_lr: float | None = None

    def __post_init__(self) -> None:
        self.steps = 0
        self.vectors: dict[str, list[Array]] = {}
        self.momenta: dict[str, Array] = {}
        self.nu = 1.0

    def step(self, uses: Sequence[Use]) -> None:
        """Write the new weights into the model, whose gradients and ``uses`` are those of the step."""
        if self.variant == "eva_s":
            layers = {name: self._eva_s(name, p) for name, p in self._parameters() if p.ndim >= 2}
        else:
            layers = {}
            for name in {use.name: None for use in uses}:
                layers.update({name: self._layer(name, [use for use in uses if use.name == name])})
        self._apply(self._rescaled(layers))
        self.steps += 1

    def _average(self, key: str, new: list[Array]) -> list[Array]:
        if self.steps % self.kv_every == 0:
            old, xi = self.vectors.get(key), self.kv_new_weight
            if old is None:
                self.vectors[key] = new
            elif xi == "sum":
                self.vectors[key] = [m + n for m, n in zip(old, new, strict=True)]
            else:
                self.vectors[key] = [(1 - float(xi)) * m + float(xi) * n for m, n in zip(old, new, strict=True)]
        return self.vectors[key]

    def _layer(self, name: str, uses: Sequence[Use]) -> list[tuple[Array, Array]]:
        """G and V of each group's matrix."""
        module = uses[0].module
        a, g = self._average(name, list(kronecker_vectors(uses, samples=self.kv_samples, g_scale=self.g_scale)))
        grads = as_matrices(module)
        pairs = []
        for k, G in enumerate(grads):
            a_k = a[k] if module.bias is None else np.append(a[k], 1.0)
            V = precondition(
                G,
                a_k,
                None if self.variant == "eva_f" else g[k],
                self.damping,
                relative=self.damping_mode == "relative",
                divide=self.rescale != "normalize",
            )
            pairs.append((G, V))
        return pairs

    def _eva_s(self, name: str, p: nn.Parameter) -> list[tuple[Array, Array]]:
        G = _array(p.grad)
        vectors = self._average(name, axis_means(G))
        term = vectors[0]
        for vector in vectors[1:]:
            term = np.multiply.outer(term, vector)
        norms = np.prod([v @ v for v in vectors])
        gamma = self.damping * norms if self.damping_mode == "relative" else self.damping
        V = G - (G * term).sum() / (gamma + norms) * term
        return [(G, V)]

    def _rescaled(self, layers: dict[str, list[tuple[Array, Array]]]) -> dict[str, list[Array]]:
        pairs = [pair for each in layers.values() for pair in each]
        inner, grad_sq = sum((V * G).sum() for G, V in pairs), sum((G * G).sum() for G, _ in pairs)
        v_sq = sum((V * V).sum() for _, V in pairs)
        if self.rescale == "graft":
            return {name: _grafted(each) for name, each in layers.items()}
        self.nu = 1.0
        if self.rescale == "clip" and self.kl_clip is not None and inner > 0:
            self.nu = min(1.0, float(np.sqrt(self.kl_clip / (self.lr**2 * inner))))
        elif self.rescale == "normalize" and inner > 0:
            self.nu = float(1 / np.sqrt(inner))
        elif self.rescale == "match_grad" and v_sq > 0:
            self.nu = float(np.sqrt(grad_sq / v_sq))
        return {name: [self.nu * V for _, V in each] for name, each in layers.items()}

    def _apply(self, updates: dict[str, list[Array]]) -> None:
        modules = dict(self.model.named_modules())
        replaced: dict[str, Array] = {}
        for name, blocks in updates.items():
            if self.variant == "eva_s":
                replaced[name] = blocks[0]
                continue
            prefix, module = f"{name}." if name else "", modules[name]
            V = np.concatenate(blocks)
            if module.bias is not None:
                V, replaced[f"{prefix}bias"] = V[:, :-1], V[:, -1]
            replaced[f"{prefix}weight"] = V.reshape(tuple(module.weight.shape))
        for name, p in self._parameters():
            own = name in replaced
            lr = self.lr if own or self.fallback_lr is None else self.fallback_lr
            p.data.copy_(torch.from_numpy(self._sgd(name, _array(p.data), replaced.get(name, _array(p.grad)), lr)))

    def _sgd(self, name: str, W: Array, U: Array, lr: float) -> Array:
        if self.decoupled_weight_decay:
            W = W * (1 - lr * self.weight_decay)
        else:
            U = U + self.weight_decay * W
        if not self.momentum:
            return W - lr * U
        M = self.momenta[name] = self.momentum * self.momenta.get(name, 0.0) + U
        return W - lr * (U + self.momentum * M if self.nesterov else M)

    def _parameters(self) -> list[tuple[str, Any]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]


def as_matrices(module: nn.Module) -> list[Array]:
    """The gradient of each group with the bias as last column."""
    groups = getattr(module, "groups", 1)
    G = _array(module.weight.grad).reshape(groups, module.weight.shape[0] // groups, -1)
    if module.bias is None:
        return list(G)
    return list(np.concatenate([G, _array(module.bias.grad).reshape(groups, -1, 1)], axis=2))


def _grafted(pairs: list[tuple[Array, Array]]) -> list[Array]:
    grad, v = (np.sqrt(sum((each**2).sum() for each in column)) for column in zip(*pairs, strict=True))
    return [V * grad / (v + 1e-16) for _, V in pairs]


def _array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy().copy()
