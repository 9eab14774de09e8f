"""Models of transformers with random weights, in the settings and with the methods that LoRA-FA is measured in.

Dimension letters: T tokens, D width of the model, F width of the feed-forward block, V vocabulary.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa

Family = Literal["llama", "roberta", "t5-relu", "t5-gated-gelu"]

LORA, FULL, PEFT_FA = "PEFT LoRA", "full fine-tuning", "PEFT LoRA-FA"
PLAIN, LEAN, LEAN_ALL = "ours, plain", "ours, lean", "ours, lean + MLP + norm"
COMPILED_LORA, COMPILED_FA = "PEFT LoRA, compiled", "PEFT LoRA-FA, compiled"
METHODS = (LORA, FULL, PEFT_FA, PLAIN, LEAN, LEAN_ALL)
COMPILED = {COMPILED_LORA: LORA, COMPILED_FA: PEFT_FA}

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "roberta": ["query", "key", "value", "dense"],
    "t5-relu": ["q", "k", "v", "o", "wi", "wo"],
    "t5-gated-gelu": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
}
"""All linears of the transformer's layers."""


@dataclass(frozen=True)
class Cell:
    """One setting, in which all methods are compared.

    Attributes:
        name: for the table.
        family: which model.
        width: D.
        ffn: F.
        tokens: T, one sequence.
        layers: of the model; T5 has as many in encoder and decoder.
        kv_heads: of 8; Llama only.
        vocab: V of a head on top with a cross-entropy loss; 0: the last hidden states are the output.
        base: dtype of the frozen weights.
        adapters: dtype of A and B.
        mixed: bfloat16 autocast around the forward pass.
        p: dropout of the adapters.
        model_dropout: the model's own.
        checkpointing: each layer is recomputed in backward.
        r: rank.
    """

    name: str
    family: Family = "llama"
    width: int = 512
    ffn: int = 1376
    tokens: int = 512
    layers: int = 4
    kv_heads: int = 8
    vocab: int = 0
    base: str = "float32"
    adapters: str = "float32"
    mixed: bool = False
    p: float = 0.0
    model_dropout: float = 0.0
    checkpointing: bool = False
    r: int = 16

    def but(self, **changes: Any) -> "Cell":
        """Return the cell with other values."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass
class Case:
    """A model ready to be run; backward starts from ``start``, the gradient of what forward returns."""

    model: nn.Module
    forward: Callable[[], Tensor]
    start: Tensor | None

    def step(self) -> None:
        """Run forward and backward, and keep no gradient."""
        self.backward(self.forward())

    def backward(self, output: Tensor) -> None:
        """Run backward, and keep no gradient."""
        torch.autograd.backward(output, self.start)
        for parameter in self.model.parameters():
            parameter.grad = None


def build(cell: Cell, method: str) -> Case:
    """Return the cell's model with the method's adapters on it, B other than 0, in training mode."""
    model = adapt(copy.deepcopy(_base(cell.but(name="", p=0.0, adapters="", mixed=False, r=0))), cell, method)
    model.train()
    if cell.checkpointing:
        inner: Any = model
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if method in COMPILED:
        model.compile()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, cell.vocab or 256, (1, cell.tokens), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids}
    if cell.family != "roberta":
        inputs["use_cache"] = False
    if cell.family.startswith("t5"):
        inputs["decoder_input_ids"] = ids.flip(1)
    if cell.vocab:
        inputs["labels"] = ids

    def forward() -> Tensor:
        with _precision(cell):
            output = model(**inputs)
        result: Tensor = output.loss if cell.vocab else output.last_hidden_state
        return result

    if cell.vocab:
        return Case(model, forward, None)
    shape = (1, cell.tokens, cell.width)
    with torch.no_grad():
        dtype = forward().dtype if cell.mixed else getattr(torch, cell.base)
    return Case(model, forward, torch.randn(shape, generator=generator).to(dtype))


def adapt(model: nn.Module, cell: Cell, method: str) -> nn.Module:
    """Put the method's adapters on the model; return the module to call."""
    method = COMPILED.get(method, method)
    if method == FULL:
        return model.requires_grad_(True)
    if method in (LORA, PEFT_FA):
        return _peft(model, cell, frozen=method == PEFT_FA)
    lean_parts: Any = "auto" if method == LEAN_ALL else "off"
    config = LoRAFAConfig(
        target_modules=TARGETS[cell.family],
        r=cell.r,
        alpha=2 * cell.r,
        dropout=cell.p,
        adapter_dtype=cell.adapters,
        lean=method != PLAIN,
        lean_mlp=lean_parts,
        lean_norm=lean_parts,
    )
    report = apply_lora_fa(model, config)
    if method != PLAIN and report.fell_back:
        raise RuntimeError(f"Not lean: {report.fell_back}")
    _fill_B(model)
    return model


def _peft(model: nn.Module, cell: Cell, *, frozen: bool) -> nn.Module:
    import peft
    from peft.optimizers import create_lorafa_optimizer

    config = peft.LoraConfig(
        r=cell.r, lora_alpha=2 * cell.r, lora_dropout=cell.p, target_modules=TARGETS[cell.family], bias="none"
    )
    wrapped: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=cell.adapters != cell.base)  # type: ignore[arg-type]
    _fill_B(wrapped)
    if frozen:
        create_lorafa_optimizer(wrapped, r=cell.r, lora_alpha=2 * cell.r, lr=1e-3)  # type: ignore[arg-type]
    found = {p.dtype for name, p in wrapped.named_parameters() if ".lora_" in name}
    assert found == {getattr(torch, cell.adapters)}, found
    return wrapped


def _fill_B(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


def _precision(cell: Cell) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if cell.mixed else nullcontext()


@lru_cache(maxsize=1)
def _base(cell: Cell) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    V, heads = cell.vocab or 256, 8
    if cell.family == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=V, hidden_size=cell.width, intermediate_size=cell.ffn, num_hidden_layers=cell.layers,
            num_attention_heads=heads, num_key_value_heads=cell.kv_heads, max_position_embeddings=cell.tokens,
        )  # fmt: skip
        model: Any = (transformers.LlamaForCausalLM if cell.vocab else transformers.LlamaModel)(config)
    elif cell.family == "roberta":
        config = transformers.RobertaConfig(
            vocab_size=V, hidden_size=cell.width, intermediate_size=cell.ffn, num_hidden_layers=cell.layers,
            num_attention_heads=heads, max_position_embeddings=cell.tokens + 2, pad_token_id=1,
            hidden_dropout_prob=cell.model_dropout, attention_probs_dropout_prob=cell.model_dropout,
        )  # fmt: skip
        model = transformers.RobertaModel(config, add_pooling_layer=False)
    else:
        config = transformers.T5Config(
            vocab_size=V, d_model=cell.width, d_ff=cell.ffn, d_kv=cell.width // heads, num_layers=cell.layers,
            num_decoder_layers=cell.layers, num_heads=heads, dropout_rate=cell.model_dropout,
            feed_forward_proj=cell.family.removeprefix("t5-"),
        )  # fmt: skip
        model = transformers.T5Model(config)
    cast: nn.Module = model.to(getattr(torch, cell.base))
    return cast
