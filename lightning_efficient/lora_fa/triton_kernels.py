"""The kernels: dropout by seed fused with the rank-R products, and the gated activation.

The hash is the one of ``dropout.py``, bit for bit: torch and Triton draw the same mask from a seed.

Dimension letters: T tokens, K inputs, R rank, F width of the block.
"""

import triton
import triton.language as tl

_ANY = ["first_row", "word_row", "word_column", "threshold"]
"""Arguments that differ from call to call: no value of theirs deserves a kernel of its own."""


@triton.jit
def _round(z):
    z = (z ^ (z >> 16)) * 0x7FEB352D
    return (z ^ (z >> 15)) * 0x846CA68B


@triton.jit
def _hash(index, word):
    z = _round(index * 0x9E3779B9 + word)
    return (z ^ (z >> 16)) + word


@triton.jit
def _keep(row, column, word_row, word_column, threshold):
    """Which entries are kept; words and threshold are int32."""
    row_hash = _hash(row.to(tl.uint32), word_row.to(tl.uint32, bitcast=True))
    column_hash = _hash(column.to(tl.uint32), word_column.to(tl.uint32, bitcast=True))
    z = row_hash[:, None] ^ column_hash[None, :]
    return _round(z).to(tl.int32, bitcast=True) >= threshold


@triton.jit(do_not_specialize=_ANY)
def project_kernel(
    x_ptr, a_ptr, h_ptr, T, K, R, first_row, word_row, word_column, threshold, scale,
    x_stride, dtype: tl.constexpr, precision: tl.constexpr, DROP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """H = scale D(x) A^T for a block of rows and all of R."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    h = tl.zeros((BLOCK_T, BLOCK_R), dtype=wide)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = (rows < T)[:, None] & (columns < K)[None, :]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(dtype)
        if DROP:
            x = tl.where(_keep(rows + first_row, columns, word_row, word_column, threshold), x, 0.0)
        a = tl.load(
            a_ptr + ranks[None, :] * K + columns[:, None],
            mask=(columns < K)[:, None] & (ranks < R)[None, :],
            other=0.0,
        )
        h = tl.dot(x, a, h, input_precision=precision, out_dtype=wide)
    out = h_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :]
    tl.store(out, (h * scale).to(dtype), mask=(rows < T)[:, None] & (ranks < R)[None, :])


@triton.jit(do_not_specialize=_ANY)
def expand_kernel(
    dx_ptr, u_ptr, a_ptr, T, K, R, first_row, word_row, word_column, threshold, scale,
    dtype: tl.constexpr, dx_dtype: tl.constexpr, precision: tl.constexpr, DROP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Dx += scale M * (u A) for one block of dx."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    sum = tl.zeros((BLOCK_T, BLOCK_K), dtype=wide)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        u = tl.load(
            u_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :],
            mask=(rows < T)[:, None] & (ranks < R)[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + ranks[:, None] * K + columns[None, :],
            mask=(ranks < R)[:, None] & (columns < K)[None, :],
            other=0.0,
        )
        sum = tl.dot(u, a, sum, input_precision=precision, out_dtype=wide)
    sum *= scale
    if DROP:
        sum = tl.where(_keep(rows + first_row, columns, word_row, word_column, threshold), sum, 0.0)
    inside = (rows < T)[:, None] & (columns < K)[None, :]
    at = dx_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :]
    tl.store(at, (tl.load(at, mask=inside, other=0.0).to(wide) + sum).to(dx_dtype), mask=inside)


@triton.jit
def swiglu_kernel(e_ptr, g_ptr, a_ptr, numel, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """A = silu(e) g, elementwise; silu is rounded to the dtype before the product, as two operations would."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    e = tl.load(e_ptr + at, mask=inside, other=0.0).to(wide)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(wide)
    silu = (e / (1 + tl.exp(-e))).to(dtype).to(wide)
    tl.store(a_ptr + at, (silu * g).to(dtype), mask=inside)


@triton.jit
def swiglu_gradient_kernel(
    da_ptr, e_ptr, g_ptr, de_ptr, dg_ptr, numel, dtype: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Dg = da silu(e) and de = da g silu'(e), elementwise."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    da = tl.load(da_ptr + at, mask=inside, other=0.0).to(wide)
    e = tl.load(e_ptr + at, mask=inside, other=0.0).to(wide)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(wide)
    sigmoid = 1 / (1 + tl.exp(-e))
    tl.store(dg_ptr + at, (da * (e * sigmoid).to(dtype).to(wide)).to(dtype), mask=inside)
    tl.store(de_ptr + at, ((da * g).to(dtype).to(wide) * sigmoid * (1 + e * (1 - sigmoid))).to(dtype), mask=inside)
