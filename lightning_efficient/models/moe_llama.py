"""A Llama whose feed-forward nets are mixtures of experts, as Mixtral's.

Attention, norms and embedding are those of :mod:`lightning_efficient.models.llama`; in the place of a feed-forward net
stands a :class:`~lightning_efficient.moe.MoELayer`. :func:`~lightning_efficient.moe.hf.unswap_state_dict` gives
parameters the names of ``transformers.MixtralForCausalLM``, and equal weights give equal logits.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_efficient.models.llama import Llama, LlamaConfig
from lightning_efficient.moe import MoELayer, moe_layers
from lightning_efficient.moe.experts import Activation
from lightning_efficient.moe.router import DropPolicy, Normalize


@dataclass(frozen=True)
class MoELlamaConfig(LlamaConfig):
    """The shape of a :class:`MoELlama`; the further arguments are those of :class:`LlamaConfig`.

    Args:
        num_experts: experts of a layer.
        top_k: experts that a token goes to.
        expert_size: hidden size of an expert; ``None``: ``ffn_size``.
        moe_every: every so many layers, the last of them has experts (2: the second, the fourth, ...); the others have
            a feed-forward net of ``ffn_size``.
        activation: of the experts: ``swiglu``, ``gelu`` or ``relu``.
        capacity_factor: an expert has room for so many times its even share of the assignments; ``None``: nothing is
            dropped.
        eval_capacity_factor: the same in evaluation; ``None``: as in training.
        min_capacity: slots that an expert has at least.
        drop_policy: who keeps a slot of a full expert: ``position`` or ``probs``.
        normalize: when the weights of a token's experts are divided by their sum: ``before_drop``, ``after_drop`` or
            ``never``.
        jitter: noise on the router's inputs in training.
        aux_loss_coef: weight of the loss that keeps the loads of experts even.
        z_loss_coef: weight of the loss that keeps the router's logits small.
        balance_rate: by how much a bias for the choice of an expert moves against its load after each step; 0: none.

    Raises:
        ValueError: a size or an option is wrong.
    """

    num_experts: int = 8
    top_k: int = 2
    expert_size: int | None = None
    moe_every: int = 1
    activation: Activation = "swiglu"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    drop_policy: DropPolicy = "position"
    normalize: Normalize = "before_drop"
    jitter: float = 0.0
    aux_loss_coef: float = 1e-2
    z_loss_coef: float = 0.0
    balance_rate: float = 0.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.moe_every <= self.num_layers:
            raise ValueError(
                f"moe_every is {self.moe_every}, of {self.num_layers} layers: every so many layers, one has experts. "
                f"Choose from 1 to {self.num_layers}."
            )

    def has_experts(self, number: int) -> bool:
        """Whether a layer has experts.

        Args:
            number: of the layer, from 0.
        """
        return (number + 1) % self.moe_every == 0

    @override
    def to_hf(self) -> dict[str, Any]:
        """Return the keyword arguments of the equal ``transformers.MixtralConfig``.

        Raises:
            ValueError: Mixtral has no such model.
        """
        wanted = {"moe_every": 1, "activation": "swiglu", "normalize": "before_drop", "balance_rate": 0.0}
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!r}: there is no equal Mixtral. Set it to {value!r}.")
        if self.top_k == 1:
            raise ValueError(
                "top_k is 1: Mixtral weighs a single expert by 1, and this model by its probability. Raise top_k."
            )
        return super().to_hf() | {
            "intermediate_size": self.expert_size or self.ffn_size,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "router_aux_loss_coef": self.aux_loss_coef,
        }


MOE_LLAMA_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "ffn_size": 192,
        "num_layers": 4,
        "num_heads": 4,
        "max_seq_len": 256,
        "num_experts": 4,
    },
    "8x160m": {"hidden_size": 768, "ffn_size": 2048, "num_layers": 12, "num_heads": 12, "max_seq_len": 2048},
    "8x1b": {"hidden_size": 2048, "ffn_size": 5504, "num_layers": 24, "num_heads": 16},
    "mixtral-8x7b": {
        "hidden_size": 4096,
        "ffn_size": 14_336,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "max_seq_len": 32_768,
        "rope_theta": 1e6,
    },
    "mixtral-8x22b": {
        "hidden_size": 6144,
        "ffn_size": 16_384,
        "num_layers": 56,
        "num_heads": 48,
        "num_kv_heads": 8,
        "max_seq_len": 65_536,
        "rope_theta": 1e6,
    },
}
"""Arguments of :class:`MoELlamaConfig` by size; 8 experts, and 2 for each token, where nothing else is said."""


class MoELlama(Llama):
    r"""A :class:`Llama` with mixtures of experts: token ids (B, T) in, logits (B, T, V) out.

    After a forward, :func:`~lightning_efficient.moe.aux_loss` of the model is what to add to the loss of training.
    Generation works as with a Llama. It gives the same answers, however prompts are put together, where nothing is
    dropped: with ``capacity_factor=None``, or an ``eval_capacity_factor`` of ``num_experts / top_k`` or more.

    Weights are drawn as in :class:`Llama`; those of routers and experts uniformly, as ``nn.Linear`` does.

    Args:
        config: the shape.
        activation_checkpointing: recompute each decoder layer, and what it sends, in backward instead of storing its
            activations.

    Raises:
        ValueError: an option of the experts is wrong.
    """

    config: MoELlamaConfig

    def __init__(self, config: MoELlamaConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__(config, activation_checkpointing=activation_checkpointing)

    @override
    def feed_forward(self, number: int) -> nn.Module:
        """Return the mixture of experts of a layer, or its feed-forward net where it has none."""
        config = self.config
        if not config.has_experts(number):
            return super().feed_forward(number)
        return MoELayer(
            config.hidden_size,
            config.expert_size or config.ffn_size,
            config.num_experts,
            config.top_k,
            activation=config.activation,
            capacity_factor=config.capacity_factor,
            eval_capacity_factor=config.eval_capacity_factor,
            min_capacity=config.min_capacity,
            drop_policy=config.drop_policy,
            normalize=config.normalize,
            jitter=config.jitter,
            aux_loss_coef=config.aux_loss_coef,
            z_loss_coef=config.z_loss_coef,
            balance_rate=config.balance_rate,
        )

    @override
    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        super().reset_parameters()
        for _, layer in moe_layers(self):
            layer.router.reset_parameters()
            layer.experts.reset_parameters()
