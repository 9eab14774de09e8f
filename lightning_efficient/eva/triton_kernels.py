"""The two kernels of a step. A program looks up its matrix in tables, and works on one block of it.

Dimension letters: O rows and D columns of one matrix.
"""

import triton
import triton.language as tl


@triton.jit
def project_kernel(
    grad_address, a_ptr, u_ptr, square_ptr, size_O, size_D, offset_a, offset_row, tile_matrix, tile_row,
    dtype: tl.constexpr, wide: tl.constexpr, align: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of one matrix: u = G a and the squared norm of each row, summed in a fixed order."""
    tile = tl.program_id(0)
    matrix = tl.load(tile_matrix + tile)
    O, D = tl.load(size_O + matrix), tl.load(size_D + matrix)
    grad = tl.load(grad_address + matrix).to(tl.pointer_type(dtype))
    if align > 1:
        grad, D = tl.multiple_of(grad, 16), tl.multiple_of(D, align)
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
def update_kernel(
    weight_address, momentum_address, grad_address, left_ptr, a_ptr, scale_ptr, lr_ptr, mu_ptr, decay_ptr,
    size_O, size_D, offset_a, offset_row, tile_matrix, tile_row, tile_column,
    dtype: tl.constexpr, wide: tl.constexpr, has_momentum: tl.constexpr, nesterov: tl.constexpr,
    decoupled: tl.constexpr, align: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of one matrix: D = c G - l a^T + decay W; M = mu M + D; W = W - lr M."""
    tile = tl.program_id(0)
    matrix = tl.load(tile_matrix + tile)
    O, D = tl.load(size_O + matrix), tl.load(size_D + matrix)
    weight = tl.load(weight_address + matrix).to(tl.pointer_type(dtype))
    momentum_start = tl.load(momentum_address + matrix).to(tl.pointer_type(dtype))
    grad = tl.load(grad_address + matrix).to(tl.pointer_type(dtype))
    if align > 1:
        weight, grad, D = tl.multiple_of(weight, 16), tl.multiple_of(grad, 16), tl.multiple_of(D, align)
        momentum_start = tl.multiple_of(momentum_start, 16)
    rows = tl.load(tile_row + tile) + tl.arange(0, BLOCK_O)
    columns = tl.multiple_of(tl.load(tile_column + tile), BLOCK_D) + tl.arange(0, BLOCK_D)
    inside = (rows < O)[:, None] & (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    lr, mu, decay = tl.load(lr_ptr + matrix), tl.load(mu_ptr + matrix), tl.load(decay_ptr + matrix)

    weights, grads = weight + at, grad + at
    left = tl.load(left_ptr + tl.load(offset_row + matrix) + rows, mask=rows < O, other=0.0)
    a = tl.load(a_ptr + tl.load(offset_a + matrix) + columns, mask=columns < D, other=0.0)
    old = tl.load(weights, mask=inside, other=0.0).to(wide)
    step = tl.load(scale_ptr + matrix) * tl.load(grads, mask=inside, other=0.0).to(wide) - left[:, None] * a[None, :]
    if decoupled:
        old = old * (1 - lr * decay)
    else:
        step = step + decay * old
    if has_momentum:
        momenta = momentum_start + at
        momentum = mu * tl.load(momenta, mask=inside, other=0.0).to(wide) + step
        tl.store(momenta, momentum.to(dtype), mask=inside)
        step = step + mu * momentum if nesterov else momentum
    tl.store(weights, (old - lr * step).to(dtype), mask=inside)
