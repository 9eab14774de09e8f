"""The model of a recipe, ready to generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import Precision
from torch import nn
from typing_extensions import override

from lightning_efficient.callbacks import LoRAFA, PEFTAdapter
from lightning_efficient.cli.efficient_cli import EfficientCLI
from lightning_efficient.cli.errors import UserError
from lightning_efficient.models import CausalLM
from lightning_efficient.models._module import load_weights


@dataclass(frozen=True, slots=True)
class Served:
    """A model on its device.

    Attributes:
        model: a Llama of this package or a causal language model of transformers.
        vocab_size: number of its tokens.
        name: its class and size, in words.
        device: where it is, in words.
        dtype: of its weights.
        notes: what of the recipe does not hold here.
    """

    model: nn.Module
    vocab_size: int
    name: str
    device: str
    dtype: str
    notes: tuple[str, ...]


def model_of_recipe(
    recipe_args: Sequence[str], *, checkpoint: Path | None, device: torch.device, dtype: torch.dtype | None
) -> Served:
    """Build the model of a recipe; its data and its Trainer are parsed, but do not run.

    Args:
        recipe_args: the recipe and its overrides, as words of the command line.
        checkpoint: Lightning's, whose weights to take; ``None``: those that the recipe builds or loads.
        device: where to serve.
        dtype: of the weights; ``None``: as built.

    Raises:
        UserError: the recipe's model is no language model, or there is no such checkpoint.
        ValueError: the checkpoint holds another model.
    """
    cli = _ModelCLI(recipe_args)
    module = cli.model
    if not isinstance(module, CausalLM):
        raise UserError(
            f"the recipe's model is {type(module).__name__}: tokens come from language models only. Give a recipe with "
            "LlamaLM or HFCausalLM, e.g. -c llama/pretrain."
        )
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f"--checkpoint {checkpoint}: there is no such file. Correct the path, or leave it out.")
    module.configure_model()
    model: Any = module.model
    if checkpoint is not None:
        load_weights(model, str(checkpoint), prefix="model.")
    model = model.to(device=device, dtype=dtype)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Served(
        model=model,
        vocab_size=module.vocab_size,
        name=f"{type(model).__name__} of {weights / 1e6:.3g} million parameters",
        device=_in_words(device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        notes=_left_out(cli),
    )


class _ModelCLI(EfficientCLI):
    """Parses a recipe as `fit` does, and builds all of it but the Trainer."""

    def __init__(self, recipe_args: Sequence[str]) -> None:
        super().__init__(list(recipe_args), run=False, save_config_callback=None)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        return cast(pl.Trainer, None)  # nothing is trained, and one for the recipe's devices may be impossible here


def _in_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} (threads of torch: {torch.get_num_threads()})"


def _left_out(cli: EfficientCLI) -> tuple[str, ...]:
    trainer = cli.config_init["trainer"]
    adapters = [each for each in _listed(trainer, "callbacks") if isinstance(each, (LoRAFA, PEFTAdapter))]
    precisions = [each for each in _listed(trainer, "plugins") if isinstance(each, Precision)]
    return (
        *(f"The recipe's {type(each).__name__} was not run: the model is served without it." for each in adapters),
        *(f"The recipe's {type(each).__name__} was not run: weights are served as built." for each in precisions),
    )


def _listed(config: Any, key: str) -> list[Any]:
    given = config.get(key) or []
    return given if isinstance(given, list) else [given]
