"""The two passes as one launch each of a Triton kernel, for all layers; deterministic, and no wait for the device.

A layer of G groups is G matrices. Addresses, sizes and offsets of the matrices lie in tables on the device.
:class:`~lightning_efficient.eva.step.EagerPasses` is the same in torch's operations.

Dimension letters: S matrices; R rows of all matrices; L layers; O rows and D columns of one matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lightning_efficient.eva.layout import send
from lightning_efficient.eva.step import Group, LayerTensors, group_of_layers
from lightning_efficient.eva.triton_kernels import project_kernel, update_kernel

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}
_VECTOR = 16  # bytes of the widest load
_ROWS, _COLUMNS = 16, 256
_UPDATE_ROWS, _UPDATE_COLUMNS = 8, 512


@dataclass(frozen=True)
class _Addresses:
    """Where the matrices of one kind start, here and on the device, and whether wide loads may start there."""

    values: list[int]
    table: Tensor
    aligned: bool


@dataclass(frozen=True)
class _Tables:
    """What the kernels look up: by matrix, then by tile."""

    shapes: list[tuple[int, ...]]
    columns: list[int]
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
        self._addresses: dict[str, _Addresses] = {}
        self._settings: tuple[list[list[float]], Tensor] | None = None

    def project(self, tensors: LayerTensors) -> tuple[Tensor, Tensor]:
        """See :class:`~lightning_efficient.eva.step.Passes`."""
        tables, dtype = self._prepare(tensors)
        a_A = torch.cat([a.reshape(-1) for a in tensors.inputs])
        rows = int(sum(shape[0] * shape[1] if len(shape) == 3 else shape[0] for shape in tables.shapes))
        u_R, square_R = a_A.new_empty(rows), a_A.new_empty(rows)
        contiguous = [grad.contiguous() for grad in tensors.grads]  # must live until the kernel is launched
        grads = self._address("grads", contiguous)
        project_kernel[(len(tables.project_tiles[0]),)](
            grads.table, a_A, u_R, square_R, tables.size_O, tables.size_D, tables.offset_a, tables.offset_row,
            *tables.project_tiles, dtype=_TYPES[dtype], wide=_TYPES[a_A.dtype],
            align=_alignment(tables, dtype, grads), BLOCK_O=_ROWS, BLOCK_D=_COLUMNS,
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
        weights, momenta = self._address("weights", tensors.weights), self._address("momenta", tensors.momenta)
        contiguous = [grad.contiguous() for grad in tensors.grads]  # must live until the kernel is launched
        grads = self._address("grads", contiguous)
        lr, mu, decay = self._setting_tables(groups, tables, left_R)
        update_kernel[(len(tables.update_tiles[0]),)](
            weights.table, momenta.table, grads.table, left_R, a_A, scale_L[tables.layer], lr, mu, decay,
            tables.size_O, tables.size_D, tables.offset_a, tables.offset_row, *tables.update_tiles,
            dtype=_TYPES[dtype], wide=_TYPES[a_A.dtype], has_momentum=has_momentum, nesterov=nesterov,
            decoupled=decoupled, align=_alignment(tables, dtype, weights, momenta, grads),
            BLOCK_O=_UPDATE_ROWS, BLOCK_D=_UPDATE_COLUMNS,
        )  # fmt: skip

    def _prepare(self, tensors: LayerTensors) -> tuple[_Tables, torch.dtype]:
        (dtype,) = _one({w.dtype for w in tensors.weights}, "types")
        shapes = [tuple(w.shape) for w in tensors.weights]
        for tensor in (*tensors.weights, *tensors.momenta):
            if not tensor.is_contiguous():
                raise ValueError(
                    f"A weight of shape {tuple(tensor.shape)} has strides {tensor.stride()}: the Triton step needs "
                    "contiguous weights. Call .contiguous() on it before training, or set backend='eager'."
                )
        if self._tables is None or self._tables.shapes != shapes:
            self._tables = _make_tables(shapes, tensors.weights[0].device)
            self._settings = None
        return self._tables, dtype

    def _address(self, kind: str, tensors: Sequence[Tensor]) -> "_Addresses":
        """The address of every matrix, on the device; sent again only where one has moved."""
        addresses = [
            tensor.data_ptr() + index * tensor[0].numel() * tensor.element_size()
            for tensor in tensors
            for index in range(tensor.shape[0] if tensor.ndim == 3 else 1)
        ]
        if kind not in self._addresses or self._addresses[kind].values != addresses:
            table = send(torch.tensor(addresses), tensors[0].device)
            self._addresses[kind] = _Addresses(addresses, table, all(address % _VECTOR == 0 for address in addresses))
        return self._addresses[kind]

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
        columns=sizes_D,
        size_O=table(sizes_O),
        size_D=table(sizes_D),
        offset_a=table([0, *torch.tensor(sizes_D).cumsum(0).tolist()][:-1]),
        offset_row=table(starts[:-1]),
        layer=table(layers),
        starts_S=table(starts),
        project_tiles=columns(project),
        update_tiles=columns(update),
    )


def _alignment(tables: _Tables, dtype: torch.dtype, *addresses: _Addresses) -> int:
    """Entries of which every row and matrix is a multiple, so that they can be loaded together; 1 if there are none."""
    entries = _VECTOR // dtype.itemsize
    fits = all(each.aligned for each in addresses) and all(columns % entries == 0 for columns in tables.columns)
    return entries if fits else 1


def _one(found: set[torch.dtype], what: str) -> set[torch.dtype]:
    if len(found) != 1:
        raise ValueError(
            f"The weights have the {what} {', '.join(sorted(str(each) for each in found))}: the Triton step needs one. "
            "Convert the model to one type, or set backend='eager'."
        )
    return found
