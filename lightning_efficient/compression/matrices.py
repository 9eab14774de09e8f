"""How a parameter's gradient is read as a matrix, and which ones are worth compressing.

Dimension letters: B batch of matrices, N rows, M columns, R rank.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor


@dataclass(frozen=True, slots=True)
class MatrixSpec:
    """A gradient seen as ``batch`` matrices of ``rows`` x ``cols``, each approximated at ``rank``.

    ``order`` lists the parameter's dimensions by falling stride: the order in which DDP's flat buffer holds them, which
    is not their own order for channels-last or transposed parameters.
    """

    batch: int
    rows: int
    cols: int
    rank: int
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, M), or (B, N, M) for a batch."""
        return (self.rows, self.cols) if self.batch == 1 else (self.batch, self.rows, self.cols)

    def factor_shape(self, width: int) -> tuple[int, ...]:
        """(R, width), or (B, R, width) for a batch."""
        return (self.rank, width) if self.batch == 1 else (self.batch, self.rank, width)

    def worth_compressing(self, min_compression_rate: float) -> bool:
        """Whether the mean of the two factors is ``min_compression_rate`` times smaller than the matrix."""
        return (self.rows + self.cols) * self.rank / 2 * min_compression_rate < self.rows * self.cols


def matrix_spec(parameter: Tensor, rank: int, *, batched: bool = False) -> MatrixSpec | None:
    """Read a parameter as matrices: (shape[0], rest), or with ``batched`` one (shape[1], rest) per leading index.

    Returns None for tensors with fewer than two dimensions (three when ``batched``), and for complex or empty ones.

    Raises:
        ValueError: ``batched``, and the leading dimension is not the outermost in memory.
    """
    lead = 1 if batched else 0
    if parameter.dim() < lead + 2 or parameter.is_complex() or parameter.numel() == 0:
        return None
    strides: tuple[int, ...] = parameter.stride()
    order = tuple(sorted(range(parameter.dim()), key=lambda dim: -strides[dim]))
    if batched and order[0] != 0:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} and strides {strides} cannot be read as a batch of "
            "matrices: its leading dimension is not the outermost in memory. Make it contiguous, or drop it from "
            "matrix_view."
        )
    sizes = [parameter.shape[dim] for dim in order]
    batch = sizes[0] if batched else 1
    rows, cols = sizes[lead], math.prod(sizes[lead + 1 :])
    return MatrixSpec(batch, rows, cols, min(rank, rows, cols), order)


def is_excluded(name: str, exclude: Sequence[str]) -> bool:
    """Whether ``name`` matches one of the shell patterns in ``exclude``."""
    return any(fnmatchcase(name, pattern) for pattern in exclude)


def is_batched(name: str, matrix_view: Mapping[str, str]) -> bool:
    """Whether ``matrix_view`` reads ``name`` as a batch of matrices; its first matching pattern decides."""
    for pattern, view in matrix_view.items():
        if re.search(pattern, name):
            return view == "batched"
    return False
