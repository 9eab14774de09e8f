"""The three tasks of the convergence benchmark: models of some ten thousand weights on data that needs no download."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.data import DigitsData, TextData
from lightning_efficient.models import AutoEncoder, Llama, LlamaConfig, ResNetClassifier

Batch = Any
VALIDATION_BLOCKS = 256


@dataclass(frozen=True)
class Task:
    """What is trained for how many steps, on what, and how it is judged."""

    name: str
    about: str
    steps: int
    make_data: Callable[[int], Any]
    make_model: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    accuracy: Callable[[nn.Module, Batch], float] | None = None


@functools.lru_cache(maxsize=8)
def batches(task: str, seed: int, steps: int) -> tuple[list[Batch], Batch]:
    """Return the training batches in order, and one large validation batch."""
    data = TASKS[task].make_data(seed)
    data.setup("fit")
    loader, train = data.train_dataloader(), []
    while len(train) < steps:
        train += list(loader)
    examples = data.splits.val
    return train[:steps], examples.batch(examples.items()[: VALIDATION_BLOCKS if task == "llama" else None])


@functools.lru_cache(maxsize=1)
def vocabulary() -> int:
    return TextData(tokens="char").vocab_size


def make_llama(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Llama(
        LlamaConfig(vocab_size=vocabulary(), hidden_size=48, ffn_size=128, num_layers=2, num_heads=4, max_seq_len=32)
    )


def make_autoencoder(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return AutoEncoder(64, 16, hidden=(128, 64, 32))


def make_resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ResNetClassifier(1, 10, width=8, blocks=(1, 1, 1))


@torch.no_grad()
def accuracy(net: nn.Module, batch: Batch) -> float:
    return 100 * (net(batch[0]).argmax(1) == batch[1]).double().mean().item()


TASKS = {
    task.name: task
    for task in (
        Task(
            "autoencoder",
            "perceptron 64-128-64-32-16-32-64-128-64 with ReLU on scikit-learn's digits in [0, 1], mean squared error, "
            "batch 128",
            500,
            lambda seed: DigitsData(128, flat=True, seed=seed),
            make_autoencoder,
            lambda net, batch: F.mse_loss(net(batch[0]), batch[0]),
        ),
        Task(
            "llama",
            "Llama of 2 layers, hidden 48, feed-forward 128, 4 heads on the characters of Python's help text, "
            "cross-entropy in nats per character, batch 16 x 32",
            250,
            lambda seed: TextData(tokens="char", block_size=32, batch_size=16, seed=seed),
            make_llama,
            lambda net, batch: F.cross_entropy(net(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()),
        ),
        Task(
            "resnet",
            "ResNet with batch norm, width 8, blocks (1, 1, 1) on the 8 x 8 digits, cross-entropy, batch 64",
            50,
            lambda seed: DigitsData(64, seed=seed),
            make_resnet,
            lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
            accuracy,
        ),
    )
}
