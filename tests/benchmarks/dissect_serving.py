"""Serving a burst of requests: batched as they come and go, in whole batches, one by one, and by transformers.

    python -m tests.benchmarks.dissect_serving            # about three minutes on one core
    python -m tests.benchmarks.dissect_serving --quick    # a look; writes nothing

All serve the same requests with the same weights in one process on one thread, in turns. A ratio is the median over
rounds of the tokens per second of CPU time over those of the base in the same round: a burst never waits, and the CPU
time leaves out what other processes of the machine take. Needs the extra `hf`.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from lightning_efficient.dissect import to_json
from lightning_efficient.dissect.report import Column, Table
from lightning_efficient.dissect.report.tables import Cell
from lightning_efficient.dissect.serving import (
    Batching,
    Burst,
    ContinuousBatching,
    Request,
    RequestTimes,
    ServingReport,
    ServingRun,
    StaticBatching,
    serve,
    synthetic_requests,
)
from lightning_efficient.models import Llama, LlamaConfig
from lightning_efficient.models.generation import decoder_for
from tests.benchmarks.machine import describe_machine

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "dissect_serving_2core_cpu_202611"
CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=384, ffn_size=1024, num_layers=6, num_heads=6, num_kv_heads=2, max_seq_len=256
)
REQUESTS, PROMPT_TOKENS, NEW_TOKENS, BATCH = 48, 64, (8, 128), 8
ONE, STATIC, CONTINUOUS = "ours, one at a time", "ours, static", "ours, continuous"
GENERATE, HF_CONTINUOUS = "transformers, generate", "transformers, our continuous"
PAIRS = (
    (CONTINUOUS, STATIC),
    (CONTINUOUS, ONE),
    (CONTINUOUS, GENERATE),
    (STATIC, GENERATE),
    (HF_CONTINUOUS, GENERATE),
)


def methods() -> dict[str, Callable[[Sequence[Request]], ServingRun]]:
    """Return what serves a load, by name; all with the same weights."""
    import transformers

    torch.manual_seed(0)
    model = Llama(CONFIG)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).eval()
    theirs.load_state_dict(model.state_dict())
    theirs.generation_config.eos_token_id = None  # answers have the length that was asked for

    def ours(served: Any, batching: Batching) -> Callable[[Sequence[Request]], ServingRun]:
        return lambda load: serve(
            decoder_for(served, batching.max_batch), load, Burst(len(load)), batching=batching, timeout_s=1800
        )

    return {
        ONE: ours(model, StaticBatching(1)),
        STATIC: ours(model, StaticBatching(BATCH)),
        CONTINUOUS: ours(model, ContinuousBatching(BATCH)),
        GENERATE: lambda load: serve_by_generate(theirs, load, BATCH),
        HF_CONTINUOUS: ours(theirs, ContinuousBatching(BATCH)),
    }


def serve_by_generate(model: Any, load: Sequence[Request], size: int) -> ServingRun:
    """Serve batch after batch with the model's own `generate`; prompts are of equal length, so nothing is padded.

    The clock is read at each token, as if it were streamed to its client: more than `generate` does for batches.
    """
    import transformers

    seen_s: list[float] = []

    class Clock(transformers.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            seen_s.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def answer(batch: Sequence[Request], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor([each.prompt_ids for each in batch])
        ends = transformers.StoppingCriteriaList([Clock()])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            stopping_criteria=ends,
        )
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows

    answer(load[:size], 2)
    times: list[RequestTimes | None] = []
    tokens: list[tuple[int, ...]] = []
    active: list[int] = []
    start_s = time.perf_counter()
    for first in range(0, len(load), size):
        batch = load[first : first + size]
        seen_s.clear()
        longest = max(each.max_new_tokens for each in batch)
        for request, row in zip(batch, answer(batch, longest), strict=True):
            n = request.max_new_tokens
            token_s = tuple(each - start_s for each in seen_s[:n])
            times.append(RequestTimes(0.0, token_s[0], token_s, len(request.prompt_ids), n))
            tokens.append(tuple(row[:n]))
        active += [sum(each.max_new_tokens > step for each in batch) for step in range(1, longest)]
    return ServingRun(
        batching="generate",
        arrivals=str(Burst(len(load))),
        max_batch=size,
        times=tuple(times),
        tokens=tuple(tokens),
        prefills=-(-len(load) // size),
        active_slots=tuple(active),
        cache_bytes=0,
    )


@dataclass(frozen=True)
class Round:
    """One method in one round; the CPU time includes warming up."""

    report: ServingReport
    cpu_s: float

    @property
    def tokens_per_cpu_s(self) -> float:
        """Output tokens per second of CPU time."""
        return self.report.output_tokens / self.cpu_s


def measure(rounds: int, requests: int) -> tuple[dict[str, list[Round]], dict[str, int]]:
    """Return the rounds of each method, and how many of its answers are those of one at a time."""
    load = synthetic_requests(requests, CONFIG.vocab_size, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, seed=0)
    served = methods()
    done: dict[str, list[Round]] = {name: [] for name in served}
    answers: dict[str, tuple[tuple[int, ...], ...]] = {}
    turns = [name for number in range(rounds) for name in (list(served) if number % 2 else list(reversed(served)))]
    for name in track(turns, description="serving"):
        start_s = time.process_time()
        run = served[name](load)
        cpu_s = time.process_time() - start_s
        report = run.report(model="Llama, 11.0 million parameters", device="cpu", dtype="float32")
        done[name].append(Round(report, cpu_s))
        answers[name] = run.tokens
    equal = {name: sum(a == b for a, b in zip(each, answers[ONE], strict=True)) for name, each in answers.items()}
    return done, equal


def page(done: dict[str, list[Round]], equal: dict[str, int], command: str) -> str:
    """Return the Markdown page."""
    rounds = len(done[ONE])
    rows: list[list[Cell]] = []
    for name, each in done.items():
        middle = [_median(each, read) for read in _READ.values()]
        rows.append([name, *middle, f"{equal[name]} of {each[0].report.finished}"])
    table = Table(["method", *_READ, "answers as one by one"], rows)
    pairs = Table(
        ["tokens per CPU second of", "over those of", Column("ratio", "x"), "lowest and highest round"],
        [[a, b, statistics.median(ratios(done[a], done[b])), _range(ratios(done[a], done[b]))] for a, b in PAIRS],
    )
    lines = [
        "# Serving a burst: continuous, static, one at a time, and transformers",
        "",
        f"A burst of {REQUESTS} requests, prompts of {PROMPT_TOKENS} tokens, answers of {NEW_TOKENS[0]} to "
        f"{NEW_TOKENS[1]}; batches of {BATCH}, greedy, float32, one thread. A Llama with D = {CONFIG.hidden_size}, "
        f"F = {CONFIG.ffn_size}, {CONFIG.num_layers} layers, {CONFIG.num_heads} heads on {CONFIG.kv_heads} key-value "
        f"heads, V = {CONFIG.vocab_size}. Methods take turns, {rounds} rounds; figures are medians over them. TTFT: "
        "arrival to first token. ITL: gap between tokens. E2E: arrival to last token. Occupancy: share of the batch's "
        "places with an unfinished request.",
        "",
        f"Command: `{command}`. {describe_machine()}, transformers {version('transformers')}, "
        f"{datetime.date.today():%Y-%m-%d}.",
        "",
        table.markdown(),
        "## Ratios",
        "",
        pairs.markdown(),
        "## Reading",
        "",
        READING,
    ]
    return "\n".join(lines)


READING = """Continuous batching differs from static only in refilling a place at once: the same steps, fewer of them.
Its longest gaps between tokens (ITL p99) are those in which another request's prompt is read. `generate` is timed as if
it streamed its tokens; without, its users wait for the end of their batch. Times are of the wall clock and grow with
whatever else the machine does; the ratios are of CPU time.
"""


def ratios(rounds: Sequence[Round], base: Sequence[Round]) -> list[float]:
    """Tokens per CPU second over those of the base, round by round."""
    return [a.tokens_per_cpu_s / b.tokens_per_cpu_s for a, b in zip(rounds, base, strict=True)]


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _latency(kind: str, share: str) -> Callable[[Round], float | None]:
    return lambda each: getattr(getattr(each.report, kind), share, None)


_READ: dict[Column, Callable[[Round], float | None]] = {
    Column("output", "tokens/s"): lambda each: each.report.output_tokens_per_s,
    Column("per CPU time", "tokens/s"): lambda each: each.tokens_per_cpu_s,
    Column("occupancy", "%"): lambda each: each.report.occupancy,
    Column("TTFT p50", "s"): _latency("ttft", "p50"),
    Column("ITL p50", "s"): _latency("itl", "p50"),
    Column("ITL p99", "s"): _latency("itl", "p99"),
    Column("E2E p50", "s"): _latency("e2e", "p50"),
    Column("E2E p90", "s"): _latency("e2e", "p90"),
    Column("E2E p99", "s"): _latency("e2e", "p99"),
}


def _median(rounds: Sequence[Round], read: Callable[[Round], float | None]) -> float | None:
    values = [value for value in map(read, rounds) if value is not None]
    return statistics.median(values) if values else None


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the page and the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 8 requests; prints, writes nothing")
    parser.add_argument("--rounds", type=int, default=3, help="of all methods (default: 3)")
    parser.add_argument("--out", type=Path, default=OUT, help="path of the results without suffix")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rounds, requests = (1, 8) if options.quick else (options.rounds, REQUESTS)
    done, equal = measure(rounds, requests)
    text = page(done, equal, "python -m tests.benchmarks.dissect_serving")
    print(text)
    if not options.quick:
        raw = {name: [to_json(each) for each in of_method] for name, of_method in done.items()}
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")
        options.out.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
