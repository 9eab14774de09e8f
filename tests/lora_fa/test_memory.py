"""What the adapters keep for backward: h, and nothing of x. Counted where autograd is handed it, and watched die."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, saved_bytes
from tests.lora_fa.nets import fill_B, normal, quantised

T, K, N, R, WIDE = 40, 24, 16, 4, 40
SEED_BYTES = 8
BASES: dict[str, Callable[[], nn.Module]] = {
    "float32": lambda: nn.Linear(K, N),
    "bfloat16": lambda: nn.Linear(K, N).to(torch.bfloat16),
    "nf4": lambda: quantised("nf4", normal(N, K, dtype=torch.float32)),
    "int8": lambda: quantised("int8", normal(N, K, dtype=torch.float32)),
}


def wrapped(base: str, *, rank: int = R, **settings: Any) -> nn.Module:
    model = nn.Sequential(BASES[base]())
    apply_lora_fa(model, LoRAFAConfig(r=rank, **settings))
    return fill_B(model)


def leaf(base: str) -> Tensor:
    # LLM.int8() computes in float16 and warns of other inputs.
    kinds = {"bfloat16": torch.bfloat16, "int8": torch.float16}
    return normal(T, K, dtype=kinds.get(base, torch.float32), grad=True)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("rank", [1, R, 2 * R])
@pytest.mark.parametrize("base", BASES)
def test_an_adapted_linear_keeps_h_and_a_seed(base: str, rank: int, p: float) -> None:
    model, x = wrapped(base, rank=rank, dropout=p), leaf(base)
    kept = saved_bytes(lambda: model(x), module=model)

    assert kept.total == T * rank * 4 + (SEED_BYTES if p else 0), kept.tensors


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "nf4"])
def test_under_autocast_it_keeps_h_in_half_precision(base: str, p: float) -> None:
    model, x = wrapped(base, dropout=p), normal(T, K, dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_bytes(lambda: model(x), module=model)

    assert kept.total == T * R * 2 + (SEED_BYTES if p else 0), kept.tensors


def test_lowrank_dropout_keeps_no_more() -> None:
    model, x = wrapped("float32", dropout=0.3, dropout_mode="lowrank"), leaf("float32")

    assert saved_bytes(lambda: model(x), module=model).total == T * R * 4 + SEED_BYTES


def dies(model: nn.Module, x: Tensor, *, autocast: bool = False) -> bool:
    """Whether a non-leaf input is gone after the forward, while the graph waits for backward."""
    hidden = x * 1.0
    tensor, memory = weakref.ref(hidden), in_watched_memory(hidden)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(hidden)
    del hidden
    gone = tensor() is None and memory() is None
    y.float().sum().backward()
    return gone and x.grad is not None and bool(x.grad.any())


class Bytes(bytearray):
    """A bytearray that can be watched."""


def in_watched_memory(tensor: Tensor) -> "weakref.ref[Bytes]":
    """Move a tensor onto bytes that live as long as any tensor or view does that shares its storage."""
    memory = Bytes(tensor.numel() * tensor.element_size())
    shared = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    shared.copy_(tensor.detach())
    tensor.data = shared
    return weakref.ref(memory)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("base", BASES)
def test_the_input_is_freed_after_the_forward(base: str, p: float) -> None:
    assert dies(wrapped(base, dropout=p), leaf(base))


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_the_input_is_freed_under_autocast(base: str) -> None:
    assert dies(wrapped(base), normal(T, K, dtype=torch.float32, grad=True), autocast=True)


@pytest.mark.parametrize("base", ["float32", "int8"])
def test_a_linear_that_keeps_its_input_is_caught(base: str) -> None:
    """Plain LoRA keeps x for the gradient of A; bitsandbytes' int8 does on its context, where no hook sees it."""
    model = wrapped(base, lean=False)
    if base == "float32":
        model[0].lora_A["default"].weight.requires_grad_(True)

    assert not dies(model, leaf(base))
    if base == "int8":
        x = leaf(base)
        assert saved_bytes(lambda: model(x), module=model).total < T * K * 2


class Gated(nn.Module):
    def __init__(self, size: int, wide: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, wide), nn.Linear(size, wide)
        self.down_proj = nn.Linear(wide, size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_gated_block_keeps_two_wide_tensors_and_three_h(p: float) -> None:
    model, x = nn.Sequential(Gated(K, WIDE)), normal(T, K, dtype=torch.float32, grad=True)
    report = apply_lora_fa(model, LoRAFAConfig(r=R, dropout=p))
    seeds = 3 * SEED_BYTES if p else 0

    assert report.lean_blocks == ["0"]
    assert saved_bytes(lambda: model(x), module=model).total == T * (2 * WIDE + 3 * R) * 4 + seeds


def test_a_bare_gradient_step_frees_everything() -> None:
    model, x = wrapped("float32", dropout=0.3), leaf("float32")
    y = model(x)
    node = weakref.ref(y.grad_fn)
    y.sum().backward()
    del y

    assert node() is None
