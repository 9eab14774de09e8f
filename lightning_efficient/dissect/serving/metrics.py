"""What serving costs: latencies of single requests, their distribution, and throughput."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_efficient.dissect.result import SCHEMA


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When a request came, and when each token of its answer was there.

    Attributes:
        arrival_s: seconds on any clock.
        first_token_s: on the same clock.
        token_s: of every token of the answer, the first included.
        n_prompt: tokens of the prompt.
        n_out: tokens of the answer.
    """

    arrival_s: float
    first_token_s: float
    token_s: tuple[float, ...]
    n_prompt: int
    n_out: int

    def __post_init__(self) -> None:
        if not self.token_s or len(self.token_s) != self.n_out or self.token_s[0] != self.first_token_s:
            raise ValueError(
                f"A request of {self.n_out} tokens has {len(self.token_s)} times: each token of the answer needs one, "
                "and the first is first_token_s. Record every token."
            )

    @property
    def ttft_s(self) -> float:
        """Time to first token, waiting in the queue included."""
        return self.first_token_s - self.arrival_s

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Inter-token latencies: the gaps between tokens, ``n_out - 1`` of them."""
        return tuple(later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False))

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an answer of one token."""
        return (self.e2e_s - self.ttft_s) / (self.n_out - 1) if self.n_out > 1 else None

    @property
    def e2e_s(self) -> float:
        """End-to-end latency: from arrival to the last token."""
        return self.token_s[-1] - self.arrival_s


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A sample of latencies in seconds; percentiles by linear interpolation, so p99 of few is close to the maximum.

    Attributes:
        count: size of the sample.
        mean: arithmetic mean.
        p50: median.
        p90: 90th percentile.
        p99: 99th percentile.
        max: largest.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """Summarise a sample; None if it is empty."""
        if not values:
            return None
        ordered = sorted(values)
        p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(len(ordered), statistics.fmean(ordered), p50, p90, p99, ordered[-1])


@dataclass(frozen=True, slots=True)
class CdfPoint:
    """The share of requests that took so long or less."""

    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class ServingReport:
    """What one way of batching did with a load.

    Attributes:
        batching: its name.
        arrivals: the load's arrivals, in words.
        max_batch: most requests in a batch.
        finished: requests that got all their tokens.
        failed: requests that did not, because the run's time was over.
        prompt_tokens: of the finished requests.
        output_tokens: of the finished requests.
        wall_s: from the first arrival to the last token of a finished request.
        output_tokens_per_s: output tokens over ``wall_s``.
        total_tokens_per_s: prompt and output tokens over ``wall_s``.
        occupancy: share of the batch's places that held an unfinished request, mean over the decoding steps; None
            without such a step.
        prefills: calls that read prompts.
        decode_steps: calls that added a token to each request of the batch.
        cache_bytes: of keys and values, the most between two steps; what the in-tree Llama reserves.
        ttft: time to first token; None where no request finished, as the next three.
        itl: inter-token latency, over all gaps of all requests; None if there are none.
        tpot: time per output token after the first; None if there are none.
        e2e: end-to-end latency.
        e2e_cdf: cumulative distribution of the end-to-end latency, a point for each finished request.
        model: what served, in words.
        device: where, in words.
        dtype: of the weights.
        notes: what the reader has to know.
        schema: number of this layout.
    """

    batching: str
    arrivals: str
    max_batch: int
    finished: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    wall_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    occupancy: float | None
    prefills: int
    decode_steps: int
    cache_bytes: int
    ttft: Percentiles | None
    itl: Percentiles | None
    tpot: Percentiles | None
    e2e: Percentiles | None
    e2e_cdf: tuple[CdfPoint, ...]
    model: str = ""
    device: str = ""
    dtype: str = ""
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class ServingResult:
    """The same load served in several ways.

    Attributes:
        reports: one for each.
        schema: number of this layout.
    """

    reports: tuple[ServingReport, ...]
    schema: int = SCHEMA


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return a percentile by linear interpolation between the two nearest values.

    Args:
        ordered: ascending, one value or more.
        share: 0 to 1; value i of N lies at ``i / (N - 1)``.
    """
    place = share * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    between = ordered[below] + (place - below) * (ordered[above] - ordered[below])
    return min(between, ordered[above])  # rounding could lead past it


def cdf(values: Sequence[float]) -> tuple[CdfPoint, ...]:
    """Return the empirical distribution: the k-th smallest of N values has the share k / N."""
    return tuple(CdfPoint(value, (rank + 1) / len(values)) for rank, value in enumerate(sorted(values)))
