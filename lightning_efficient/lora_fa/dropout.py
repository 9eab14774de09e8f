r"""Seeded dropout: whether an entry is kept follows from the seed and the entry's place, so no mask is ever stored.

An entry (t, k) has the 32-bit number :math:`z = m(a(t) \oplus b(k))`, where a and b are hashes of its row and column
under the two words of the seed and m mixes once more; it is kept where :math:`z \ge p\,2^{32}`. The same integer
arithmetic runs in torch and in Triton, so a seed gives the same mask on every device, in blocks of any size, eager or
compiled.

Dimension letters: T rows (tokens), K columns.
"""

import torch
from torch import Tensor

GOLDEN = -0x61C88647
"""2^32 over the golden ratio, as an int32: spreads neighbouring indices."""
ROUND = (0x7FEB352D, -0x7B935975)
"""Multipliers of the mixing round; each int32."""


def draw_seed() -> Tensor:
    """Draw a seed, (2,) int32 on the CPU, from torch's default generator.

    From the CPU's generator on every device: no value has to be read from a device, and activation checkpointing, which
    restores that generator, repeats the mask.
    """
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64, device="cpu").to(torch.int32)


class Keep:
    """Which entries of a (T, K) matrix are kept, worked out a block of rows at a time in buffers that are reused.

    Args:
        seed_2: as of :func:`draw_seed`.
        rows: first row and the one after the last.
        columns: K.
        p: probability that an entry is dropped, in [0, 1).
        device: of the results.
    """

    def __init__(self, seed_2: Tensor, rows: tuple[int, int], columns: int, p: float, device: torch.device) -> None:
        count = rows[1] - rows[0]
        index = torch.cat([torch.arange(*each, dtype=torch.int32, device=device) for each in (rows, (0, columns))])
        seed_2 = seed_2.to(device)
        words = torch.cat([seed_2[0].expand(count), seed_2[1].expand(columns)])
        keys = _hash(index, words)
        self._rows_T1, self._columns_K = keys[:count, None], keys[count:]
        self._threshold = threshold(p)
        self._z: Tensor | None = None

    def mask(self, start: int, stop: int) -> Tensor:
        """Return the mask of some rows, (stop - start, K) bool."""
        return self._mixed(start, stop) >= self._threshold

    def factors(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return the mask of some rows as 0 and 1, (stop - start, K); the caller may write to it."""
        z_TK = self._mixed(start, stop)
        if torch.compiler.is_compiling():
            return (z_TK >= self._threshold).to(dtype)
        # Comparing into the wanted dtype saves converting, and multiplying by bool, which is slow on a CPU.
        return torch.ge(z_TK, self._threshold, out=torch.empty_like(z_TK, dtype=dtype))

    def _mixed(self, start: int, stop: int) -> Tensor:
        rows_T1 = self._rows_T1[start:stop]
        if self._z is None or self._z.shape[1] < stop - start or torch.compiler.is_compiling():
            self._z = rows_T1.new_empty(2, stop - start, len(self._columns_K))
        z_TK, scratch_TK = self._z[:, : stop - start]
        torch.bitwise_xor(rows_T1, self._columns_K, out=z_TK)
        return _round(z_TK, scratch_TK)


def keep_mask(seed_2: Tensor, rows: tuple[int, int], columns: int, p: float, device: torch.device) -> Tensor:
    """Return which entries are kept, (rows, columns) bool; the arguments are those of :class:`Keep`."""
    return Keep(seed_2, rows, columns, p, device).mask(0, rows[1] - rows[0])


def threshold(p: float) -> int:
    """Return the smallest int32 that is kept: numbers are compared as signed ones."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def _hash(index: Tensor, words: Tensor) -> Tensor:
    """Hash each index under its word of the seed, which enters before and after the mixing."""
    z = index * GOLDEN + words
    scratch = torch.empty_like(z)
    return _xor_shift(_round(z, scratch), 16, scratch).add_(words)


def _round(z: Tensor, scratch: Tensor) -> Tensor:
    """Mix the bits of z in place; the high ones, which decide, depend on all."""
    for multiplier, by in zip(ROUND, (16, 15), strict=True):
        _xor_shift(z, by, scratch).mul_(multiplier)
    return z


def _xor_shift(z: Tensor, by: int, scratch: Tensor) -> Tensor:
    """``z ^= z >>> by`` in place; torch's shift copies the sign, which has to go."""
    torch.bitwise_right_shift(z, by, out=scratch)
    return z.bitwise_xor_(scratch.bitwise_and_((1 << (32 - by)) - 1))
