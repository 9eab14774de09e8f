"""The load of a server: which requests come, and when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

PAPER_PROMPT_TOKENS = 512
"""Length of the prompts in the benchmark that this measurement follows (arXiv 2311.03687, section VI)."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for. Generation ends after ``max_new_tokens``: no token ends it earlier.

    Attributes:
        prompt_ids: token ids.
        max_new_tokens: tokens to generate.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int

    @property
    def total_tokens(self) -> int:
        """Tokens of the prompt and of the answer."""
        return len(self.prompt_ids) + self.max_new_tokens


class Arrivals(Protocol):
    """When requests come."""

    @property
    def n(self) -> int:
        """Number of requests."""
        ...

    def known_s(self) -> tuple[float, ...]:
        """Return the arrivals known beforehand, in seconds after the start, ascending.

        Where they are fewer than ``n``, each further request comes at the moment in which an earlier one is finished.
        """
        ...


@dataclass(frozen=True, slots=True)
class Burst:
    """All requests come at once; what the paper measures.

    Args:
        n: number of requests.

    Raises:
        ValueError: ``n`` is below 1.
    """

    n: int

    def __post_init__(self) -> None:
        _check_count("requests", self.n)

    def known_s(self) -> tuple[float, ...]:
        """Return ``n`` zeros."""
        return (0.0,) * self.n

    def __str__(self) -> str:
        return f"burst of {self.n}"


@dataclass(frozen=True, slots=True)
class Poisson:
    """Requests of many independent clients: the gaps between arrivals are exponential.

    Args:
        rate_per_s: mean number of requests per second.
        n: number of requests.
        seed: of the gaps.

    Raises:
        ValueError: ``n`` is below 1, or the rate is not above 0.
    """

    rate_per_s: float
    n: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("requests", self.n)
        if not 0 < self.rate_per_s < float("inf"):
            raise ValueError(
                f"The rate is {self.rate_per_s} requests per second: with it no request comes, or all at once. Give a "
                "number above 0, or use Burst."
            )

    def known_s(self) -> tuple[float, ...]:
        """Return the sums of ``n`` gaps; the first request comes after the first gap."""
        numbers = random.Random(self.seed)
        now, arrivals = 0.0, []
        for _ in range(self.n):
            now += numbers.expovariate(self.rate_per_s)
            arrivals.append(now)
        return tuple(arrivals)

    def __str__(self) -> str:
        return f"Poisson, {self.rate_per_s:g} requests/s, {self.n} in all"


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Each client sends its next request as soon as it has the answer to the last one.

    Args:
        clients: requests under way at any time.
        n: number of requests of all clients together.

    Raises:
        ValueError: a number is below 1.
    """

    clients: int
    n: int

    def __post_init__(self) -> None:
        _check_count("requests", self.n)
        _check_count("clients", self.clients)

    def known_s(self) -> tuple[float, ...]:
        """Return a zero for each client; later requests follow answers."""
        return (0.0,) * min(self.clients, self.n)

    def __str__(self) -> str:
        return f"closed loop of {self.clients} clients, {self.n} requests in all"


def synthetic_requests(
    n: int,
    vocab_size: int,
    *,
    prompt_tokens: int = PAPER_PROMPT_TOKENS,
    new_tokens: int | tuple[int, int] = 128,
    seed: int = 0,
) -> list[Request]:
    """Return requests of random tokens.

    Args:
        n: number of requests.
        vocab_size: ids are drawn below it.
        prompt_tokens: length of each prompt.
        new_tokens: of each answer; a pair is the range, both ends included, from which each answer's length is drawn.
        seed: of ids and lengths.

    Raises:
        ValueError: a number is below 1, or the range is empty.
    """
    low, high = (new_tokens, new_tokens) if isinstance(new_tokens, int) else new_tokens
    for what, count in (("requests", n), ("tokens to choose from", vocab_size), ("prompt tokens", prompt_tokens)):
        _check_count(what, count)
    _check_count("new tokens", low)
    if high < low:
        raise ValueError(f"The range of new tokens is {low} to {high}: it is empty. Give the smaller number first.")
    numbers = random.Random(seed)
    return [
        Request(tuple(numbers.randrange(vocab_size) for _ in range(prompt_tokens)), numbers.randint(low, high))
        for _ in range(n)
    ]


def check_requests(requests: Sequence[Request], max_seq_len: int) -> None:
    """Refuse what a model cannot answer, before any work.

    Args:
        requests: what will be asked.
        max_seq_len: most tokens of prompt and answer together.

    Raises:
        ValueError: there is no request, one is empty, or one is longer than the model can take.
    """
    _check_count("requests", len(requests))
    for number, request in enumerate(requests):
        if not request.prompt_ids or request.max_new_tokens < 1:
            raise ValueError(
                f"Request {number} has {len(request.prompt_ids)} prompt tokens and asks for {request.max_new_tokens}: "
                "both must be 1 or more. Correct the request."
            )
        if request.total_tokens > max_seq_len:
            raise ValueError(
                f"Request {number} needs {len(request.prompt_ids)} + {request.max_new_tokens} = {request.total_tokens} "
                f"tokens, more than the {max_seq_len} that the model takes (its max_seq_len): nothing was generated. "
                "Ask for shorter prompts or fewer new tokens, or raise the model's max_seq_len."
            )


def _check_count(what: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"The number of {what} is {value}: a load needs at least 1. Give 1 or more.")
