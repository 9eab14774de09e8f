"""`lightning-efficient bench serve`: what generation costs under a load of requests."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_efficient.cli.bench.serve_model import Served, model_of_recipe
from lightning_efficient.cli.bench.serve_report import headline, latency_table, summary_table, write_report
from lightning_efficient.cli.errors import CommandParser, UserError
from lightning_efficient.cli.files import require_file, require_folder
from lightning_efficient.cli.recipes import require_recipe
from lightning_efficient.dissect.result import write_json
from lightning_efficient.dissect.serving import (
    Arrivals,
    Batching,
    Burst,
    ClosedLoop,
    ContinuousBatching,
    Poisson,
    Request,
    ServingReport,
    ServingResult,
    StaticBatching,
    check_requests,
    serve,
    synthetic_requests,
)
from lightning_efficient.dissect.serving.load import PAPER_PROMPT_TOKENS
from lightning_efficient.models.generation import decoder_for, longest_sequence

_NEW_TOKENS = 128
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_BATCHINGS: dict[str, Callable[[int], Batching]] = {"static": StaticBatching, "continuous": ContinuousBatching}
_DESCRIPTION = """\
Builds the model of a recipe, sends it requests of random tokens, and prints how long their answers took: time to first
token (TTFT), between tokens (ITL), per token after the first (TPOT), end to end (E2E), and tokens per second.
Options not listed here go to the recipe, as with 'fit': --model.size 160m, ...
"""
_EXAMPLES = """\
examples:
  lightning-efficient bench serve -c llama/pretrain --requests 8 --prompt-tokens 32 --new-tokens 16
  lightning-efficient bench serve -c llama/pretrain --arrivals poisson --rate 4 --new-tokens 8-64 --out serving
  lightning-efficient bench serve -c hf/causal_lm --batching continuous --arrivals closed --clients 4
"""


def main(argv: Sequence[str]) -> int:
    """Run `bench serve` with the words after it.

    Args:
        argv: e.g. `["-c", "llama/pretrain", "--requests", "8"]`.

    Returns:
        The exit code: 0, or 1 when requests were not finished in time.

    Raises:
        UserError: An option is wrong, or the recipe's model cannot generate what is asked for.
    """
    options, recipe_args = _parser().parse_known_args(list(argv))
    arrivals = _arrivals(options)
    new_tokens = None if options.new_tokens is None else parse_new_tokens(options.new_tokens)
    device = _device(options.device)
    _check(options)
    require_recipe(recipe_args, "a model is needed to generate")
    served = model_of_recipe(
        recipe_args,
        checkpoint=options.checkpoint,
        device=device,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
    )
    requests = _requests(served, options, new_tokens)
    result = ServingResult(tuple(_measure(served, requests, arrivals, options)))
    _show(result, options)
    return 1 if any(report.failed for report in result.reports) else 0


def parse_new_tokens(text: str) -> int | tuple[int, int]:
    """Tokens of each answer: `64`, or the range `8-64` to draw from.

    Raises:
        UserError: If it is neither.
    """
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if low < 1 or high < low:
        raise UserError(
            f"--new-tokens {text}: it is a number above 0, or a range of two with the smaller one first. Write e.g. "
            "64 or 8-64."
        )
    return (low, high) if match and match[2] else low


def _arrivals(options: argparse.Namespace) -> Arrivals:
    if options.requests < 1:
        raise UserError(f"--requests {options.requests}: a load needs at least one. Give 1 or more.")
    for name, value, kind in (("rate", options.rate, "poisson"), ("clients", options.clients, "closed")):
        if (value is not None) != (options.arrivals == kind):
            given = f"--{name} {value:g}" if value is not None else f"no --{name}"
            raise UserError(
                f"--arrivals {options.arrivals} with {given}: --{name} belongs to --arrivals {kind}, which needs it. "
                + (f"Add --{name}." if value is None else f"Leave it out, or give --arrivals {kind}.")
            )
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} {value:g}: it must be above 0, or no request comes. Give a larger number.")
    if options.arrivals == "poisson":
        return Poisson(options.rate, options.requests, seed=options.seed)
    return ClosedLoop(options.clients, options.requests) if options.arrivals == "closed" else Burst(options.requests)


def _check(options: argparse.Namespace) -> None:
    for name, value in (("max-batch", options.max_batch), ("prompt-tokens", options.prompt_tokens)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1 is needed to generate. Give 1 or more.")
    if options.out:
        require_folder(options.out, "--out")
    if options.json:
        require_file(options.json, "--json")
    if not options.timeout > 0:
        raise UserError(f"--timeout {options.timeout:g}: it is a time in seconds. Give a number above 0.")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: torch knows no such device. Give auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name}: no model runs there on this machine. Give auto, cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here. Give auto or cpu.")
    return device


def _requests(served: Served, options: argparse.Namespace, new_tokens: int | tuple[int, int] | None) -> list[Request]:
    longest = longest_sequence(served.model)
    prompt = options.prompt_tokens or min(PAPER_PROMPT_TOKENS, max(1, (longest or 2 * PAPER_PROMPT_TOKENS) // 2))
    new = new_tokens or min(_NEW_TOKENS, max(1, (longest or _NEW_TOKENS + prompt) - prompt))
    requests = synthetic_requests(
        options.requests, served.vocab_size, prompt_tokens=prompt, new_tokens=new, seed=options.seed
    )
    if longest is not None:
        try:
            check_requests(requests, longest)
        except ValueError as error:
            raise UserError(str(error)) from error
    return requests


def _measure(
    served: Served, requests: Sequence[Request], arrivals: Arrivals, options: argparse.Namespace
) -> list[ServingReport]:
    places = min(options.max_batch, len(requests))
    longest = max(each.total_tokens for each in requests)
    names = list(_BATCHINGS) if options.batching == "both" else [options.batching]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    reports = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        for name in names:
            task = bar.add_task(name, total=len(requests))
            run = serve(
                # A decoder of its own, so that the cache of one is not part of the other's figures.
                decoder_for(served.model, places, max_len=longest),
                requests,
                arrivals,
                batching=_BATCHINGS[name](places),
                timeout_s=options.timeout,
                progress=lambda done, task=task: bar.update(task, completed=done),  # type: ignore[misc]
            )
            report = run.report(model=served.name, device=served.device, dtype=served.dtype, notes=served.notes)
            reports.append(replace(report, notes=(*report.notes, _load_in_words(requests))))
    return reports


def _load_in_words(requests: Sequence[Request]) -> str:
    prompts = sorted(len(each.prompt_ids) for each in requests)
    answers = sorted(each.max_new_tokens for each in requests)
    new = f"{answers[0]}" if answers[0] == answers[-1] else f"{answers[0]} to {answers[-1]}"
    return f"Prompts of {prompts[0]} random tokens, answers of {new}; no token ends an answer early."


def _show(result: ServingResult, options: argparse.Namespace) -> None:
    lead = headline(result.reports)
    tables = "\n".join(table.text() for table in (summary_table(result.reports), latency_table(result.reports)))
    sys.stdout.write(tables + "\n" + "\n".join(lead) + "\n")
    if options.json:
        write_json(result, options.json)
    if options.out:
        sys.stdout.write(f"\nWrote {write_report(result, options.out)}, serve.md and serve.json.\n")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="lightning-efficient bench serve",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="lightning-efficient bench serve -c RECIPE [options] [recipe overrides]",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="PATH", help="weights of a checkpoint that 'fit' wrote (default: as built)")
    add("--batching", choices=(*_BATCHINGS, "both"), default="both", help="default: both, one after the other")
    add("--arrivals", choices=("burst", "poisson", "closed"), default="burst", help="default: burst, all at once")
    add("--rate", type=float, metavar="R", help="requests per second, for poisson")
    add("--clients", type=int, metavar="K", help="requests under way at a time, for closed")
    add("--requests", type=int, default=32, metavar="N", help="default: 32")
    add("--prompt-tokens", type=int, metavar="P", help="default: 512, or half of what the model takes if that is less")
    add("--new-tokens", metavar="M|MIN-MAX", help="per answer (default: 128, or what the model has room for)")
    add("--max-batch", type=int, default=8, metavar="B", help="requests in a batch (default: 8)")
    add("--seed", type=int, default=0, metavar="S", help="of prompts, lengths and arrivals (default: 0)")
    add("--dtype", choices=_DTYPES, help="of the weights (default: as built)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds for each batching (default: 600)")
    add("--out", type=Path, metavar="DIR", help="write a page with plots, Markdown and JSON")
    add("--json", type=Path, metavar="FILE", help="write the result")
    return parser
