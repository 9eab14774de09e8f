"""A Llama in one file: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Parameters have the names of ``transformers.LlamaForCausalLM``, so a state dict moves between the two unchanged, and
equal weights give equal logits.

Dimension letters: B batch, T sequence, D hidden size, F feed-forward size, H query heads, K key-value heads,
E size of a head, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

Attention: TypeAlias = Literal["sdpa", "eager"]
"""How attention is computed: torch's fused kernels, or the whole (T, T) matrix of scores."""


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama. The defaults are those of Llama-2 7B.

    Args:
        vocab_size: V.
        hidden_size: D.
        ffn_size: F.
        num_layers: decoder layers.
        num_heads: H; divides D.
        num_kv_heads: K; divides H. ``None``: H, which is plain multi-head attention.
        max_seq_len: longest T.
        rope_theta: base of the rotary wave lengths.
        norm_eps: added to the mean square in RMSNorm.
        tie_embeddings: the head shares the embedding's weight.
        init_std: standard deviation of the initial weights.
        attention: ``sdpa`` for torch's fused kernels (flash attention where there is one), ``eager`` for the plain
            formula, which stores the scores of all pairs of positions; the two agree up to rounding.

    Raises:
        ValueError: a size is below 1, sizes do not divide, or there is no such attention.
    """

    vocab_size: int = 32_000
    hidden_size: int = 4096
    ffn_size: int = 11_008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    max_seq_len: int = 4096
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    attention: Attention = "sdpa"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "ffn_size", "num_layers", "num_heads", "kv_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a model needs at least 1. Set it to 1 or more.")
        if self.hidden_size % self.num_heads or self.head_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} is not an even whole number: each "
                "head gets an equal part, and rotary positions turn it in pairs. Change one of the two."
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}: each key-value head "
                "serves the same number of query heads. Change one of the two."
            )

        if self.attention not in ("sdpa", "eager"):
            raise ValueError(
                f"There is no attention {self.attention!r}: it is computed by torch's fused kernels (sdpa), or by the "
                "plain formula (eager). Give one of the two."
            )

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads, K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Size of a head, E."""
        return self.hidden_size // self.num_heads

    def to_hf(self) -> dict[str, Any]:
        """Return the keyword arguments of the equal ``transformers.LlamaConfig``."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_seq_len,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_std,
        }


LLAMA_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "ffn_size": 352, "num_layers": 4, "num_heads": 4, "max_seq_len": 256},
    "160m": {"hidden_size": 768, "ffn_size": 3072, "num_layers": 12, "num_heads": 12, "max_seq_len": 2048},
    "1.3b": {"hidden_size": 2048, "ffn_size": 5504, "num_layers": 24, "num_heads": 16},
    "7b": {"hidden_size": 4096, "ffn_size": 11_008, "num_layers": 32, "num_heads": 32},
    "13b": {"hidden_size": 5120, "ffn_size": 13_824, "num_layers": 40, "num_heads": 40},
    "70b": {"hidden_size": 8192, "ffn_size": 28_672, "num_layers": 80, "num_heads": 64, "num_kv_heads": 8},
}
"""Arguments of :class:`LlamaConfig` by size; from 7b on, those of Llama-2."""


class Past(Protocol):
    """Keys and values of earlier tokens, as generation keeps them; see :mod:`lightning_efficient.models.generation`."""

    def rope(self) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of the tokens' positions, broadcastable to (B, heads, T, E)."""
        ...

    def attend(
        self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, attention: Callable[..., Tensor]
    ) -> Tensor:
        """Keep the keys and values of a layer, and return its attention over them and the earlier ones, (B, H, T, E).

        Args:
            layer: number of the layer.
            q_BHTE: queries, rotated.
            k_BKTE: keys, rotated.
            v_BKTE: values.
            attention: with the arguments of ``scaled_dot_product_attention``.
        """
        ...


AttendWithPast: TypeAlias = Callable[[Tensor, Tensor, Tensor, Callable[..., Tensor]], Tensor]
""":meth:`Past.attend` of one layer."""


class Llama(nn.Module):
    r"""A decoder-only transformer: token ids (B, T) in, logits (B, T, V) out.

    Attention is causal over the whole row. There is no padding mask: pad on the right and set those labels to -100.
    Weights are drawn from :math:`N(0, \sigma^2)` with torch's global generator, where
    :math:`\sigma` is ``init_std``; norms start at 1.

    Args:
        config: the shape.
        activation_checkpointing: recompute each decoder layer in backward instead of storing its activations.
    """

    def __init__(self, config: LlamaConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config, self.feed_forward, activation_checkpointing=activation_checkpointing)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters()

    @override
    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of the next token at each position.

        Args:
            ids_BT: token ids, (B, T) int64, below ``vocab_size``.

        Returns:
            Logits, (B, T, V).

        Raises:
            ValueError: the ids are not a matrix, or the sequence is longer than ``max_seq_len``.
        """
        if ids_BT.ndim != 2:
            raise ValueError(f"The token ids have shape {tuple(ids_BT.shape)}: Llama takes (batch, sequence).")
        if ids_BT.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"The sequence has {ids_BT.shape[1]} tokens, more than max_seq_len={self.config.max_seq_len}: the "
                "model was not made for it. Shorten the sequence (the data's block_size) or raise max_seq_len."
            )
        logits_BTV: Tensor = self.lm_head(self.model(ids_BT))
        return logits_BTV

    def feed_forward(self, number: int) -> nn.Module:
        """Return a new feed-forward net for a decoder layer; subclasses may return another.

        Args:
            number: of the layer, from 0.
        """
        return SwiGLU(self.config)

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for module in self.modules():
            if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and module is not self.lm_head):
                nn.init.normal_(module.weight, std=self.config.init_std)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.lm_head.weight, std=self.config.init_std)


class _Body(nn.Module):
    """Embedding, decoder layers and the last norm: everything but the head."""

    def __init__(
        self, config: LlamaConfig, feed_forward: Callable[[int], nn.Module], *, activation_checkpointing: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_DecoderLayer(config, feed_forward(number)) for number in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    @override
    def forward(self, ids_BT: Tensor, past: Past | None = None) -> Tensor:
        x_BTD = self.embed_tokens(ids_BT)
        if past is not None:
            return self._after(past, x_BTD)
        # Computed anew in each forward, which is cheap, and not a buffer: DDP broadcasts buffers in every step.
        rope = rope_tables(ids_BT.shape[1], self.config.head_size, theta=self.config.rope_theta, device=x_BTD.device)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            x_BTD = checkpoint(layer, x_BTD, rope, use_reentrant=False) if recompute else layer(x_BTD, rope)
        y_BTD: Tensor = self.norm(x_BTD)
        return y_BTD

    def _after(self, past: Past, x_BTD: Tensor) -> Tensor:
        """The same for tokens that follow others, whose keys and values are kept."""
        rope = past.rope()
        for number, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, rope, partial(past.attend, number))
        y_BTD: Tensor = self.norm(x_BTD)
        return y_BTD


class _DecoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: LlamaConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    @override
    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], attend_with_past: AttendWithPast | None = None
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, attend_with_past)
        y_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return y_BTD


class _Attention(nn.Module):
    """Causal grouped-query attention: K key-value heads, each shared by H/K query heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, E, H, K = config.hidden_size, config.head_size, config.num_heads, config.kv_heads
        self.head_size = E
        self.grouped = H != K
        self.attend = eager_attention if config.attention == "eager" else F.scaled_dot_product_attention
        self.q_proj = nn.Linear(D, H * E, bias=False)
        self.k_proj = nn.Linear(D, K * E, bias=False)
        self.v_proj = nn.Linear(D, K * E, bias=False)
        self.o_proj = nn.Linear(H * E, D, bias=False)

    @override
    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], attend_with_past: AttendWithPast | None = None
    ) -> Tensor:
        q_BHTE = rotate(self._heads(self.q_proj(x_BTD)), *rope)
        k_BKTE = rotate(self._heads(self.k_proj(x_BTD)), *rope)
        v_BKTE = self._heads(self.v_proj(x_BTD))
        if attend_with_past is None:
            y_BHTE = self.attend(q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=self.grouped)
        else:
            y_BHTE = attend_with_past(q_BHTE, k_BKTE, v_BKTE, self.attend)
        y_BTD: Tensor = self.o_proj(y_BHTE.transpose(1, 2).flatten(2))
        return y_BTD

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * E) -> (B, heads, T, E)."""
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)


class SwiGLU(nn.Module):
    r"""``down(silu(gate(x)) * up(x))``.

    Args:
        config: of the model.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    @override
    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return (B, T, D)."""
        y_BTD: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return y_BTD


class RMSNorm(nn.Module):
    r"""Root-mean-square norm, :math:`y = g \odot x / \sqrt{\mathrm{mean}(x^2) + \epsilon}`, in float32 or better.

    Args:
        size: length of the last dimension.
        eps: :math:`\epsilon`.
    """

    def __init__(self, size: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, (..., D), in its own dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        y: Tensor = self.weight * (wide * scale).to(x.dtype)
        return y


def rope_tables(length: int, head_size: int, *, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    r"""Return the cosines and sines of the rotary angles, both (T, E) float32.

    Position t turns pair i of a head by :math:`t\,\theta^{-2i/E}`; pair i is made of the entries i and i + E/2.

    Args:
        length: T.
        head_size: E, even.
        theta: base of the wave lengths.
        device: where the tables are made.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), theta**-exponents)
    angles_TE = torch.cat((angles, angles), dim=-1)
    return angles_TE.cos(), angles_TE.sin()


def eager_attention(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTE: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = True,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Attention by its formula, :math:`\mathrm{softmax}(q k^\top / \sqrt{E})\, v`, the softmax in float32.

    Args:
        q_BHTE: queries, (B, H, T, E).
        k_BKTE: keys, (B, K, T, E); K is H, or divides it with ``enable_gqa``.
        v_BKTE: values, likewise.
        attn_mask: True where a query sees a key, broadcastable to (B, H, T, S) with S keys.
        is_causal: hide later positions from earlier ones.
        enable_gqa: each key-value head serves H / K query heads.

    Returns:
        (B, H, T, E).
    """
    if enable_gqa:
        shared = q_BHTE.shape[1] // k_BKTE.shape[1]
        k_BKTE, v_BKTE = k_BKTE.repeat_interleave(shared, dim=1), v_BKTE.repeat_interleave(shared, dim=1)
    scores_BHTT = q_BHTE @ k_BKTE.transpose(-2, -1) / q_BHTE.shape[-1] ** 0.5
    if is_causal:
        T, S = scores_BHTT.shape[-2:]
        later_TS = torch.ones(T, S, dtype=torch.bool, device=scores_BHTT.device).triu(S - T + 1)
        scores_BHTT = scores_BHTT.masked_fill(later_TS, float("-inf"))
    if attn_mask is not None:
        scores_BHTT = scores_BHTT.masked_fill(~attn_mask, float("-inf"))
    return (
        F.softmax(scores_BHTT, dim=-1, dtype=torch.promote_types(scores_BHTT.dtype, torch.float32)).to(v_BKTE.dtype)
        @ v_BKTE
    )


def rotate(x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) of each head of ``x``, (B, heads, T, E), by the angles of its position."""
    first, second = x.chunk(2, dim=-1)
    quarter_turn = torch.cat((-second, first), dim=-1)
    return x * cos_TE.to(x.dtype) + quarter_turn * sin_TE.to(x.dtype)
