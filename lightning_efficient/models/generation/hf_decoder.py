"""Generation with a causal language model of transformers, through its own cache (extra ``hf``).

Dimension letters: N rows, C columns of the cache, T tokens of a step, K key-value heads, E size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.models.generation.checks import check_max_len, check_prompts
from lightning_efficient.models.generation.sampling import Pick, greedy

_SAME = 0.02  # logits of equal positions differ by rounding alone, also in bfloat16


class HFDecoder:
    """A :class:`~lightning_efficient.dissect.serving.Decoder` over a ``DynamicCache``.

    Rows end in the same column and begin where their prompt does; the columns before are masked. A request that starts
    or ends re-arranges rows, which copies the cache; each step copies it anyway, as ``DynamicCache`` appends. The
    model is set to ``eval``.

    Args:
        model: a ``PreTrainedModel`` with a language-modelling head and full attention caches.
        slots: most requests at a time.
        max_len: most tokens of a request; ``None``: the ``max_position_embeddings`` of its configuration.
        pick: chooses the next token ids (N,) from logits (N, V).

    Raises:
        ValueError: a number is below 1, or ``max_len`` exceeds what the model takes, or neither is known.
    """

    def __init__(self, model: nn.Module, slots: int, *, max_len: int | None = None, pick: Pick = greedy) -> None:
        config: Any = model.config
        self._max_len = check_max_len(slots, max_len, getattr(config, "max_position_embeddings", None))
        self._model, self._pick, self._slots = model.eval(), pick, slots
        self._device = next(model.parameters()).device
        known = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in known
        self._keep_last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._rows: list[int] = []
        self._cache: _Columns | None = None
        self._last: dict[int, int] = {}
        self._reads_mask = self._takes_positions

    @property
    def slots(self) -> int:
        """Most requests at a time."""
        return self._slots

    @property
    def max_seq_len(self) -> int:
        """Most tokens of a request."""
        return self._max_len

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are held now."""
        return 0 if self._cache is None else self._cache.n_bytes

    @torch.inference_mode()
    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Read a prompt into each of some free slots, and return the first token of each answer.

        Raises:
            ValueError: a slot is in use or does not exist, a prompt is empty or too long, the model keeps something
                else than keys and values, its positions do not begin where a prompt does, or its logits are not finite.
        """
        check_prompts(slots, prompts, in_use=self._last, n_slots=self._slots, max_len=self._max_len)
        self._require_positions()
        longest = max(len(prompt) for prompt in prompts)
        ids_NT = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask_NT = torch.zeros_like(ids_NT)
        for row, prompt in enumerate(prompts):
            ids_NT[row, longest - len(prompt) :] = torch.as_tensor(prompt)
            mask_NT[row, longest - len(prompt) :] = 1
        new, tokens = self._run(ids_NT.to(self._device), mask_NT.to(self._device), None)
        self._cache = new if self._cache is None else self._cache.joined(new)
        self._rows += slots
        return self._note(slots, tokens)

    @torch.inference_mode()
    def decode(self, slots: Sequence[int]) -> list[int]:
        """Return the next token of each of some slots in use.

        Raises:
            ValueError: a slot is not in use, or is full; or the logits are not finite.
        """
        for slot in slots:
            if slot not in self._last:
                raise ValueError(f"Slot {slot} holds no request: it has no next token. Prefill it first.")
        assert self._cache is not None
        asked = [row for row, slot in enumerate(self._rows) if slot in set(slots)]
        resting = [row for row in range(len(self._rows)) if row not in set(asked)]
        rows = [self._rows[row] for row in asked]
        past = self._cache.chosen(asked) if resting else self._cache
        if int(past.mask.sum(1).max()) >= self._max_len:
            raise ValueError(f"A slot of {rows} is full ({self._max_len} tokens): release it, or leave it out.")
        ids_N1 = torch.tensor([[self._last[slot]] for slot in rows], device=self._device)
        mask_NC = F.pad(past.mask, (0, 1), value=1)
        new, tokens = self._run(ids_N1, mask_NC, past)
        self._cache = new.joined(self._cache.chosen(resting)) if resting else new
        self._rows = rows + [self._rows[row] for row in resting]
        self._note(rows, tokens)
        return [self._last[slot] for slot in slots]

    def release(self, slots: Sequence[int]) -> None:
        """Free slots."""
        for slot in slots:
            del self._last[slot]
        kept = [row for row, slot in enumerate(self._rows) if slot in self._last]
        if len(kept) < len(self._rows):
            self._cache = self._cache.chosen(kept) if self._cache is not None and kept else None
            self._rows = [self._rows[row] for row in kept]

    def _run(self, ids_NT: Tensor, mask_NC: Tensor, past: _Columns | None) -> tuple[_Columns, list[int]]:
        from transformers import DynamicCache

        cache = DynamicCache() if past is None else past.as_cache()
        position_NT = (mask_NC.cumsum(1) - 1).clamp(min=0)[:, -ids_NT.shape[1] :]
        positions = {"position_ids": position_NT} if self._takes_positions else {}
        out = self._model(
            input_ids=ids_NT,
            attention_mask=mask_NC,
            past_key_values=cache,
            use_cache=True,
            **positions,
            **self._keep_last,
        )
        logits_NV = out.logits[:, -1]
        if not torch.isfinite(logits_NV).all():
            # transformers' eager attention in float64 does this to rows padded on the left (5.23).
            raise ValueError(
                f"{type(self._model).__name__} gives logits that are not finite: its answers mean nothing. Use "
                "attention sdpa, or float32, or other weights."
            )
        return _Columns.of(getattr(out, "past_key_values", None), mask_NC), self._pick(logits_NV).tolist()

    def _require_positions(self) -> None:
        """Refuse a model that counts positions from the padding: tried once, where it is not told them."""
        if self._reads_mask:
            return
        ids_1T = torch.tensor([[0, 0, 1, 2, 3]], device=self._device)
        mask_1T = torch.tensor([[0, 0, 1, 1, 1]], device=self._device)
        padded_V, alone_V = (
            self._model(input_ids=ids_1T[:, begin:], attention_mask=mask_1T[:, begin:]).logits[0, -1].float()
            for begin in (0, 2)
        )
        if (padded_V - alone_V).abs().max() > _SAME * alone_V.abs().max():
            raise ValueError(
                f"{type(self._model).__name__} counts positions from the padding on the left, and takes no "
                "position_ids: shorter prompts in a batch would get wrong answers. Use another model, or "
                "transformers' generate with one prompt at a time."
            )
        self._reads_mask = True

    def _note(self, slots: Sequence[int], tokens: list[int]) -> list[int]:
        self._last.update(zip(slots, tokens, strict=True))
        return tokens


@dataclass(frozen=True, slots=True)
class _Columns:
    """Keys and values of rows that end in the same column, and which of their columns count.

    Attributes:
        layers: keys and values of each layer, (N, K, C, E) each.
        mask: 1 where there is a token, (N, C).
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    @classmethod
    def of(cls, cache: Any, mask_NC: Tensor) -> _Columns:
        """Read a cache of transformers."""
        layers = tuple((layer.keys, layer.values) for layer in getattr(cache, "layers", ()) if hasattr(layer, "keys"))
        C = mask_NC.shape[1]
        if not layers or any(keys is None or keys.ndim != 4 or keys.shape[2] != C for keys, _ in layers):
            raise ValueError(
                f"The model keeps a {type(cache).__name__} that is not keys and values of each token: rows of "
                "different requests cannot be joined in it. Use a model with full attention in every layer."
            )
        return cls(layers, mask_NC)

    @property
    def n_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def as_cache(self) -> Any:
        """Return a cache of transformers that holds the same tensors."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, number)
        return cache

    def chosen(self, rows: Sequence[int]) -> _Columns:
        """Return some rows, without the columns that none of them uses."""
        index_N = torch.tensor(rows, device=self.mask.device)
        mask_NC = self.mask[index_N]
        first = int(mask_NC.any(0).int().argmax())
        layers = tuple((keys[index_N, :, first:], values[index_N, :, first:]) for keys, values in self.layers)
        return _Columns(layers, mask_NC[:, first:])

    def joined(self, other: _Columns) -> _Columns:
        """Return both groups of rows, the narrower one padded on the left."""
        C = max(self.mask.shape[1], other.mask.shape[1])

        def wide(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, C - x.shape[2], 0))

        layers = tuple(
            (torch.cat((wide(keys), wide(more_keys))), torch.cat((wide(values), wide(more_values))))
            for (keys, values), (more_keys, more_values) in zip(self.layers, other.layers, strict=True)
        )
        masks = [F.pad(each.mask, (C - each.mask.shape[1], 0)) for each in (self, other)]
        return _Columns(layers, torch.cat(masks))
