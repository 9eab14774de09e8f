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

    From the CPU's generator on every device: no device is waited for, and what restores that generator (activation
    checkpointing, Lightning's resume) repeats the mask.
    """
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int64, device="cpu").to(torch.int32)


def keep_mask(seed_2: Tensor, rows: tuple[int, int], columns: int, p: float, device: torch.device) -> Tensor:
    """Return which entries are kept, (rows, columns) bool.

    Args:
        seed_2: as of :func:`draw_seed`.
        rows: first row and the one after the last.
        columns: K.
        p: probability that an entry is dropped, in [0, 1).
        device: of the result.
    """
    row_T1 = _hash(torch.arange(*rows, dtype=torch.int32, device=device), seed_2[0])[:, None]
    column_K = _hash(torch.arange(columns, dtype=torch.int32, device=device), seed_2[1])
    z_TK = row_T1.bitwise_xor(column_K)
    shifted_TK = torch.empty_like(z_TK)
    for multiplier, by in zip(ROUND, (16, 15), strict=True):
        _xor_shift(z_TK, by, shifted_TK).mul_(multiplier)
    return z_TK >= threshold(p)


def threshold(p: float) -> int:
    """Return the smallest int32 that is kept: numbers are compared as signed ones."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def _hash(index: Tensor, word: Tensor) -> Tensor:
    """Hash each index under a word of the seed: two mixing rounds, the word entering each."""
    z = index * GOLDEN + word
    shifted = torch.empty_like(z)
    for _ in range(2):
        for multiplier, by in zip(ROUND, (16, 15), strict=True):
            _xor_shift(z, by, shifted).mul_(multiplier)
        _xor_shift(z, 16, shifted).add_(word)
    return z


def _xor_shift(z: Tensor, by: int, scratch: Tensor) -> Tensor:
    """``z ^= z >>> by`` in place; torch's shift copies the sign, which has to go."""
    torch.bitwise_right_shift(z, by, out=scratch)
    return z.bitwise_xor_(scratch.bitwise_and_((1 << (32 - by)) - 1))
