"""`lightning-efficient bench comm`: what collectives cost on the link between some processes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from lightning_efficient.cli.errors import CommandParser, UserError
from lightning_efficient.cli.files import require_file, require_folder
from lightning_efficient.cli.ranks import run_on_ranks, settle_backend, settle_ranks
from lightning_efficient.dissect.collectives import OPS, SIZES, CommReport, sweep
from lightning_efficient.dissect.report.html import Section, markdown, page
from lightning_efficient.dissect.report.svg import line_chart
from lightning_efficient.dissect.report.tables import Column, Table
from lightning_efficient.dissect.result import write_json

_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_DESCRIPTION = """\
Times collectives over sizes, fits latency and bandwidth to them, and prints both. Starts its processes itself, or joins
those that torchrun started, on one machine or several.
"""
_EXAMPLES = """\
examples:
  lightning-efficient bench comm --world-size 4
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
    -m lightning_efficient bench comm
"""


def main(argv: Sequence[str]) -> int:
    """Run `bench comm` with the words after it.

    Args:
        argv: e.g. `["--world-size", "4"]`.

    Returns:
        The exit code: 0, or 1 when a process failed.

    Raises:
        UserError: An option is wrong.
    """
    options = _parser().parse_args(list(argv))
    _check(options)
    return run_on_ranks(_run, options, options.world_size)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Bytes of `1KiB..64MiB` (by factors of 4), or of `1KiB,1MiB`.

    Raises:
        UserError: If a size cannot be read, or the range is empty.
    """
    if ".." in text:
        low, _, high = text.partition("..")
        size, last = parse_size(low), parse_size(high)
        sizes = []
        while size <= last:
            sizes.append(size)
            size *= 4
        if not sizes:
            raise UserError(f"bad sizes '{text}': the first is larger than the last. Write e.g. 1KiB..64MiB.")
        return tuple(sizes)
    return tuple(parse_size(each) for each in text.split(","))


def parse_size(text: str) -> int:
    """Bytes of `64MiB`, `1kb`, `4096`.

    Raises:
        UserError: If it is not a whole number of bytes above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = (match[2].lower() or "b") if match else ""
    size = float(match[1]) * _UNITS.get(unit, 0) if match else 0.0
    if size < 1:
        raise UserError(
            f"bad size '{text}': it must be a number above 0 with one of B, KiB, MiB, GiB. Write e.g. 1MiB."
        )
    return int(size)


def report_tables(report: CommReport) -> list[Table]:
    """The times, and the lines through them."""
    times = Table(
        ["collective", "size (KiB)", Column("time", "s", digits=4), Column("algbw", "B/s"), Column("busbw", "B/s")],
        [[each.op, each.n_bytes / 1024, each.seconds, each.algbw, each.busbw] for each in report.points],
        caption="Times, slowest rank",
    )
    lines = Table(
        ["collective", Column("latency", "s"), Column("rate", "bit/s"), "misfit (%)"],
        [
            [op, line.alpha_s, 8 / line.beta_s_per_byte if line.beta_s_per_byte else None, _percent(line.residual)]
            for op, line in report.fits.items()
        ],
        caption="Time = latency + size / rate",
    )
    missing = Table(
        ["collective", "why"], [[op, why] for op, why in report.unsupported.items()], caption="Not measured"
    )
    return [times, *([lines] if report.fits else []), *([missing] if report.unsupported else [])]


def _percent(share: float) -> float:
    """In steps of 0.01: a line through two points has a misfit of rounding errors alone."""
    return round(100 * share, 2)


def report_section(report: CommReport) -> Section:
    """The tables, and for each collective its times over the sizes with the fitted line."""
    ops = dict.fromkeys(each.op for each in report.points)
    return Section("Collectives", charts=[_chart(report, op) for op in ops], tables=report_tables(report))


def _chart(report: CommReport, op: str) -> str:
    own = [each for each in report.points if each.op == op]
    series = {"measured": [(float(each.n_bytes), each.seconds) for each in own]}
    if op in report.fits:
        series["fitted"] = [(float(each.n_bytes), report.fits[op].predict(each.n_bytes)) for each in own]
    return line_chart(series, title=op, x_label="size", y_label="time", log_x=True, log_y=True, x_unit="B", y_unit="s")


def _run(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    if options.backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    dist.init_process_group(
        options.backend,
        init_method=rendezvous,
        rank=rank,
        world_size=options.world_size,
        timeout=timedelta(seconds=options.timeout),
    )
    try:
        # One rank alone writes to the terminal.
        with Console(stderr=True, quiet=rank != 0).status("connecting") as status:
            report = sweep(
                ops=options.ops,
                sizes=options.sizes,
                repeats=options.repeats,
                budget_s=options.budget,
                timeout_s=options.timeout,
                progress=lambda op, size: status.update(f"{op}, {size} bytes"),
            )
        if rank == 0:
            _show(report, options)
    finally:
        dist.destroy_process_group()


def _show(report: CommReport, options: argparse.Namespace) -> None:
    lead = f"{report.backend} over {report.world_size} processes; time of the slowest."
    sys.stdout.write(lead + "\n\n" + "\n\n".join(table.text() for table in report_tables(report)) + "\n")
    if options.json:
        write_json(report, options.json)
    if options.out:
        section = report_section(report)
        write_json(report, options.out / "comm.json")
        (options.out / "comm.md").write_text(markdown("Collectives", [lead], [section]), encoding="utf-8")
        (options.out / "comm.html").write_text(page("Collectives", [lead], [section]), encoding="utf-8")
        sys.stdout.write(f"\nWrote {options.out / 'comm.html'}, comm.md and comm.json.\n")


def _check(options: argparse.Namespace) -> None:
    options.sizes = parse_sizes(options.sizes) if options.sizes else SIZES
    options.budget, options.timeout = _seconds("budget", options.budget), _seconds("timeout", options.timeout)
    options.world_size = settle_ranks("--world-size", options.world_size)
    for name, value, least in (("world-size", options.world_size, 2), ("repeats", options.repeats, 1)):
        if value < least:
            raise UserError(f"--{name} {value}: {least} or more are needed to measure a link. Give {least} or more.")
    if options.out:
        require_folder(options.out, "--out")
    if options.json:
        require_file(options.json, "--json")
    options.backend = settle_backend(options.backend, options.world_size)


def _seconds(name: str, text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*s?\s*", text)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--{name} {text}: it is a time in seconds. Give a number above 0, such as 30 or 30s.")
    return float(match[1])


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="lightning-efficient bench comm",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="processes to start here (default: 2)")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=f"default: {' '.join(OPS)}")
    parser.add_argument(
        "--sizes", metavar="SIZES", help="1KiB..64MiB by factors of 4, or 1KiB,1MiB (default: to 16MiB)"
    )
    parser.add_argument("--backend", choices=("auto", "gloo", "nccl"), default="auto", help="default: nccl if it can")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs per size (default: 5)")
    parser.add_argument("--budget", default="30s", metavar="TIME", help="seconds for everything (default: 30s)")
    parser.add_argument("--timeout", default="60s", metavar="TIME", help="seconds for one run (default: 60s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a page with the plot, and the tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    return parser
