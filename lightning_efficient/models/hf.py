"""Any causal language model of transformers as a LightningModule (extra ``hf``)."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lightning_efficient.models._shard import parm_strategy, shard_model
from lightning_efficient.models.causal_lm import CausalLM, TokenBatch
from lightning_efficient.models.moe_lm import with_aux_loss
from lightning_efficient.moe.hf import swap_moe_blocks, unswap_state_dict


class HFCausalLM(CausalLM):
    """A transformers model: a new one from a configuration, or a trained one from a folder or the hub.

    The model is built in ``configure_model``, hence after the strategy is known and never while a YAML file is parsed.

    Args:
        source: a dict with ``model_type`` and the fields of its configuration (random weights, no network); or the
            folder or hub name of a trained model.
        activation_checkpointing: recompute layers in backward instead of storing their activations.
        dtype: name of a torch dtype in which the weights are held.
        attention: transformers' word for how attention is computed, such as ``sdpa``, ``eager`` or
            ``flash_attention_2``; ``None`` leaves the choice to transformers.
        reshard_after_forward: under ``ModelParallelStrategy`` (FSDP2): drop a layer's gathered parameters after its
            forward, which is ZeRO-3; without, they stay until its backward, which is ZeRO-2.
        cpu_offload: under ``ModelParallelStrategy``: keep what is sharded in the host's memory.
        moe: replace the mixture-of-experts blocks of a Mixtral or Qwen-MoE by those of this package, so that
            :class:`~lightning_efficient.strategies.ParmStrategy` can spread them: the arguments of
            :func:`~lightning_efficient.moe.hf.swap_moe_blocks`, ``{}`` for its defaults. The loss of training then has
            their auxiliary loss in it, and ``aux_loss`` and ``dropped`` are logged, as by
            :class:`~lightning_efficient.models.MoELlamaLM`. ``None`` leaves the blocks as they are.
        optimizer: called with the parameters that train, in ``configure_optimizers``.
        lr_scheduler: called with the optimizer; advances once per step.

    Raises:
        ValueError: the dict names no model type, or ``dtype`` is not a floating-point dtype.
        ModuleNotFoundError: transformers is not installed (when the model is built).
    """

    def __init__(
        self,
        source: str | dict[str, Any],
        *,
        activation_checkpointing: bool = False,
        dtype: str = "float32",
        attention: str | None = None,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        moe: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if isinstance(source, dict) and "model_type" not in source:
            raise ValueError(
                f"The model's configuration has no model_type (it has {', '.join(source) or 'nothing'}): transformers "
                "cannot tell which model to build. Add, for example, model_type: llama."
            )
        self.source = source
        self.activation_checkpointing = activation_checkpointing
        self.dtype_of_weights = _floating_dtype(dtype)
        self.attention = attention
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload
        self.moe = moe
        self.model: nn.Module | None = None

    @override
    def configure_model(self) -> None:
        """Build the model, and swap its blocks or shard it where that is asked for; once.

        Raises:
            ValueError: transformers cannot find or read ``source``; or ``cpu_offload`` or ``moe`` cannot be had.
            ModuleNotFoundError: transformers is not installed.
        """
        if self.model is not None:
            return
        try:
            import transformers
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "HFCausalLM needs transformers, but it is not installed. "
                "Install it with: pip install 'lightning-efficient[hf]'"
            ) from error
        auto_model: Any = transformers.AutoModelForCausalLM
        how: dict[str, Any] = {"dtype": self.dtype_of_weights}
        if self.attention is not None:
            how["attn_implementation"] = self.attention
        # The key-value cache only serves generation; in training it would hold every layer's keys and values.
        if isinstance(self.source, dict):
            config = transformers.AutoConfig.for_model(**self.source)
            config.use_cache = False
            model = auto_model.from_config(config, **how)
        else:
            try:
                model = auto_model.from_pretrained(self.source, use_cache=False, **how)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"transformers cannot load a model from {self.source!r} ({_first_line(error)}). Give a folder made "
                    "by save_pretrained, a hub name (this needs a network), or a configuration dict for random weights."
                ) from error
        if self.activation_checkpointing:
            if hasattr(model, "activation_checkpointing_enable"):
                model.activation_checkpointing_enable({"use_reentrant": False})
            else:  # its older name
                model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.moe is not None:
            swap_moe_blocks(model, **self.moe)
        self.model = model.train()
        if parm_strategy(self) is not None:
            return
        # transformers names the classes of a model's layers, for whoever wraps or cuts models.
        classes = set(getattr(model, "_no_split_modules", None) or ())
        shard_model(
            model,
            [each for each in model.modules() if type(each).__name__ in classes],
            mesh=self.device_mesh,
            reshard_after_forward=self.reshard_after_forward,
            cpu_offload=self.cpu_offload,
        )

    @property
    @override
    def vocab_size(self) -> int:
        return int(self._built().config.vocab_size)

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the token ids (B, T)."""
        logits_BTV: Tensor = self._built()(input_ids=input_ids).logits
        return logits_BTV

    @override
    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Return the loss, a scalar; with that of the experts where blocks were swapped."""
        loss = super().training_step(batch, batch_idx)
        return loss if self.moe is None else with_aux_loss(self, loss, batch_size=len(batch["input_ids"]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a folder that transformers, and ``HFCausalLM(folder)``, can load; all ranks call it."""
        if self.moe is None:
            self._built().save_pretrained(folder)
        else:
            weights = unswap_state_dict(self._built())
            self._built().save_pretrained(folder, state_dict=weights, is_main_process=self.global_rank == 0)

    def _built(self) -> Any:
        if self.model is None:
            raise RuntimeError(
                "The HFCausalLM has no model yet: a Trainer builds it after setup. Call configure_model() first."
            )
        return self.model


def _floating_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {name!r}: weights need a floating-point torch dtype. Use float32 or bfloat16.")
    return dtype


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
