"""The two passes as Triton kernels, each one launch for all layers; deterministic, and without waiting for the device.

A layer of G groups is G matrices. Addresses, sizes and offsets of the matrices lie in tables on the device; a program
looks up its matrix and its block of it. :class:`~lightning_efficient.eva.step.EagerPasses` has the same signature.

Dimension letters: S matrices; R rows of all matrices; L layers; O rows and D columns of one matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_efficient.eva.layout import send
from lightning_efficient.eva.step import Group, LayerTensors, group_of_layers

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}
_ROWS, _COLUMNS = 16, 256
_UPDATE_ROWS, _UPDATE_COLUMNS = 8, 512


@triton.jit
def _project_kernel(
    grad_address, a_ptr, u_ptr, square_ptr, size_O, size_D, offset_a, offset_row, tile_matrix, tile_row,
    dtype: tl.constexpr, wide: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of one matrix: u = G a and the squared norm of each row, summed in a fixed order."""
    tile = tl.program_id(0)
    matrix = tl.load(tile_matrix + tile)
    O, D = tl.load(size_O + matrix), tl.load(size_D + matrix)
    grad = tl.load(grad_address + matrix).to(tl.pointer_type(dtype))
    a = a_ptr + tl.load(offset_a + matrix)
    rows = tl.load(tile_row + tile) + tl.arange(0, BLOCK_O)
    u = tl.zeros((BLOCK_O, BLOCK_D), dtype=wide)
    square = tl.zeros((BLOCK_O, BLOCK_D), dtype=wide)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < O)[:, None] & (columns < D)[None, :]
        block = tl.load(grad + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=inside, other=0.0).to(wide)
        u += block * tl.load(a + columns, mask=columns < D, other=0.0)[None, :]
        square += block * block
    out = tl.load(offset_row + matrix) + rows
    tl.store(u_ptr + out, tl.sum(u, 1), mask=rows < O)
    tl.store(square_ptr + out, tl.sum(square, 1), mask=rows < O)


@triton.jit
def _update_kernel(
    weight_address, momentum_address, grad_address, left_ptr, a_ptr, scale_ptr, lr_ptr, mu_ptr, decay_ptr,
    size_O, size_D, offset_a, offset_row, tile_matrix, tile_row, tile_column,
    dtype: tl.constexpr, wide: tl.constexpr, has_momentum: tl.constexpr, nesterov: tl.constexpr,
    decoupled: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of one matrix: D = c G - l a^T + decay W; M = mu M + D; W = W - lr M."""
    tile = tl.program_id(0)
    matrix = tl.load(tile_matrix + tile)
    O, D = tl.load(size_O + matrix), tl.load(size_D + matrix)
    rows = tl.load(tile_row + tile) + tl.arange(0, BLOCK_O)
    columns = tl.load(tile_column + tile) + tl.arange(0, BLOCK_D)
    inside = (rows < O)[:, None] & (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    lr, mu, decay = tl.load(lr_ptr + matrix), tl.load(mu_ptr + matrix), tl.load(decay_ptr + matrix)

    weights = tl.load(weight_address + matrix).to(tl.pointer_type(dtype)) + at
    grads = tl.load(grad_address + matrix).to(tl.pointer_type(dtype)) + at
    left = tl.load(left_ptr + tl.load(offset_row + matrix) + rows, mask=rows < O, other=0.0)
    a = tl.load(a_ptr + tl.load(offset_a + matrix) + columns, mask=columns < D, other=0.0)
    old = tl.load(weights, mask=inside, other=0.0).to(wide)
    step = tl.load(scale_ptr + matrix) * tl.load(grads, mask=inside, other=0.0).to(wide) - left[:, None] * a[None, :]
    if decoupled:
        old = old * (1 - lr * decay)
    else:
        step = step + decay * old
    if has_momentum:
        momenta = tl.load(momentum_address + matrix).to(tl.pointer_type(dtype)) + at
        momentum = mu * tl.load(momenta, mask=inside, other=0.0).to(wide) + step
        tl.store(momenta, momentum.to(dtype), mask=inside)
        step = step + mu * momentum if nesterov else momentum
    tl.store(weights, (old - lr * step).to(dtype), mask=inside)


@dataclass(frozen=True)
class _Tables:
    """What the kernels look up: by matrix, then by tile."""

    shapes: list[tuple[int, ...]]
    size_O: Tensor
    size_D: Tensor
    offset_a: Tensor
    offset_row: Tensor
    layer: Tensor
    starts_S: Tensor
    project_tiles: tuple[Tensor, Tensor]
    update_tiles: tuple[Tensor, Tensor, Tensor]


class TritonPasses:
    """The passes as two kernels.

    The weights must be contiguous, or contiguous with channels last, and of one floating-point type.
    """

    def __init__(self) -> None:
        self._tables: _Tables | None = None
        self._addresses: dict[str, tuple[list[int], Tensor]] = {}
        self._settings: tuple[list[list[float]], Tensor] | None = None

    def project(self, tensors: LayerTensors) -> tuple[Tensor, Tensor]:
        """See :class:`~lightning_efficient.eva.step.Passes`."""
        tables, dtype = self._prepare(tensors)
        a_A = torch.cat([a.reshape(-1) for a in tensors.inputs])
        rows = int(sum(shape[0] * shape[1] if len(shape) == 3 else shape[0] for shape in tables.shapes))
        u_R, square_R = a_A.new_empty(rows), a_A.new_empty(rows)
        grads = [grad.contiguous() for grad in tensors.grads]
        _project_kernel[(len(tables.project_tiles[0]),)](
            self._address("grads", grads), a_A, u_R, square_R, tables.size_O, tables.size_D, tables.offset_a,
            tables.offset_row, *tables.project_tiles,
            dtype=_TYPES[dtype], wide=_TYPES[a_A.dtype], BLOCK_O=_ROWS, BLOCK_D=_COLUMNS,
        )  # fmt: skip
        return u_R, torch.segment_reduce(square_R, "sum", offsets=tables.starts_S, unsafe=True)

    def update(self, tensors: LayerTensors, left_R: Tensor, scale_L: Tensor, groups: Sequence[Group]) -> None:
        """See :class:`~lightning_efficient.eva.step.Passes`."""
        tables, dtype = self._prepare(tensors)
        kinds = {(g.has_momentum, g.nesterov, g.decoupled_weight_decay) for g in groups if g.size}
        if len(kinds) > 1:
            raise ValueError(
                "The parameter groups differ in whether they have momentum, nesterov or decoupled_weight_decay: the "
                "Triton step has one kernel for all. Make them equal, or set backend='eager'."
            )
        has_momentum, nesterov, decoupled = kinds.pop()
        a_A = torch.cat([a.reshape(-1) for a in tensors.inputs])
        grads = [grad.contiguous() for grad in tensors.grads]
        lr, mu, decay = self._setting_tables(groups, tables, left_R)
        _update_kernel[(len(tables.update_tiles[0]),)](
            self._address("weights", tensors.weights),
            self._address("momenta", tensors.momenta),
            self._address("grads", grads),
            left_R, a_A, scale_L[tables.layer], lr, mu, decay, tables.size_O, tables.size_D, tables.offset_a,
            tables.offset_row, *tables.update_tiles,
            dtype=_TYPES[dtype], wide=_TYPES[a_A.dtype], has_momentum=has_momentum, nesterov=nesterov,
            decoupled=decoupled, BLOCK_O=_UPDATE_ROWS, BLOCK_D=_UPDATE_COLUMNS,
        )  # fmt: skip

    def _prepare(self, tensors: LayerTensors) -> tuple[_Tables, torch.dtype]:
        (dtype,) = _one({w.dtype for w in tensors.weights}, "types")
        shapes = [tuple(w.shape) for w in tensors.weights]
        if self._tables is None or self._tables.shapes != shapes:
            for tensor in (*tensors.weights, *tensors.momenta):
                if not tensor.is_contiguous():
                    raise ValueError(
                        f"A weight of shape {tuple(tensor.shape)} has strides {tensor.stride()}: the Triton step needs "
                        "contiguous weights. Call .contiguous() on it before training, or set backend='eager'."
                    )
            self._tables = _make_tables(shapes, tensors.weights[0].device)
            self._settings = None
        return self._tables, dtype

    def _address(self, kind: str, tensors: Sequence[Tensor]) -> Tensor:
        """The address of every matrix, on the device; sent again only where one has moved."""
        addresses = [
            tensor.data_ptr() + index * tensor[0].numel() * tensor.element_size()
            for tensor in tensors
            for index in range(tensor.shape[0] if tensor.ndim == 3 else 1)
        ]
        if kind not in self._addresses or self._addresses[kind][0] != addresses:
            self._addresses[kind] = addresses, send(torch.tensor(addresses), tensors[0].device)
        return self._addresses[kind][1]

    def _setting_tables(self, groups: Sequence[Group], tables: _Tables, like: Tensor) -> Tensor:
        """(3, S): learning rate, momentum and weight decay of each matrix."""
        by_layer = group_of_layers(groups)
        values = [[float(getattr(g, name)) for g in by_layer] for name in ("lr", "momentum", "weight_decay")]
        if self._settings is None or self._settings[0] != values:
            sent = send(torch.tensor(values, dtype=like.dtype), like.device)
            self._settings = values, sent[:, tables.layer].contiguous()
        return self._settings[1]


def _make_tables(shapes: list[tuple[int, ...]], device: torch.device) -> _Tables:
    matrices = [
        (shape[-2], shape[-1], i) for i, shape in enumerate(shapes) for _ in range(shape[0] if len(shape) == 3 else 1)
    ]
    sizes_O, sizes_D, layers = (list(each) for each in zip(*matrices, strict=True))
    project = [(s, row) for s, (O, _, _) in enumerate(matrices) for row in range(0, O, _ROWS)]
    update = [
        (s, row, column)
        for s, (O, D, _) in enumerate(matrices)
        for row in range(0, O, _UPDATE_ROWS)
        for column in range(0, D, _UPDATE_COLUMNS)
    ]

    def table(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=device)

    def columns(tiles: Sequence[tuple[int, ...]]) -> Any:
        return tuple(table(column) for column in zip(*tiles, strict=True))

    starts = [0, *torch.tensor(sizes_O).cumsum(0).tolist()]
    return _Tables(
        shapes=shapes,
        size_O=table(sizes_O),
        size_D=table(sizes_D),
        offset_a=table([0, *torch.tensor(sizes_D).cumsum(0).tolist()][:-1]),
        offset_row=table(starts[:-1]),
        layer=table(layers),
        starts_S=table(starts),
        project_tiles=columns(project),
        update_tiles=columns(update),
    )


def _one(found: set[torch.dtype], what: str) -> set[torch.dtype]:
    if len(found) != 1:
        raise ValueError(
            f"The weights have the {what} {', '.join(sorted(str(each) for each in found))}: the Triton step needs one. "
            "Convert the model to one type, or set backend='eager'."
        )
    return found
