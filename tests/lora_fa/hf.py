"""Tiny models of transformers with random weights, one for each kind of linear and feed-forward block."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.lora_fa.nets import ids


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def _roberta() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def _t5(feed_forward: str) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=48, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, feed_forward_proj=feed_forward,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=32, n_embd=32, n_layer=2, n_head=4))


MODELS = {
    "llama": _llama,
    "roberta": _roberta,
    "t5 relu": lambda: _t5("relu"),
    "t5 gated-gelu": lambda: _t5("gated-gelu"),
    "gpt2": _gpt2,
}


def build(name: str, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]()


def logits(model: nn.Module, name: str) -> Tensor:
    extra = {"decoder_input_ids": ids(2, 5, seed=1)} if name.startswith("t5") else {}
    out: Tensor = model(input_ids=ids(2, 7) + 1 if name == "roberta" else ids(2, 7), **extra).logits
    return out
