"""Mixture-of-experts language models as LightningModules: the in-tree one, and what others share with it."""

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_efficient.models._shard import parm_strategy, shard_heads, shard_model
from lightning_efficient.models.causal_lm import CausalLM, InTreeLM, TokenBatch, preset
from lightning_efficient.models.llama import Attention
from lightning_efficient.models.moe_llama import MOE_LLAMA_PRESETS, MoELlama, MoELlamaConfig
from lightning_efficient.moe import aux_loss, balance_loads, moe_layers
from lightning_efficient.moe.agreement import random_state_of_first
from lightning_efficient.moe.experts import Activation
from lightning_efficient.moe.router import DropPolicy, Normalize


class MoELlamaLM(InTreeLM):
    """The in-tree :class:`~lightning_efficient.models.MoELlama`, by preset and with single sizes replaced.

    The loss of training is the cross-entropy and the auxiliary loss of the experts. Beside what
    :class:`~lightning_efficient.models.CausalLM` logs (``train_loss`` is the cross-entropy alone) it logs
    ``aux_loss`` and ``dropped``, the share of this rank's assignments that found no slot.

    Under :class:`~lightning_efficient.strategies.ParmStrategy` experts are spread over ranks, and so is attention over
    those of a model-parallel group; under :class:`~lightning_efficient.strategies.FullyShardedStrategy` all weights are
    sharded, and gathered where they are needed.

    Args:
        size: a key of :data:`MOE_LLAMA_PRESETS`.
        vocab_size: number of tokens; 256 is enough for bytes, Mixtral's tokenizer has 32 000.
        max_seq_len: longest sequence; ``None``: the preset's.
        hidden_size: as in :class:`MoELlamaConfig`; ``None``: the preset's. So are the next seven.
        ffn_size: see ``hidden_size``.
        num_layers: see ``hidden_size``.
        num_heads: see ``hidden_size``.
        num_kv_heads: see ``hidden_size``.
        num_experts: see ``hidden_size``.
        top_k: see ``hidden_size``.
        expert_size: see ``hidden_size``.
        moe_every: every so many layers, the last of them has experts.
        activation: of the experts: ``swiglu``, ``gelu`` or ``relu``.
        capacity_factor: an expert has room for so many times its even share of the assignments, the rest is dropped;
            ``None``: nothing is dropped.
        eval_capacity_factor: the same in evaluation; ``None``: as in training.
        min_capacity: slots that an expert has at least.
        drop_policy: who keeps a slot of a full expert: ``position`` or ``probs``.
        normalize: when the weights of a token's experts are divided by their sum: ``before_drop``, ``after_drop`` or
            ``never``.
        jitter: noise on the router's inputs in training.
        aux_loss_coef: weight of the loss that keeps the loads of experts even.
        z_loss_coef: weight of the loss that keeps the router's logits small.
        balance_rate: by how much a bias for the choice of an expert moves against its load after each step; 0: none.
        tie_embeddings: the head shares the embedding's weight.
        attention: ``sdpa`` for torch's fused kernels, ``eager`` for the plain formula.
        tensor_parallel: spread attention, and feed-forward nets without experts, over the ranks of a model-parallel
            group; without, each of them computes all of it.
        activation_checkpointing: recompute each decoder layer, and what it sends, in backward instead of storing its
            activations.
        init_on_device: build without memory, and draw the weights in ``configure_model`` on the device and in the type
            that train; without ``pretrained``, a rank then holds no more than its own experts at any time.
        pretrained: a checkpoint of this class whose weights to start from; read in ``configure_model``.
        optimizer: called with the parameters that train, in ``configure_optimizers``.
        lr_scheduler: called with the optimizer; advances once per step.

    Raises:
        ValueError: there is no such preset, or sizes and options do not fit together.
    """

    model: MoELlama

    def __init__(
        self,
        size: str = "tiny",
        *,
        vocab_size: int = 256,
        max_seq_len: int | None = None,
        hidden_size: int | None = None,
        ffn_size: int | None = None,
        num_layers: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
        expert_size: int | None = None,
        moe_every: int = 1,
        activation: Activation = "swiglu",
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 4,
        drop_policy: DropPolicy = "position",
        normalize: Normalize = "before_drop",
        jitter: float = 0.0,
        aux_loss_coef: float = 1e-2,
        z_loss_coef: float = 0.0,
        balance_rate: float = 0.0,
        tie_embeddings: bool = False,
        attention: Attention = "sdpa",
        tensor_parallel: bool = True,
        activation_checkpointing: bool = False,
        init_on_device: bool = False,
        pretrained: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        shape = preset(
            size,
            MOE_LLAMA_PRESETS,
            {
                "max_seq_len": max_seq_len,
                "hidden_size": hidden_size,
                "ffn_size": ffn_size,
                "num_layers": num_layers,
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "num_experts": num_experts,
                "top_k": top_k,
                "expert_size": expert_size,
            },
        )
        config = MoELlamaConfig(
            vocab_size=vocab_size,
            moe_every=moe_every,
            activation=activation,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            min_capacity=min_capacity,
            drop_policy=drop_policy,
            normalize=normalize,
            jitter=jitter,
            aux_loss_coef=aux_loss_coef,
            z_loss_coef=z_loss_coef,
            balance_rate=balance_rate,
            tie_embeddings=tie_embeddings,
            attention=attention,
            **shape,
        )
        super().__init__(
            lambda: MoELlama(config, activation_checkpointing=activation_checkpointing),
            init_on_device=init_on_device,
            pretrained=pretrained,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.tensor_parallel = tensor_parallel

    @override
    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Return the loss with that of the experts, a scalar."""
        return with_aux_loss(self, super().training_step(batch, batch_idx), batch_size=len(batch["input_ids"]))

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Move the selection biases, where there are some and the strategy does not."""
        super().on_before_optimizer_step(optimizer)
        if parm_strategy(self) is None:
            balance_loads(self, optimizer)

    @override
    def configure_model(self) -> None:
        """Draw weights that wait for it, read pretrained ones, and shard the model where the strategy asks; each once.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it holds another model, or adapters alone; or heads or experts do not divide among the ranks.
        """
        strategy = parm_strategy(self)
        if strategy is None:
            return super().configure_model()
        if self._to_load is not None or not self.model.lm_head.weight.is_meta:
            super().configure_model()
            strategy.parallelize_moe(self)  # now: callbacks that copy the model copy what trains
            return None
        # Spread before they have memory: no rank ever holds more than its own experts.
        strategy.parallelize_moe(self)
        with random_state_of_first(strategy.topology.world):
            return super().configure_model()

    @override
    def _shard(self) -> None:
        if parm_strategy(self) is None:
            shard_model(
                self.model,
                self.model.model.layers,
                mesh=self.device_mesh,
                reshard_after_forward=True,
                cpu_offload=False,
            )
        elif self.tensor_parallel and self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() > 1:
            shard_heads(self.model, self.device_mesh["tensor_parallel"])


def with_aux_loss(lm: CausalLM, loss: Tensor, *, batch_size: int) -> Tensor:
    """Return a loss with the auxiliary loss of the last forward, which is logged, and what was dropped with it.

    Args:
        lm: with MoE layers, in ``training_step``.
        loss: of the task.
        batch_size: for the logs.
    """
    auxiliary = aux_loss(lm)
    stats = [layer.stats for _, layer in moe_layers(lm) if layer.stats is not None]
    dropped = torch.stack([each.dropped for each in stats]).sum() / max(1, sum(each.assignments for each in stats))
    lm.log_dict({"aux_loss": auxiliary.detach(), "dropped": dropped}, batch_size=batch_size)
    return loss + auxiliary
