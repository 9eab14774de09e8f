"""Small layers and models of the tests, with a B that is not zero, and what PEFT makes of the same weights."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa
from lightning_efficient.lora_fa.inject import adapted_layers
from lightning_efficient.models.llama import Llama, LlamaConfig


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype).requires_grad_(grad)


def fill_B(module: nn.Module, *, std: float = 0.1, seed: int = 1) -> nn.Module:
    """Draw every B: at B = 0 most mistakes cannot be seen."""
    drawn = generator(seed)
    with torch.no_grad():
        for layer in adapted_layers(module).values():
            for up in layer.lora_B.values():
                up.weight.copy_(torch.randn(up.weight.shape, generator=drawn, dtype=torch.float64) * std)
    return module


class Block(nn.Module):
    """Two linears in a block, one of which has a bias, and a head."""

    def __init__(self, size: int = 12, inner: int = 20) -> None:
        super().__init__()
        self.first = nn.Linear(size, inner)
        self.second = nn.Linear(inner, size, bias=False)
        self.score = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.score(x + self.second(torch.tanh(self.first(x))))
        return y


TARGETS = ["first", "second"]


def block(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> Block:
    """The same weights for the same seed, whatever the global generator did before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Block(**sizes).to(dtype)


def adapted_block(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Block:
    model = block(seed, dtype)
    settings = {"target_modules": TARGETS, "r": 4, "alpha": 8.0, **settings}
    if dtype == torch.float64:
        settings.setdefault("adapter_dtype", "float64")
    apply_lora_fa(model, LoRAFAConfig(**settings))
    fill_B(model)
    return model


LLAMA = LlamaConfig(
    vocab_size=48, hidden_size=32, ffn_size=80, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=16
)


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Llama:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Llama(LLAMA, **options).to(dtype)


def ids(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, LLAMA.vocab_size, (batch, length), generator=generator(seed))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def peft_twin(model: nn.Module, base: nn.Module, *, dtype: torch.dtype, **settings: Any) -> Any:
    """PEFT's own model around ``base``, with the adapters that ``model`` has; A is frozen."""
    import peft

    layers = adapted_layers(model)
    config = peft.LoraConfig(target_modules=list(layers), **settings)
    twin = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, layer in layers.items():
        theirs = twin.base_model.model.get_submodule(name)
        for half in ("lora_A", "lora_B"):
            theirs_half = getattr(theirs, half)["default"].to(dtype)
            with torch.no_grad():
                theirs_half.weight.copy_(getattr(layer, half)["default"].weight)
        theirs.lora_A["default"].weight.requires_grad_(False)
    return twin


def quantised(kind: str, weight_NK: Tensor) -> nn.Module:
    """A frozen linear of bitsandbytes: "nf4" or "int8"."""
    import bitsandbytes as bnb

    size_N, size_K = weight_NK.shape
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(size_K, size_N, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight_NK.clone(), requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(size_K, size_N, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight_NK.clone(), requires_grad=False, has_fp16_weights=False)
    moved: nn.Module = layer.to("cpu")
    return moved
