"""Keys and values of the requests that a Llama generates for, in memory that is reserved once.

Dimension letters: L layers, S slots, N rows of a step, K key-value heads, G query heads of each of them, H = K G query
heads, M most tokens of a slot, T tokens of a step, E size of a head, B = N rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_efficient.models.llama import LlamaConfig, rope_tables


class KeyValueCache:
    """Keys and values, (L, S, K, M, E) each, and how many tokens each slot holds.

    Args:
        config: of the model.
        slots: S.
        max_len: M.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self, config: LlamaConfig, slots: int, *, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, slots, config.kv_heads, max_len, config.head_size)
        # Zeros, not empty memory: a hidden value is multiplied by 0, and 0 times NaN is NaN.
        self.keys_LSKME = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LSKME = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * slots
        self.grouped = config.num_heads != config.kv_heads
        self.rope_ME = rope_tables(max_len, config.head_size, theta=config.rope_theta, device=device)

    @property
    def n_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys_LSKME.nbytes + self.values_LSKME.nbytes

    def prompts(self, slots: Sequence[int], lengths: Sequence[int]) -> PromptStep:
        """Return the step that reads a prompt into each of some slots; earlier contents are forgotten."""
        for slot, length in zip(slots, lengths, strict=True):
            self.lengths[slot] = length
        return PromptStep(self, slots, max(lengths))

    def next_tokens(self, slots: Sequence[int]) -> TokenStep:
        """Return the step that adds a token to each of some slots."""
        step = TokenStep(self, slots)
        for slot in slots:
            self.lengths[slot] += 1
        return step


class PromptStep:
    """A :class:`~lightning_efficient.models.llama.Past` without past: prompts, padded on the right.

    The padding comes after the tokens, so causal attention needs no mask; its keys stay hidden until the slot's own
    tokens replace them.
    """

    def __init__(self, cache: KeyValueCache, slots: Sequence[int], length: int) -> None:
        self._cache, self._rows, self._length = cache, _rows(slots, cache.keys_LSKME.device), length

    def rope(self) -> tuple[Tensor, Tensor]:
        """Return the tables of positions 0 to T - 1, (T, E)."""
        cos_ME, sin_ME = self._cache.rope_ME
        return cos_ME[: self._length], sin_ME[: self._length]

    def attend(
        self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, attention: Callable[..., Tensor]
    ) -> Tensor:
        """Keep the layer's keys and values, and attend as in training."""
        cache = self._cache
        cache.keys_LSKME[layer, self._rows, :, : self._length] = k_BKTE.to(cache.keys_LSKME.dtype)
        cache.values_LSKME[layer, self._rows, :, : self._length] = v_BKTE.to(cache.values_LSKME.dtype)
        return attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=cache.grouped)


class TokenStep:
    """A :class:`~lightning_efficient.models.llama.Past` for one token of each row, at the row's own position."""

    def __init__(self, cache: KeyValueCache, slots: Sequence[int]) -> None:
        device = cache.keys_LSKME.device
        lengths = [cache.lengths[slot] for slot in slots]
        self._cache, self._rows = cache, _rows(slots, device)
        self._slots_N = torch.tensor(slots, device=device)
        self._position_N = torch.tensor(lengths, device=device)
        self._seen = max(lengths) + 1
        visible_NM = torch.arange(self._seen, device=device) <= self._position_N[:, None]
        self._visible_N11M = visible_NM[:, None, None]

    def rope(self) -> tuple[Tensor, Tensor]:
        """Return the tables of the rows' positions, (N, 1, 1, E)."""
        cos_ME, sin_ME = self._cache.rope_ME
        return cos_ME[self._position_N, None, None], sin_ME[self._position_N, None, None]

    def attend(
        self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, attention: Callable[..., Tensor]
    ) -> Tensor:
        """Keep the layer's keys and values, and attend to all of each row."""
        keys_SKME, values_SKME = self._cache.keys_LSKME[layer], self._cache.values_LSKME[layer]
        keys_SKME[self._slots_N, :, self._position_N] = k_BKTE[:, :, 0].to(keys_SKME.dtype)
        values_SKME[self._slots_N, :, self._position_N] = v_BKTE[:, :, 0].to(values_SKME.dtype)
        keys_NKME = keys_SKME[self._rows, :, : self._seen].to(q_BHTE.dtype)
        values_NKME = values_SKME[self._rows, :, : self._seen].to(q_BHTE.dtype)
        # The query heads that share a key-value head stand where queries of one head would, so no key is repeated.
        N, H, _, E = q_BHTE.shape
        q_NKGE = q_BHTE.reshape(N, keys_NKME.shape[1], -1, E)
        y_NKGE = attention(q_NKGE, keys_NKME, values_NKME, attn_mask=self._visible_N11M, is_causal=False)
        return y_NKGE.reshape(N, H, 1, E)


def _rows(slots: Sequence[int], device: torch.device) -> Tensor | slice:
    """Neighbouring slots as a slice, which copies nothing; others as an index."""
    if list(slots) == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots, device=device)
