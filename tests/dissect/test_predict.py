"""Memory predicted without memory is what the allocator gives out, and a known sum where it is a known sum."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

from lightning_efficient.dissect import LiveBytes, predict_memory, state_bytes
from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa
from lightning_efficient.models import LLAMA_PRESETS, Llama, LlamaConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(technique: str, dtype: torch.dtype) -> Llama:
    attention = "sdpa" if "F" in technique.split("+") else "eager"
    config = LlamaConfig(256, 128, 352, 3, 4, max_seq_len=128, attention=attention)
    model = Llama(config, activation_checkpointing="R" in technique).to(dtype)
    if technique == "L":
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(r=16, target_modules=LINEARS), model)
    if technique == "LFA":
        apply_lora_fa(model, LoRAFAConfig(r=16))
    return model.to(dtype) if technique == "L" else model


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, foreach=False)


def tokens() -> Tensor:
    return torch.zeros(4, 128, dtype=torch.int64)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())


def allocated(build: Callable[[], nn.Module]) -> int:
    """The largest sum of what the CPU's allocator has given out, over a second step."""
    model, ids = build(), tokens()
    optimizer = adam([each for each in model.parameters() if each.requires_grad])
    loss_of(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    state = state_bytes(model, [optimizer])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss_of(model, ids).backward()
        optimizer.step()
    now = top = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return state.parameter_bytes + state.optimizer_bytes + ids.nbytes + top


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("technique", ["none", "F", "R", "F+R", "L", "LFA"])
def test_the_peak_is_the_allocators(technique: str, dtype: torch.dtype) -> None:
    def build() -> Llama:
        return llama(technique, dtype)

    predicted = predict_memory(build, tokens, run=loss_of, optimizer=adam, block=1)

    # What operators hold inside, such as a cast within a product of two types, is not seen: 1.1 % for LFA in bfloat16,
    # under 0.02 % in the others.
    assert predicted.peak_bytes == pytest.approx(allocated(build), rel=2e-2)


def test_a_linear_is_a_known_sum() -> None:
    rows, inputs, outputs = 64, 128, 256
    weight, x, y = 4 * inputs * outputs, 4 * rows * inputs, 4 * rows * outputs

    predicted = predict_memory(
        lambda: nn.Linear(inputs, outputs, bias=False),
        lambda: torch.empty(rows, inputs),
        run=lambda model, batch: model(batch).sum(),
        optimizer=lambda parameters: SGD(parameters, momentum=0.9),
    )

    assert predicted.parameter_bytes == predicted.gradient_bytes == predicted.optimizer_bytes == weight
    assert predicted.saved_bytes == x
    # The weight, its momentum and its gradient; the input; at most the output's gradient, and some scalars.
    assert predicted.peak_at in ("backward", "optimizer")
    assert predicted.peak_bytes >= 3 * weight + x
    assert predicted.peak_bytes <= 3 * weight + x + y + 4 * 512


def test_small_tensors_take_a_block() -> None:
    with LiveBytes(512) as live:
        a = torch.ones(3)
        b = torch.ones(129)
        view = a[1:]
        assert live.now == 512 + 1024
        del a
        assert live.now == 512 + 1024  # the view holds it
        del view, b
    assert live.now == 0
    assert live.peak == 512 + 1024


def test_llama_7b_takes_no_memory() -> None:
    def build() -> Llama:
        return Llama(LlamaConfig(**LLAMA_PRESETS["7b"], attention="sdpa"), activation_checkpointing=True).bfloat16()

    predicted = predict_memory(
        build, lambda: torch.zeros(1, 512, dtype=torch.int64), run=loss_of, optimizer=lambda p: AdamW(p, foreach=False)
    )

    weights = 6_738_415_616
    assert predicted.parameter_bytes == predicted.gradient_bytes == 2 * weights
    assert predicted.optimizer_bytes == pytest.approx(4 * weights, rel=1e-6)
    assert predicted.peak_bytes > 8 * weights


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda model, batch: model(batch).sum() * model(batch).sum().item(), "looks at the values"),
        (lambda model, batch: model(batch)[batch.sum(-1) > 0].sum(), "looks at the values"),
    ],
)
def test_a_step_that_looks_at_values_says_so(run: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict_memory(lambda: nn.Linear(4, 4), lambda: torch.ones(2, 4), run=run, optimizer=lambda p: SGD(p, lr=0.1))


def test_a_frozen_model_has_no_step() -> None:
    with pytest.raises(ValueError, match="No parameter of the module trains"):
        predict_memory(
            lambda: nn.Linear(4, 4).requires_grad_(False),
            lambda: torch.ones(2, 4),
            run=lambda model, batch: model(batch).sum(),
            optimizer=lambda p: SGD(p, lr=0.1),
        )
