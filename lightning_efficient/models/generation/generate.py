"""The simple way to generate, and the decoder that fits a model.

Dimension letters: B batch, T sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_efficient.dissect.serving import Decoder
from lightning_efficient.models.generation.hf_decoder import HFDecoder
from lightning_efficient.models.generation.llama_decoder import LlamaDecoder
from lightning_efficient.models.generation.sampling import Pick, Sampling, greedy
from lightning_efficient.models.llama import Llama


def generate(
    model: nn.Module,
    ids_BT: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue token ids.

    Args:
        model: a :class:`~lightning_efficient.models.Llama`, or a causal language model of transformers. Its training
            mode is as before afterwards.
        ids_BT: prompts of equal length, (B, T) int64.
        max_new_tokens: tokens to add.
        temperature: 0 takes the most likely token; above, tokens are drawn from the softmax of the logits over it.
        top_k: draw among so many of the most likely tokens.
        generator: of the random numbers.

    Returns:
        Prompts and answers, (B, T + max_new_tokens), on the device of ``ids_BT``.

    Raises:
        ValueError: the ids are not a matrix, or the sequence gets longer than the model takes.
        TypeError: the model is neither of the two.
    """
    if ids_BT.ndim != 2 or not ids_BT.numel() or max_new_tokens < 1:
        raise ValueError(
            f"Token ids of shape {tuple(ids_BT.shape)} and {max_new_tokens} new tokens: generate takes (batch, "
            "sequence), and 1 or more to add."
        )
    if temperature == 0 and (top_k, generator) != (None, None):
        raise ValueError("temperature is 0, so nothing is drawn: top_k and generator have no effect. Raise it.")
    B, T = ids_BT.shape
    pick: Pick = Sampling(temperature, top_k, generator) if temperature else greedy
    training = [module for module in model.modules() if module.training]
    try:
        decoder = decoder_for(model, B, max_len=T + max_new_tokens, pick=pick)
        rows = list(range(B))
        columns = [decoder.prefill(rows, ids_BT.tolist())]
        columns += [decoder.decode(rows) for _ in range(max_new_tokens - 1)]
    finally:
        for module in training:
            module.training = True
    return torch.cat((ids_BT, torch.tensor(columns, device=ids_BT.device).T), dim=1)


def decoder_for(model: nn.Module, slots: int, *, max_len: int | None = None, pick: Pick = greedy) -> Decoder:
    """Return the decoder that fits a model.

    Args:
        model: a :class:`~lightning_efficient.models.Llama`, or a causal language model of transformers.
        slots: most requests at a time.
        max_len: most tokens of a request; ``None``: what the model takes.
        pick: chooses the next token ids (N,) from logits (N, V).

    Raises:
        ValueError: a number is out of range.
        TypeError: the model is neither of the two.
    """
    if isinstance(model, Llama):
        return LlamaDecoder(model, slots, max_len=max_len, pick=pick)
    if hasattr(model, "prepare_inputs_for_generation") and hasattr(model, "config"):
        return HFDecoder(model, slots, max_len=max_len, pick=pick)
    raise TypeError(
        f"{type(model).__name__} cannot generate: tokens come from a Llama of lightning_efficient.models or from a "
        "causal language model of transformers. Give one of the two."
    )


def longest_sequence(model: nn.Module) -> int | None:
    """Return the most tokens that a model takes, prompt and answer together; None where it does not say."""
    config = getattr(model, "config", None)
    name = "max_seq_len" if isinstance(model, Llama) else "max_position_embeddings"
    longest: int | None = getattr(config, name, None)
    return longest
