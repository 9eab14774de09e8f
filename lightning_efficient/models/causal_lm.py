"""Language models as LightningModules: what a causal LM does with a batch, and the in-tree Llama.

Dimension letters: B batch, T sequence, V vocabulary.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from typing_extensions import override

from lightning_efficient.models._module import EpochMean, TrainableModule, load_weights
from lightning_efficient.models._shard import fill_on_device, shard_model, training_device
from lightning_efficient.models.llama import LLAMA_PRESETS, Attention, Llama, LlamaConfig

TokenBatch: TypeAlias = "dict[str, Tensor]"

IGNORED = -100
"""Label of a position that is not scored."""


class CausalLM(TrainableModule):
    """Training, validation and prediction for any model that maps token ids (B, T) to logits (B, T, V).

    A batch is ``{"input_ids", "labels"}``, both (B, T) int64, where ``labels[:, t]`` is the token after
    ``input_ids[:, t]``, or -100 for "do not score". The loss is the mean cross-entropy in nats per scored token.

    Logs ``train_loss`` per step; ``val_loss`` and ``val_bits_per_token`` (or ``test_...``) as means over the scored
    tokens of the epoch, on all ranks.

    Args:
        optimizer: called with the parameters that train, in ``configure_optimizers``.
        lr_scheduler: called with the optimizer; advances once per step.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.val_loss, self.val_bits = EpochMean(), EpochMean()
        self.test_loss, self.test_bits = EpochMean(), EpochMean()

    @property
    def vocab_size(self) -> int:
        """Number of tokens the model knows."""
        raise NotImplementedError

    @override
    def on_fit_start(self) -> None:
        """Compare the data's vocabulary with the model's.

        Raises:
            ValueError: the data has more tokens than the model.
        """
        data_vocab_size = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None)
        if data_vocab_size is not None and data_vocab_size > self.vocab_size:
            raise ValueError(
                f"The data has {data_vocab_size} tokens, the model vocab_size={self.vocab_size}: some ids would have "
                f"no embedding. Set the model's vocab_size to {data_vocab_size}."
            )

    @override
    def on_train_batch_start(self, batch: TokenBatch, batch_idx: int) -> None:
        """Check the token ids."""
        self._check_ids(batch["input_ids"], batch_idx)

    @override
    def on_validation_batch_start(self, batch: TokenBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the token ids."""
        self._check_ids(batch["input_ids"], batch_idx)

    @override
    def on_test_batch_start(self, batch: TokenBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the token ids."""
        self._check_ids(batch["input_ids"], batch_idx)

    @override
    def on_predict_batch_start(self, batch: TokenBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the token ids."""
        self._check_ids(batch["input_ids"], batch_idx)

    @override
    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Return the loss, a scalar."""
        loss, _ = self._loss(batch)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    @override
    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Log the loss."""
        self._evaluate(batch, "val", self.val_loss, self.val_bits)

    @override
    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Log the loss."""
        self._evaluate(batch, "test", self.test_loss, self.test_bits)

    @override
    def predict_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Return the most likely next token at each position, (B, T) int64."""
        logits_BTV: Tensor = self(batch["input_ids"])
        return logits_BTV.argmax(-1)

    def _loss(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the scored tokens, and their number. It is 0 where nothing is scored, not NaN."""
        logits_BTV: Tensor = self(batch["input_ids"])
        scored = (batch["labels"] != IGNORED).sum()
        # In float32: a softmax over a large vocabulary loses too much in bfloat16.
        total = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total / scored.clamp(min=1), scored

    def _check_ids(self, ids_BT: Tensor, batch_idx: int) -> None:
        """Refuse ids outside the vocabulary, which a GPU would answer with an assertion that names nothing."""
        # Reading a value from a device stalls it, so there only the first batch of an epoch is read.
        if ids_BT.numel() == 0 or (ids_BT.device.type != "cpu" and batch_idx > 0):
            return
        low, high = (int(bound) for bound in ids_BT.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"The batch holds the token id {low if low < 0 else high}, but the model has vocab_size="
                f"{self.vocab_size}: ids go from 0 to {self.vocab_size - 1}. Use the tokenizer that belongs to the "
                "model, or set vocab_size."
            )

    def _evaluate(self, batch: TokenBatch, stage: str, mean_loss: EpochMean, mean_bits: EpochMean) -> None:
        loss, scored = self._loss(batch)
        mean_loss.update(loss, scored)
        mean_bits.update(loss / math.log(2), scored)
        metrics = {f"{stage}_loss": mean_loss, f"{stage}_bits_per_token": mean_bits}
        self.log_dict(metrics, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(batch["labels"]))


class InTreeLM(CausalLM):
    """A Llama of this package: drawn at once or late, from a checkpoint, and sharded where the strategy asks.

    Args:
        build: makes the model.
        init_on_device: build without memory, and draw the weights in ``configure_model``.
        pretrained: a checkpoint to start from.
        optimizer: called with the parameters that train, in ``configure_optimizers``.
        lr_scheduler: called with the optimizer; advances once per step.
    """

    def __init__(
        self,
        build: Callable[[], Llama],
        *,
        init_on_device: bool,
        pretrained: str | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        with torch.device("meta") if init_on_device else nullcontext():
            self.model = build()
        self._to_load = pretrained

    @override
    def configure_model(self) -> None:
        """Draw weights that wait for it, read pretrained ones, and shard the model where the strategy asks; each once.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it holds another model, or adapters alone; or the model cannot be sharded as asked.
        """
        if self.model.lm_head.weight.is_meta:
            fill_on_device(self.model, training_device(self))
        if self._to_load is not None:
            load_weights(self.model, self._to_load, prefix="model.")
            self._to_load = None
        self._shard()

    @property
    @override
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the token ids (B, T)."""
        logits_BTV: Tensor = self.model(input_ids)
        return logits_BTV

    def _shard(self) -> None:
        raise NotImplementedError


class LlamaLM(InTreeLM):
    """The in-tree :class:`~lightning_efficient.models.Llama`, by preset and with single sizes replaced.

    Weights are random; ``model`` is the plain :class:`Llama`, whose parameters have transformers' names.

    Args:
        size: a key of :data:`LLAMA_PRESETS`.
        vocab_size: number of tokens; 256 is enough for bytes, Llama-2's tokenizer has 32 000.
        max_seq_len: longest sequence; ``None``: the preset's.
        hidden_size: as in :class:`LlamaConfig`; ``None``: the preset's. So are the next four.
        ffn_size: see ``hidden_size``.
        num_layers: see ``hidden_size``.
        num_heads: see ``hidden_size``.
        num_kv_heads: see ``hidden_size``.
        tie_embeddings: the head shares the embedding's weight.
        attention: ``sdpa`` for torch's fused kernels, ``eager`` for the plain formula, as in :class:`LlamaConfig`.
        activation_checkpointing: recompute each decoder layer in backward instead of storing its activations.
        init_on_device: build without memory, and draw the weights in ``configure_model`` on the device and in the type
            that train, instead of at once on the CPU in float32.
        reshard_after_forward: under ``ModelParallelStrategy`` (FSDP2): drop a layer's gathered parameters after its
            forward, which is ZeRO-3; without, they stay until its backward, which is ZeRO-2.
        cpu_offload: under ``ModelParallelStrategy``: keep what is sharded in the host's memory.
        pretrained: a checkpoint of this class (of ``ModelCheckpoint``, or one made with ``save_weights_only``) whose
            weights to start from; read in ``configure_model``.
        optimizer: called with the parameters that train, in ``configure_optimizers``.
        lr_scheduler: called with the optimizer; advances once per step.

    Raises:
        ValueError: there is no such preset, or the sizes do not fit together.
    """

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
        tie_embeddings: bool = False,
        attention: Attention = "sdpa",
        activation_checkpointing: bool = False,
        init_on_device: bool = False,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        pretrained: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        shape = preset(
            size,
            LLAMA_PRESETS,
            {
                "max_seq_len": max_seq_len,
                "hidden_size": hidden_size,
                "ffn_size": ffn_size,
                "num_layers": num_layers,
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
            },
        )
        config = LlamaConfig(vocab_size=vocab_size, tie_embeddings=tie_embeddings, attention=attention, **shape)
        super().__init__(
            lambda: Llama(config, activation_checkpointing=activation_checkpointing),
            init_on_device=init_on_device,
            pretrained=pretrained,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload

    @override
    def _shard(self) -> None:
        shard_model(
            self.model,
            self.model.model.layers,
            mesh=self.device_mesh,
            reshard_after_forward=self.reshard_after_forward,
            cpu_offload=self.cpu_offload,
        )


def preset(size: str, presets: Mapping[str, dict[str, Any]], replaced: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a size, with those replaced that are not None.

    Args:
        size: a key of ``presets``.
        presets: arguments by size.
        replaced: by name.

    Raises:
        ValueError: there is no such size.
    """
    if size not in presets:
        nearest = difflib.get_close_matches(size.lower(), presets, n=1)
        raise ValueError(
            f"There is no Llama of size {size!r}. Use one of {', '.join(presets)}"
            + (f"; did you mean {nearest[0]!r}?" if nearest else ".")
        )
    return presets[size] | {name: value for name, value in replaced.items() if value is not None}
