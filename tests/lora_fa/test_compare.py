"""The table of a model's own saved bytes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, compare_saved_bytes
from lightning_efficient.models.llama import LLAMA_PRESETS, Llama, LlamaConfig

T, K, F, R = 48, 32, 64, 4


def loss(model: nn.Module) -> Tensor:
    return model(torch.zeros(T, K)).sum()


def test_every_row_is_what_the_method_has_to_keep() -> None:
    model = nn.Sequential(nn.Linear(K, F), nn.GELU(), nn.Linear(F, K))
    rows = compare_saved_bytes(model, loss, LoRAFAConfig(r=R)).rows
    x, e, a, h = T * K * 4, T * F * 4, T * F * 4, T * R * 4
    assert rows == {
        "full fine-tuning": x + e + a,
        "LoRA": x + e + a + 2 * h,
        "LoRA, A frozen": e + 2 * h,
        "LoRA-FA": e + 2 * h,
        "LoRA-FA, lean blocks": e + 2 * h,
    }


def test_lean_blocks_keep_less_and_the_model_stays_as_it_is() -> None:
    model = Llama(LlamaConfig(vocab_size=64, **LLAMA_PRESETS["tiny"])).eval()
    before = copy.deepcopy(model.state_dict())
    ids = torch.zeros(1, 32, dtype=torch.int64)
    table = compare_saved_bytes(model, lambda m: m(ids).sum(), LoRAFAConfig(r=R))
    assert table.ratio("LoRA-FA, lean blocks") > table.ratio("LoRA-FA") > 1.2
    assert table.ratio("full fine-tuning") < 1
    assert "LoRA-FA, lean blocks" in str(table)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_with_adapters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(K, K))
    apply_lora_fa(model, LoRAFAConfig(r=R))
    with pytest.raises(ValueError, match="has adapters already"):
        compare_saved_bytes(model, loss)
