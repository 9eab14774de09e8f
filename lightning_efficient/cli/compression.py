"""`lightning-efficient compression recommend`: which rank and bucket size for this model and link."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_efficient.cli.errors import CommandParser, UserError
from lightning_efficient.cli.recipes import require_recipe

if TYPE_CHECKING:
    from lightning_efficient.callbacks.link_probe import ProbeResult
    from lightning_efficient.compression.planning.cost_model import LinkModel
    from lightning_efficient.compression.planning.recommendation import Recommendation

_BITS_PER_S = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_DESCRIPTION = """\
Trains a recipe for a few steps with plain DDP, measures its compute and the link between its processes, and recommends
whether to compress gradients with ACP-SGD, at which rank and with which bucket size. Nothing is saved.
Options not listed here go to the recipe, as with 'fit': --trainer.devices 4, --model.size tiny, ...
"""
_EXAMPLES = """\
examples:
  lightning-efficient compression recommend -c quickstart --trainer.devices 2
  lightning-efficient compression recommend -c mine.yaml --link 100mbit --latency 0.2ms --world-size 8
"""


def main(argv: Sequence[str]) -> int:
    """Run `compression` with the words after it.

    Args:
        argv: e.g. `["recommend", "-c", "quickstart"]`.

    Returns:
        The exit code: 0.

    Raises:
        UserError: If the recipe, a unit or the world size is missing or wrong.
    """
    options, recipe_args = _parser().parse_known_args(list(argv))
    link = _what_if_link(options)
    require_recipe(recipe_args, "the model and its data decide how long backward takes")
    from lightning_efficient.cli.compression_probe import probe_recipe

    probe = probe_recipe(recipe_args, steps=options.steps, single_process=link is not None)
    if probe is None:  # another rank speaks
        return 0
    world_size = options.world_size or probe.world_size
    link = link or probe.link
    assert link is not None  # measured, or given
    from lightning_efficient.compression.planning.recommendation import recommend

    answer = recommend(probe.workload, link, world_size=world_size, device=probe.device)
    _show(answer, probe, link, world_size)
    if options.json:
        options.json.write_text(json.dumps(as_json(answer, probe, link, world_size), indent=2) + "\n", encoding="utf-8")
    return 0


def parse_rate(text: str) -> float:
    """Bits per second of `100mbit`, `1.5gbit`, `10gbit/s`.

    Raises:
        UserError: If it is not a number above 0 followed by a unit of bits.
    """
    return _quantity(text.removesuffix("/s"), _BITS_PER_S, what="link rate", example="100mbit", positive=True)


def parse_time(text: str) -> float:
    """Seconds of `0.2ms`, `50us`, `1s`.

    Raises:
        UserError: If it is not a number, 0 or more, followed by a unit of time.
    """
    return _quantity(text, _SECONDS, what="latency", example="0.2ms", positive=False)


def recommended_yaml(answer: Recommendation) -> str:
    """The block of a recipe that follows the recommendation."""
    cap = f"      bucket_cap_mb: {answer.bucket_cap_mb:g}\n"
    if answer.rank is None:
        return f"trainer:\n  strategy:\n    class_path: lightning.pytorch.strategies.DDPStrategy\n    init_args:\n{cap}"
    return (
        "trainer:\n"
        "  strategy:\n"
        "    class_path: lightning_efficient.strategies.CompressedDDPStrategy\n"
        "    init_args:\n"
        "      compressor:\n"
        "        class_path: lightning_efficient.compression.ACPSGD\n"
        "        init_args:\n"
        f"          rank: {answer.rank}\n" + cap
    )


def as_json(answer: Recommendation, probe: ProbeResult, link: LinkModel, world_size: int) -> dict[str, Any]:
    """Everything that was measured, predicted and recommended, as plain values; times in seconds."""
    return {
        "method": "plain" if answer.rank is None else "acp_sgd",
        "rank": answer.rank,
        "bucket_cap_mb": answer.bucket_cap_mb,
        "reason": answer.reason,
        "yaml": recommended_yaml(answer),
        "world_size": world_size,
        "link": {**asdict(link), "bits_per_s": link.bits_per_s if link.beta_s_per_byte else None},
        "link_measured": probe.link is not None,
        "device": asdict(probe.device),
        "forward_s": probe.workload.forward_s,
        "backward_s": probe.workload.backward_s,
        "gradient_bytes": probe.workload.gradient_bytes,
        "no_communication_s": answer.no_communication_s,
        "plain_step_measured_s": probe.plain_step_s,
        "candidates": [
            {**asdict(candidate), "exposed_s": candidate.estimate.exposed_s} for candidate in answer.candidates
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="lightning-efficient compression", description="Tools for gradient compression.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="recommend")
    recommend = commands.add_parser(
        "recommend",
        help="recommend rank and bucket size for a recipe",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="lightning-efficient compression recommend -c RECIPE [options] [recipe overrides]",
    )
    recommend.add_argument("--link", metavar="RATE", help="do not measure the link, assume this rate: 100mbit, 10gbit")
    recommend.add_argument("--latency", metavar="TIME", help="latency of that link: 0.2ms, 50us (default: 0s)")
    recommend.add_argument("--world-size", type=int, metavar="N", help="number of processes on that link")
    recommend.add_argument("--steps", type=int, default=8, metavar="N", help="steps to time (default: 8)")
    recommend.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser


def _what_if_link(options: argparse.Namespace) -> LinkModel | None:
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: at least one step is needed to measure. Give 1 or more.")
    if options.link is None:
        for name, value in (("--latency", options.latency), ("--world-size", options.world_size)):
            if value is not None:
                raise UserError(
                    f"{name} {value}: it describes a link that --link gives. Add --link, e.g. --link 1gbit."
                )
        return None
    if options.world_size is None or options.world_size < 2:
        raise UserError(
            f"--link {options.link} with --world-size {options.world_size}: a link needs two ends. Add "
            "--world-size 2 or more."
        )
    from lightning_efficient.compression.planning.cost_model import LinkModel

    return LinkModel.from_rate(parse_rate(options.link), latency_s=parse_time(options.latency or "0s"))


def _quantity(text: str, units: Mapping[str, float], *, what: str, example: str, positive: bool) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)\s*", text)
    unit = match[2].lower() if match else ""
    value = float(match[1]) if match else 0.0
    if match is None or unit not in units or (positive and value == 0):
        raise UserError(
            f"bad {what} '{text}': it must be a number{' above 0' if positive else ''} with one of the units "
            f"{', '.join(units)}. Write e.g. {example}."
        )
    return value * units[unit]


def _show(answer: Recommendation, probe: ProbeResult, link: LinkModel, world_size: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    plain = answer.candidates[0].estimate
    origin = f"measured, the fit is off by {link.residual:.0%}" if probe.link is link else "assumed"
    console.print(f"link      {_rate(link)}, latency {1e3 * link.alpha_s:.3g} ms ({origin}), {world_size} processes")
    console.print(
        f"compute   {_ms(probe.workload.backward_s)} ms backward, {_ms(probe.workload.forward_s)} ms the rest; "
        f"{probe.workload.gradient_bytes / 2**20:.3g} MiB of gradients"
    )
    if probe.plain_step_s is not None and probe.link is link:
        console.print(f"plain DDP {_ms(probe.plain_step_s)} ms measured (buckets as in torch's default)")
    table = Table("", "bucket\nMiB", "fewer\nbytes", "step\nms", "waiting\nms", "speed-up", title="predicted, one step")
    for column in table.columns[1:]:
        column.justify = "right"
    for candidate in answer.candidates:
        estimate = candidate.estimate
        table.add_row(
            estimate.method,
            f"{candidate.bucket_cap_mb:g}",
            f"{candidate.compression_rate:.1f}x",
            _ms(estimate.step_s),
            _ms(estimate.exposed_s),
            f"{plain.step_s / estimate.step_s:.2f}x",
            style="bold green" if candidate is answer.chosen else None,
        )
    console.print(table)
    choice = "plain DDP (do not compress)" if answer.rank is None else f"ACP-SGD at rank {answer.rank}"
    console.print(f"[bold]recommended: {choice}, bucket_cap_mb {answer.bucket_cap_mb:g}[/bold]\n{answer.reason}.\n")
    console.print(recommended_yaml(answer), markup=False)


def _rate(link: LinkModel) -> str:
    for unit in ("tbit", "gbit", "mbit", "kbit"):
        if link.bits_per_s >= _BITS_PER_S[unit]:
            return f"{link.bits_per_s / _BITS_PER_S[unit]:.3g} {unit[0].upper() if unit != 'kbit' else 'k'}bit/s"
    return f"{link.bits_per_s:.3g} bit/s"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"
