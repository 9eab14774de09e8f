"""Blocks, norms and activations become lean where they are what their names say, and stay as they are elsewhere."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa
from tests.lora_fa.nets import fill_B, normal


class Gated(nn.Module):
    """A feed-forward block with the usual names, whose forward can be another one than the usual."""

    def __init__(self, forward: Callable[["Gated", Tensor], Tensor], act_fn: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        if act_fn is not None:
            self.act_fn = act_fn
        self.how = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def usual(block: Gated, x: Tensor) -> Tensor:
    act = getattr(block, "act_fn", F.silu)
    y: Tensor = block.down_proj(act(block.gate_proj(x)) * block.up_proj(x))
    return y


OTHERS = {
    "swapped": lambda block, x: block.down_proj(block.gate_proj(x) * F.silu(block.up_proj(x))),
    "clamped": lambda block, x: usual(block, x).clamp(-0.01, 0.01),
    "gelu inside": lambda block, x: block.down_proj(F.gelu(block.gate_proj(x)) * block.up_proj(x)),
    "residual": lambda block, x: x + usual(block, x),
}


@pytest.mark.parametrize("act", [None, nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")])
def test_a_gated_block_becomes_lean_and_says_the_same(act: nn.Module | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Gated(usual, act))
    report = apply_lora_fa(model, LoRAFAConfig(r=2, lean_mlp="auto"))
    torch.manual_seed(0)
    plain = nn.Sequential(Gated(usual, act))
    apply_lora_fa(plain, LoRAFAConfig(r=2, lean=False))
    x = normal(3, 8, dtype=torch.float32)
    fill_B(model), fill_B(plain)

    # GELU's two forms are one class in torch: the trial has to tell them apart, and nn.GELU's default is exact.
    expected = ["0"] if act is None or getattr(act, "approximate", "none") == "none" else []
    assert report.lean_blocks == expected
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("other", OTHERS)
def test_a_block_that_only_has_the_names_stays_as_it_is(other: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Gated(OTHERS[other]))
    report = apply_lora_fa(model, LoRAFAConfig(r=2))

    assert report.lean_blocks == []
    assert not hasattr(model[0], "lora_fa_activation")


class HalfRoundedRMSNorm(nn.Module):
    """As in OLMo-2: the gain multiplies in float32, and the result is rounded once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


class OnePlusRMSNorm(HalfRoundedRMSNorm):
    """As in Gemma."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return ((1 + self.weight) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


@pytest.mark.parametrize("kind", [HalfRoundedRMSNorm, OnePlusRMSNorm])
def test_a_norm_that_differs_in_a_bit_of_bfloat16_stays_as_it_is(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(16), nn.Linear(16, 8)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(16))
    x = normal(50, 16, dtype=torch.bfloat16)
    before = model(x)
    report = apply_lora_fa(model, LoRAFAConfig(r=2))

    assert report.lean_blocks == []
    assert torch.equal(model(x), before)


def test_trying_a_block_leaves_the_modes_of_its_children_alone() -> None:
    block = Gated(usual)
    block.dropout, block.other = nn.Dropout(0.1), nn.Dropout(0.1)
    block.dropout.eval()
    model = nn.Sequential(block).train()
    block.dropout.eval()
    apply_lora_fa(model, LoRAFAConfig(r=2))

    assert block.training
    assert block.other.training
    assert not block.dropout.training


def test_the_default_device_of_a_trainer_that_builds_a_model_does_not_matter() -> None:
    model = nn.Sequential(Gated(usual))
    with torch.device("meta"):  # as with a GPU, a generator of the CPU does not fit there
        report = apply_lora_fa(model, LoRAFAConfig(r=2))

    assert report.lean_blocks == ["0"]


def test_an_activation_that_is_watched_is_called() -> None:
    model, seen = nn.Sequential(Gated(usual, nn.SiLU())), []
    assert apply_lora_fa(model, LoRAFAConfig(r=2)).lean_blocks == ["0"]
    model[0].act_fn.register_forward_hook(lambda *args: seen.append(1))
    model(normal(3, 8, dtype=torch.float32))

    assert seen == [1]


class RMSNorm(nn.Module):
    """With an argument that most have not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x if residual is None else x + residual
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def test_a_norm_with_a_second_argument_still_takes_it() -> None:
    model = nn.ModuleDict({"norm": RMSNorm(), "linear": nn.Linear(8, 8)})
    x = normal(3, 8, dtype=torch.float32)
    before = model["norm"](x, x)
    apply_lora_fa(model, LoRAFAConfig(r=2))

    assert torch.equal(model["norm"](x, x), before)
