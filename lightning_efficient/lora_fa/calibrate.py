r"""Choose A from batches: the leading directions of a layer's inputs ("eva"), or of its weight's gradient ("gradient").

Both are leading eigenvectors of a positive (K, K) matrix, :math:`\sum x x^\top` or :math:`G^\top G`, found by subspace
iteration on products with a few columns. No such matrix is ever formed, products add up over batches and ranks, and a
layer costs (K, R + 8) numbers. Sources: EVA (arXiv 2410.07170), LoRA-GA (arXiv 2407.05000).

Dimension letters: T tokens, K inputs, N outputs, R rank, Q columns of the sketch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.lora_fa.init import leading_directions, sketch
from lightning_efficient.lora_fa.inject import ADAPTER_NAME, adapted_layers, layer_generator

ROWS = 2048
"""Rows of a batch, evenly spread, that count for ``"gradient"``: they wait for the layer's output gradient."""


def calibrate(
    module: nn.Module,
    run: Callable[[], None],
    *,
    method: Literal["eva", "gradient"],
    seed: int = 0,
    adapter_name: str = ADAPTER_NAME,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Replace every A by one chosen from batches; B stays zero, so the model's output does not change.

    Args:
        module: has adapters.
        run: runs the same batches each time it is called, twice altogether; ``"gradient"`` needs their backward too.
        method: which directions.
        seed: of the sketch.
        adapter_name: which adapters.
        reduce: sums a tensor over ranks.

    Raises:
        ValueError: a layer saw no batch, or too few rows for its rank, or has a B that is not zero.
    """
    layers: dict[str, Any] = {n: layer for n, layer in adapted_layers(module).items() if adapter_name in layer.lora_A}
    for name, layer in layers.items():
        if layer.lora_B[adapter_name].weight.any():
            raise ValueError(
                f"The adapter of {name!r} was trained already: another A would change the model. Calibrate before "
                "training, right after apply_lora_fa."
            )
    make = _InputProduct if method == "eva" else _GradientProduct
    products = {}
    for name, layer in layers.items():
        down = layer.lora_A[adapter_name].weight
        start_KQ = sketch(down.shape[1], down.shape[0], layer_generator(seed, f"{name}/calibrate")).to(down.device)
        products[name] = make(layer, start_KQ, adapter_name)
    for _ in range(make.passes):
        handles = [handle for product in products.values() for handle in product.watch()]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        for name, product in products.items():
            product.turn(reduce(product.sum), int(reduce(product.rows)), name)
    with torch.no_grad():
        for name, layer in layers.items():
            down = layer.lora_A[adapter_name].weight
            down.copy_(products[name].directions(down.shape[0]))


class _Product:
    passes = 2

    def __init__(self, layer: Any, start_KQ: Tensor, adapter_name: str) -> None:
        self.layer, self.adapter_name = layer, adapter_name
        self.basis = start_KQ
        self.sum = torch.zeros_like(start_KQ)
        self.rows = torch.zeros((), dtype=torch.int64, device=start_KQ.device)

    def turn(self, total: Tensor, rows: int, name: str) -> None:
        if not torch.isfinite(total).all():
            raise ValueError(f"The calibration batches gave {name!r} values that are not finite. Check the data.")
        if not total.any():
            raise ValueError(f"No calibration batch reached {name!r}: its A cannot be chosen. Use init='orthogonal'.")
        rank = self.layer.r[self.adapter_name]
        if rows < rank:
            raise ValueError(
                f"The calibration batches gave {name!r} {rows} rows for its rank {rank}: they say nothing of the other "
                "directions. Give more batches, or lower r."
            )


class _InputProduct(_Product):
    r"""Products with :math:`\sum x x^\top`: the first pass finds a basis, the second the leading part of it."""

    def watch(self) -> list[RemovableHandle]:
        self.sum = torch.zeros_like(self.basis)
        self.rows.zero_()
        return [self.layer.register_forward_pre_hook(self._add)]

    def _add(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        with torch.no_grad(), torch.autocast(self.basis.device.type, enabled=False):
            x_TK = args[0].detach().reshape(-1, args[0].shape[-1]).to(self.basis.dtype)
            self.sum += x_TK.t() @ (x_TK @ self.basis)
            self.rows += len(x_TK)

    def turn(self, total: Tensor, rows: int, name: str) -> None:
        super().turn(total, rows, name)
        self.previous, self.basis, self.sum = self.basis, torch.linalg.qr(total).Q, total

    def directions(self, rank: int) -> Tensor:
        # After the second pass `sum` is the product with the first pass's basis.
        total = self.sum
        return leading_directions(lambda _: total, self.previous, rank, iterations=1)


class _GradientProduct(_Product):
    r"""A sketch of G: first the range of :math:`G \Omega`, then :math:`P^\top G` in the orthonormal basis P of it."""

    def __init__(self, layer: Any, start_KQ: Tensor, adapter_name: str) -> None:
        super().__init__(layer, start_KQ, adapter_name)
        self.range_NQ: Tensor | None = None

    def watch(self) -> list[RemovableHandle]:
        outputs = int(self.layer.out_features)
        shape = (
            (outputs, self.basis.shape[1]) if self.range_NQ is None else (self.range_NQ.shape[1], self.basis.shape[0])
        )
        self.sum = self.basis.new_zeros(shape)
        self.rows.zero_()
        return [self.layer.register_forward_hook(self._listen)]

    def _listen(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if not y.requires_grad:
            return
        x_TK = args[0].detach().reshape(-1, args[0].shape[-1])
        rows = torch.linspace(0, len(x_TK) - 1, min(ROWS, len(x_TK)), device=x_TK.device).long()
        y.register_hook(partial(self._add, x_TK[rows].to(self.basis.dtype), rows))

    def _add(self, x_TK: Tensor, rows: Tensor, dy: Tensor) -> None:
        dy_TN = dy.detach().reshape(-1, dy.shape[-1])[rows].to(x_TK.dtype)
        self.rows += len(x_TK)
        with torch.autocast(self.basis.device.type, enabled=False):
            if self.range_NQ is None:
                self.sum += dy_TN.t() @ (x_TK @ self.basis)
            else:
                self.sum += (dy_TN @ self.range_NQ).t() @ x_TK

    def turn(self, total: Tensor, rows: int, name: str) -> None:
        super().turn(total, rows, name)
        self.sum = total
        if self.range_NQ is None:
            self.range_NQ = torch.linalg.qr(total).Q

    def directions(self, rank: int) -> Tensor:
        right_QK: Tensor = torch.linalg.svd(self.sum, full_matrices=False).Vh
        return right_QK[:rank].contiguous()
