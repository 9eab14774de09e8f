"""Models of several kinds, large enough that their own operations are what backward consists of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from typing_extensions import override

from lightning_efficient.models import Llama, LlamaConfig, ResNetClassifier

CLASSES, VOCAB = 10, 256


@dataclass(frozen=True)
class Case:
    """A model and the loss of one fixed batch."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]


def llama(rows: int = 4) -> Case:
    ids = torch.randint(0, VOCAB, (rows, 257))
    shape = LlamaConfig(vocab_size=VOCAB, hidden_size=256, ffn_size=688, num_layers=4, num_heads=4, max_seq_len=256)
    return Case(Llama(shape), lambda net: F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))


def llama_with_only_q_proj_trained() -> Case:
    case = llama()
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    return case


def resnet() -> Case:
    """Its ReLUs work in place."""
    x, y = torch.rand(64, 3, 32, 32), torch.randint(0, CLASSES, (64,))
    model = ResNetClassifier(in_channels=3, width=16, blocks=(2, 2, 2))
    return Case(model, lambda net: F.cross_entropy(net(x), y))


class LSTMClassifier(nn.Module):
    """Classes of sequences of words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 256)
        self.lstm = nn.LSTM(256, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, CLASSES)

    @override
    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embed(ids))
        return self.head(hidden[:, -1])  # type: ignore[no-any-return]


def lstm() -> Case:
    ids, y = torch.randint(0, VOCAB, (32, 64)), torch.randint(0, CLASSES, (32,))
    return Case(LSTMClassifier(), lambda net: F.cross_entropy(net(ids), y))


def bert() -> Case:
    """The encoder of transformers, from its configuration.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import BertConfig, BertModel

    shape = BertConfig(
        vocab_size=VOCAB, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    ids = torch.randint(0, VOCAB, (8, 128))
    return Case(BertModel(shape, add_pooling_layer=False), lambda net: net(ids).last_hidden_state.square().mean())


def checkpointed(case: Case, implementation: CheckpointImpl) -> Case:
    """The Llama of a case with its layers computed twice."""
    layers: Any = next(each for each in case.model.modules() if isinstance(each, nn.ModuleList))
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer, implementation)
    return case


CASES: dict[str, Callable[[], Case]] = {
    "Llama": llama,
    "Llama, non-reentrant checkpointing": lambda: checkpointed(llama(), CheckpointImpl.NO_REENTRANT),
    "Llama, reentrant checkpointing": lambda: checkpointed(llama(), CheckpointImpl.REENTRANT),
    "Llama, only q_proj trained": llama_with_only_q_proj_trained,
    "ResNet, in-place ReLU": resnet,
    "LSTM": lstm,
    "BERT": bert,
}
