"""Generation with the in-tree Llama.

Dimension letters: N rows of a step, T tokens of a step, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_efficient.models.generation.cache import KeyValueCache
from lightning_efficient.models.generation.checks import check_max_len, check_prompts
from lightning_efficient.models.generation.sampling import Pick, greedy
from lightning_efficient.models.llama import Llama


class LlamaDecoder:
    """A :class:`~lightning_efficient.dissect.serving.Decoder` with a cache that is reserved once.

    A slot's row of the cache grows by itself: rows of different lengths share a step without padding on the left, and
    a released slot is used again without touching the others. The model is set to ``eval``.

    Args:
        model: generates; its dtype and device are those of the cache.
        slots: most requests at a time.
        max_len: most tokens of a request; ``None``: the model's ``max_seq_len``.
        pick: chooses the next token ids (N,) from logits (N, V).

    Raises:
        ValueError: a number is below 1, or ``max_len`` exceeds the model's ``max_seq_len``.
    """

    def __init__(self, model: Llama, slots: int, *, max_len: int | None = None, pick: Pick = greedy) -> None:
        self._max_len = check_max_len(slots, max_len, model.config.max_seq_len)
        self._model, self._pick = model.eval(), pick
        weight = model.model.embed_tokens.weight
        self._device = weight.device
        self._cache = KeyValueCache(
            model.config, slots, max_len=self._max_len, dtype=weight.dtype, device=weight.device
        )
        self._last: dict[int, int] = {}

    @property
    def slots(self) -> int:
        """Most requests at a time."""
        return len(self._cache.lengths)

    @property
    def max_seq_len(self) -> int:
        """Most tokens of a request."""
        return self._max_len

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, used or not."""
        return self._cache.n_bytes

    @torch.inference_mode()
    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Read a prompt into each of some free slots, and return the first token of each answer.

        Raises:
            ValueError: a slot is in use or does not exist, or a prompt is empty or too long.
        """
        check_prompts(slots, prompts, in_use=self._last, n_slots=self.slots, max_len=self._max_len)
        lengths = [len(prompt) for prompt in prompts]
        ids_NT = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids_NT[row, : len(prompt)] = torch.as_tensor(prompt)
        x_NTD = self._model.model(ids_NT.to(self._device), self._cache.prompts(slots, lengths))
        last_N = torch.tensor(lengths, device=self._device) - 1
        return self._next(slots, x_NTD[torch.arange(len(slots), device=self._device), last_N])

    @torch.inference_mode()
    def decode(self, slots: Sequence[int]) -> list[int]:
        """Return the next token of each of some slots in use.

        Raises:
            ValueError: a slot is not in use, or is full.
        """
        for slot in slots:
            if slot not in self._last:
                raise ValueError(f"Slot {slot} holds no request: it has no next token. Prefill it first.")
            if self._cache.lengths[slot] >= self._max_len:
                raise ValueError(
                    f"Slot {slot} is full ({self._max_len} tokens): there is no room for another. Release it."
                )
        ids_N1 = torch.tensor([[self._last[slot]] for slot in slots], device=self._device)
        x_N1D = self._model.model(ids_N1, self._cache.next_tokens(slots))
        return self._next(slots, x_N1D[:, 0])

    def release(self, slots: Sequence[int]) -> None:
        """Free slots."""
        for slot in slots:
            del self._last[slot]

    def _next(self, slots: Sequence[int], x_ND: Tensor) -> list[int]:
        # The head sees one position of each row: a prompt's other logits would be the largest tensor of all.
        tokens: list[int] = self._pick(self._model.lm_head(x_ND)).tolist()
        self._last.update(zip(slots, tokens, strict=True))
        return tokens
