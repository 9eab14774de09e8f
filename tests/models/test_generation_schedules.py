"""Any order of starting, advancing and releasing requests gives each of them the tokens of whole forward passes."""

import random
from typing import Any

import pytest
import torch

from lightning_efficient.models import Llama, LlamaConfig
from lightning_efficient.models.generation import decoder_for

SLOTS, LONGEST, VOCABULARY = 4, 40, 50


def sharp_llama() -> Llama:
    """In float64 and far from uniform attention, so that a wrong key shows and rounding turns no argmax."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    model = Llama(LlamaConfig(vocab_size=VOCABULARY, max_seq_len=LONGEST, **sizes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


@torch.no_grad()
def next_by_whole_forward(model: Llama, ids: list[int]) -> int:
    return int(model(torch.tensor([ids]))[0, -1].argmax())


@pytest.mark.parametrize("kind", ["llama", "transformers"])
@pytest.mark.parametrize("seed", range(5))
def test_any_schedule_gives_the_tokens_of_whole_forwards(kind: str, seed: int) -> None:
    model = sharp_llama()
    served: Any = model
    if kind == "transformers":
        transformers = pytest.importorskip("transformers")
        served = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_hf())).double()
        served.load_state_dict(model.state_dict())
    decoder, numbers = decoder_for(served, SLOTS), random.Random(seed)
    held: dict[int, list[int]] = {}
    checked = 0
    for _ in range(60):
        free = [slot for slot in range(SLOTS) if slot not in held]
        what = numbers.random()
        if free and what < 0.3:
            slots = numbers.sample(free, numbers.randint(1, len(free)))
            held |= {slot: [numbers.randrange(VOCABULARY) for _ in range(numbers.randint(1, 12))] for slot in slots}
            tokens = decoder.prefill(slots, [held[slot] for slot in slots])
        elif held and what < 0.85:
            asked = numbers.sample(sorted(held), numbers.randint(1, len(held)))
            slots = [slot for slot in asked if len(held[slot]) < LONGEST]
            tokens = decoder.decode(slots) if slots else []
        else:
            slots, tokens = [], []
            ended = numbers.sample(sorted(held), numbers.randint(0, len(held)))
            decoder.release(ended)
            for slot in ended:
                del held[slot]
        for slot, token in zip(slots, tokens, strict=True):
            assert token == next_by_whole_forward(model, held[slot])
            held[slot].append(token)
            checked += 1
    assert checked > 50
