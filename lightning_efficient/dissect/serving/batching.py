"""Which requests share a batch, and the loop that serves them.

A decoder keeps the keys and values of some requests, each in a slot, and adds a token to each of them at a time. A way
of batching decides when a waiting request gets a free slot.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lightning_efficient.dissect.serving.load import Arrivals, Request, check_requests
from lightning_efficient.dissect.serving.metrics import Percentiles, RequestTimes, ServingReport, cdf

_LONGEST_SLEEP_S = 0.05  # between two looks at the clock


class Decoder(Protocol):
    """A model that generates for several requests at once. Its answers are plain numbers, so a device has ended."""

    @property
    def slots(self) -> int:
        """Most requests at a time."""
        ...

    @property
    def max_seq_len(self) -> int:
        """Most tokens of a request, prompt and answer together."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes that keys and values take now."""
        ...

    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Read a prompt into each of some free slots, and return the first token of each answer."""
        ...

    def decode(self, slots: Sequence[int]) -> list[int]:
        """Return the next token of each of some slots in use."""
        ...

    def release(self, slots: Sequence[int]) -> None:
        """Free slots."""
        ...


class Batching(Protocol):
    """When waiting requests start."""

    @property
    def name(self) -> str:
        """One word."""
        ...

    @property
    def max_batch(self) -> int:
        """Most requests at a time."""
        ...

    @property
    def releases_at_once(self) -> bool:
        """Whether a finished request leaves the batch; else it is carried along until the whole batch has ended."""
        ...

    def admits(self, waiting: int, in_use: int) -> int:
        """Return how many of the waiting requests start now, while so many slots are in use."""
        ...


@dataclass(frozen=True, slots=True)
class StaticBatching:
    """A batch runs until its longest request has ended, then the next one starts.

    It takes the requests that wait at its start, up to ``batch_size``, and never waits for more. A request that ends
    early keeps its place, and the model goes on computing it.

    Args:
        batch_size: most requests in a batch.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """

    batch_size: int
    name: str = field(default="static", init=False)
    releases_at_once: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        _check_size("batch_size", self.batch_size)

    @property
    def max_batch(self) -> int:
        """Most requests at a time."""
        return self.batch_size

    def admits(self, waiting: int, in_use: int) -> int:
        """Return what fills a new batch, and nothing while one runs."""
        return 0 if in_use else min(waiting, self.batch_size)


@dataclass(frozen=True, slots=True)
class ContinuousBatching:
    """A request starts as soon as a slot is free, between two tokens of the others (Yu et al., Orca, OSDI 2022).

    Args:
        max_slots: most requests at a time.

    Raises:
        ValueError: ``max_slots`` is below 1.
    """

    max_slots: int
    name: str = field(default="continuous", init=False)
    releases_at_once: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        _check_size("max_slots", self.max_slots)

    @property
    def max_batch(self) -> int:
        """Most requests at a time."""
        return self.max_slots

    def admits(self, waiting: int, in_use: int) -> int:
        """Return what fills the free slots."""
        return min(waiting, self.max_slots - in_use)


@dataclass(frozen=True, slots=True)
class ServingRun:
    """What happened to each request.

    Attributes:
        batching: name of the way of batching.
        arrivals: in words.
        max_batch: most requests at a time.
        times: of each request, in the order of the load; None for one that was not finished in time.
        tokens: of each answer, as far as it got.
        prefills: calls that read prompts.
        active_slots: for each decoding step, how many of the batch's places held an unfinished request.
        cache_bytes: of the decoder, the most between two steps.
    """

    batching: str
    arrivals: str
    max_batch: int
    times: tuple[RequestTimes | None, ...]
    tokens: tuple[tuple[int, ...], ...]
    prefills: int
    active_slots: tuple[int, ...]
    cache_bytes: int

    def report(self, *, model: str = "", device: str = "", dtype: str = "", notes: Sequence[str] = ()) -> ServingReport:
        """Return the run in figures.

        Args:
            model: what served, in words.
            device: where, in words.
            dtype: of the weights.
            notes: to be kept with the figures.
        """
        done = [each for each in self.times if each is not None]
        prompt, output = sum(each.n_prompt for each in done), sum(each.n_out for each in done)
        wall_s = max(each.token_s[-1] for each in done) - min(each.arrival_s for each in done) if done else 0.0
        steps = self.active_slots
        return ServingReport(
            batching=self.batching,
            arrivals=self.arrivals,
            max_batch=self.max_batch,
            finished=len(done),
            failed=len(self.times) - len(done),
            prompt_tokens=prompt,
            output_tokens=output,
            wall_s=wall_s,
            output_tokens_per_s=output / wall_s if wall_s else 0.0,
            total_tokens_per_s=(prompt + output) / wall_s if wall_s else 0.0,
            occupancy=sum(steps) / (len(steps) * self.max_batch) if steps else None,
            prefills=self.prefills,
            decode_steps=len(steps),
            cache_bytes=self.cache_bytes,
            ttft=Percentiles.of([each.ttft_s for each in done]),
            itl=Percentiles.of([gap for each in done for gap in each.itl_s]),
            tpot=Percentiles.of([each.tpot_s for each in done if each.tpot_s is not None]),
            e2e=Percentiles.of([each.e2e_s for each in done]),
            e2e_cdf=cdf([each.e2e_s for each in done]),
            model=model,
            device=device,
            dtype=dtype,
            notes=tuple(notes),
        )


def serve(
    decoder: Decoder,
    requests: Sequence[Request],
    arrivals: Arrivals,
    *,
    batching: Batching,
    timeout_s: float = 600.0,
    warm_up: bool = True,
    progress: Callable[[int], None] | None = None,
) -> ServingRun:
    """Serve a load in real time.

    Args:
        decoder: generates; all its slots are free, and are again afterwards.
        requests: in the order in which they come.
        arrivals: when they come; as many as ``requests``.
        batching: decides which of them share a batch.
        timeout_s: seconds for the whole run; what is unfinished then has failed. It is looked at between two steps.
        warm_up: read the first prompts and add one token before the clock starts, so that what happens once (loading
            kernels, growing an allocator) is not part of the first latency.
        progress: called with the number of finished requests whenever it changes.

    Raises:
        ValueError: a request is too long for the decoder, the batch too large, or numbers do not fit together; before
            any work.
    """
    check_requests(requests, decoder.max_seq_len)
    if arrivals.n != len(requests):
        raise ValueError(
            f"There are {len(requests)} requests and {arrivals.n} arrivals: each request comes once. Make them equal."
        )
    if batching.max_batch > decoder.slots:
        raise ValueError(
            f"The batch has {batching.max_batch} places and the decoder {decoder.slots} slots: a place needs a slot. "
            "Make the batch smaller, or the decoder with more slots."
        )
    if not timeout_s > 0:
        raise ValueError(f"The timeout is {timeout_s} s: nothing could be served. Give a number above 0.")
    if warm_up:
        _warm_up(decoder, requests[: batching.max_batch])
    return _Server(decoder, requests, arrivals, batching, progress).run(timeout_s)


@dataclass(slots=True)
class _Answer:
    """A request on its way."""

    number: int
    request: Request
    arrival_s: float
    tokens: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    computed: int = 0  # tokens, those after its end included

    @property
    def finished(self) -> bool:
        return len(self.tokens) == self.request.max_new_tokens

    def times(self) -> RequestTimes | None:
        if not self.finished:
            return None
        token_s = tuple(self.token_s)
        return RequestTimes(self.arrival_s, token_s[0], token_s, len(self.request.prompt_ids), len(token_s))


class _Server:
    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[Request],
        arrivals: Arrivals,
        batching: Batching,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._decoder, self._arrivals, self._batching, self._progress = decoder, arrivals, batching, progress
        self._coming = deque(_Answer(number, request, 0.0) for number, request in enumerate(requests))
        self._waiting: deque[_Answer] = deque()
        self._slots: dict[int, _Answer] = {}
        self._answers = tuple(self._coming)
        self._finished = 0
        self._prefills = 0
        self._cache_bytes = 0
        self._active: list[int] = []
        self._start_s = 0.0
        self._known_s = deque(arrivals.known_s())

    def run(self, timeout_s: float) -> ServingRun:
        self._start_s = time.perf_counter()
        while self._finished < len(self._answers) and self._now() < timeout_s:
            self._welcome()
            # Again, as an answer of one token frees its slot at once.
            while self._now() < timeout_s and (admitted := self._batching.admits(len(self._waiting), len(self._slots))):
                self._prefill(admitted)
                self._welcome()
            if self._slots:
                self._decode()
            elif not self._waiting and self._known_s:
                time.sleep(max(0.0, min(self._known_s[0] - self._now(), _LONGEST_SLEEP_S)))
        self._decoder.release(sorted(self._slots))
        return ServingRun(
            batching=self._batching.name,
            arrivals=str(self._arrivals),
            max_batch=self._batching.max_batch,
            times=tuple(each.times() for each in self._answers),
            tokens=tuple(tuple(each.tokens) for each in self._answers),
            prefills=self._prefills,
            active_slots=tuple(self._active),
            cache_bytes=self._cache_bytes,
        )

    def _now(self) -> float:
        return time.perf_counter() - self._start_s

    def _welcome(self) -> None:
        """Let those in whose time has come. They arrived when they arrived, even if a step was running then."""
        while self._known_s and self._known_s[0] <= self._now():
            self._arrive(self._known_s.popleft())

    def _arrive(self, when_s: float) -> None:
        answer = self._coming.popleft()
        answer.arrival_s = when_s
        self._waiting.append(answer)

    def _prefill(self, admitted: int) -> None:
        free = [slot for slot in range(self._batching.max_batch) if slot not in self._slots][:admitted]
        starting = {slot: self._waiting.popleft() for slot in free}
        self._slots.update(starting)
        tokens = self._decoder.prefill(free, [each.request.prompt_ids for each in starting.values()])
        self._prefills += 1
        self._add(starting, tokens)

    def _decode(self) -> None:
        # A finished request that static batching carries along is computed too, as long as the model has room for it.
        carried = {
            slot: each
            for slot, each in sorted(self._slots.items())
            if len(each.request.prompt_ids) + each.computed < self._decoder.max_seq_len
        }
        self._active.append(sum(not each.finished for each in carried.values()))
        tokens = self._decoder.decode(list(carried))
        self._add(carried, tokens)

    def _add(self, answers: dict[int, _Answer], tokens: list[int]) -> None:
        now = self._now()
        self._cache_bytes = max(self._cache_bytes, self._decoder.cache_bytes)
        for answer, token in zip(answers.values(), tokens, strict=True):
            answer.computed += 1
            if answer.finished:
                continue
            answer.tokens.append(token)
            answer.token_s.append(now)
            if answer.finished:
                self._finish(now)
        self._release()

    def _finish(self, now: float) -> None:
        self._finished += 1
        if self._progress is not None:
            self._progress(self._finished)
        if self._coming and not self._known_s:  # a closed loop: the client asks again
            self._arrive(now)

    def _release(self) -> None:
        ended = [slot for slot, each in sorted(self._slots.items()) if each.finished]
        if ended and (self._batching.releases_at_once or len(ended) == len(self._slots)):
            self._decoder.release(ended)
            for slot in ended:
                del self._slots[slot]


def _warm_up(decoder: Decoder, requests: Sequence[Request]) -> None:
    slots = list(range(len(requests)))
    decoder.prefill(slots, [each.prompt_ids for each in requests])
    if all(len(each.prompt_ids) + 1 < decoder.max_seq_len for each in requests):
        decoder.decode(slots)
    decoder.release(slots)


def _check_size(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}: a batch holds at least 1 request. Give 1 or more.")
