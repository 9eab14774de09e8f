"""A token stream whose best possible loss is known in closed form."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_efficient.data._examples import TokenBlocks, seeded_generator
from lightning_efficient.data._module import InMemoryDataModule, Splits, require_at_least


class SyntheticTokens(InMemoryDataModule):
    r"""Tokens that follow a planted rule most of the time: for speed runs, and to see whether a model learns at all.

    The stream is a Markov chain. The rule :math:`\pi` is a random cycle through the whole vocabulary, and

    .. math:: x_{t+1} = \pi(x_t) \text{ with probability } 1 - \nu, \text{ else uniform over the } V \text{ tokens.}

    Tokens are uniform on their own (their unigram entropy is :math:`\log V`); given the one before, their entropy is
    :attr:`entropy_floor`. Batches are as in :class:`~lightning_efficient.data.TextData`.

    Args:
        vocab_size: number of tokens, V.
        block_size: tokens per sequence, T.
        batch_size: sequences per process and batch.
        noise: probability :math:`\nu` of a uniform token, in [0, 1].
        num_train_tokens: length of the training stream.
        num_val_tokens: length of the validation stream, a fresh one under the same rule.
        seed: decides the rule, the streams and the order.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        vocab_size: int = 64,
        block_size: int = 64,
        *,
        batch_size: int = 16,
        noise: float = 0.1,
        num_train_tokens: int = 131_072,
        num_val_tokens: int = 16_384,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        require_at_least("vocab_size", vocab_size, 2)
        require_at_least("block_size", block_size, 1)
        require_at_least("num_train_tokens", num_train_tokens, block_size + 1)
        require_at_least("num_val_tokens", num_val_tokens, block_size + 1)
        if not 0 <= noise <= 1:
            raise ValueError(f"noise is {noise}, but is a probability. Set it between 0 and 1.")
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.noise = noise
        self.num_train_tokens = num_train_tokens
        self.num_val_tokens = num_val_tokens

    @property
    def entropy_floor(self) -> float:
        """Entropy of a token given the one before, in nats: no model has a lower expected loss."""
        p_other = self.noise / self.vocab_size
        p_rule = 1 - self.noise + p_other
        others = -(self.vocab_size - 1) * p_other * math.log(p_other) if p_other > 0 else 0.0
        return others - p_rule * math.log(p_rule)

    @override
    def make_splits(self) -> Splits:
        """Draw the rule and one stream per split."""
        cycle_V = torch.randperm(self.vocab_size, generator=seeded_generator(self.seed, "rule"), device="cpu")
        rule_V = torch.empty_like(cycle_V).scatter(0, cycle_V, cycle_V.roll(-1))
        streams = (
            markov_stream(rule_V, length, noise=self.noise, generator=seeded_generator(self.seed, name))
            for name, length in (("train", self.num_train_tokens), ("val", self.num_val_tokens))
        )
        return Splits(*(TokenBlocks(stream, self.block_size) for stream in streams))


def markov_stream(rule_V: Tensor, length: int, *, noise: float, generator: torch.Generator) -> Tensor:
    """Return ``length`` tokens that follow ``rule_V`` with probability ``1 - noise``, as int32."""
    uniform = torch.randint(len(rule_V), (length,), generator=generator, device="cpu").tolist()
    is_noise = (torch.rand(length, generator=generator, device="cpu") < noise).tolist()
    rule = rule_V.tolist()
    token, tokens = uniform[0], []
    for follows_noise, draw in zip(is_noise, uniform, strict=True):
        token = draw if follows_noise else rule[token]
        tokens.append(token)
    return torch.tensor(tokens, dtype=torch.int32)
