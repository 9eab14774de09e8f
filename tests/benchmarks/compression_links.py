"""What compressed gradients gain over slow links, measured: ACP-SGD and its family against plain DDP and torch's hook.

Real ranks train a small transformer on hosts that netlab gives links of a set rate. All methods run in one set of
processes and take turns, round after round, so that their ratios stand although the machine has other work. Torch's
own `powerSGD_hook` runs with one bucket: over gloo it aborts or hangs with more.

Needs root and iproute2 for the links. `python -m tests.benchmarks.compression_links --quick` checks that it works.
"""

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import lightning_efficient
from tests.benchmarks import _links_report as report
from tests.benchmarks._links_methods import LOCAL, PLAIN, TORCH, Method
from tests.benchmarks._links_rank import Plan, RankReport, measure_links, peak_memory
from tests.benchmarks.machine import describe_machine
from tests.netlab import Lab
from tests.support.ranks import run_ranks

METHODS = (
    LOCAL, PLAIN, f"{PLAIN}@4", "half", f"{TORCH}:4", f"{TORCH}:32", "power_sgd:4", "power_sgd:32",
    "acp_sgd:4", "acp_sgd:8", "acp_sgd:32", "acp_sgd:32@1000", "top_k", "sign_sgd",
)  # fmt: skip
RATES = ("20mbit", "50mbit", "100mbit", "500mbit", "none")
QUICK_METHODS = (LOCAL, PLAIN, f"{TORCH}:4", "acp_sgd:4")
SECTIONS = ("links", "cpu", "memory")
CPU_WORLD, MEMORY_WORLD = 2, 2
MEMORY_WIDTH, MEMORY_LAYERS = 2048, 10  # 160 MiB of gradients


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the tables and the raw figures, and return 0."""
    options = _parser().parse_args(arguments)
    if options.quick:
        _make_quick(options)
    for method in options.methods:
        Method.parse(method)
    load = [os.getloadavg()[0]]
    links = cpu = None
    memory: dict[str, float] = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    ) as bar:  # fmt: skip
        if "links" in options.sections:
            links = _links(options, bar)
        if "cpu" in options.sections:
            cpu = _cpu(options, bar)
        if "memory" in options.sections:
            memory = _memory(options, bar)
    load.append(os.getloadavg()[0])
    found = report.targets(links, cpu, memory)
    facts = _facts(options, arguments, load)
    text = _page(options, facts, links, cpu, memory, found)
    raw = {
        "facts": facts,
        "links": links and links.as_json(),
        "cpu": cpu and cpu.as_json(),
        "memory_in_gradient_sizes": memory,
        "targets": [asdict(t) | {"verdict": t.verdict} for t in found],
    }
    _write(options.out, facts, text, raw)
    return 0


def _links(options: argparse.Namespace, bar: Progress) -> report.Figures:
    rates = tuple(None if rate == "none" else rate for rate in options.rates)
    with Lab(options.hosts) as lab:

        def run(plan: Plan) -> list[RankReport]:
            return lab.run_ranks(measure_links, plan, lab.links, timeout=options.timeout)

        return _measured(options, bar, "links", rates, options.repeats, run)


def _cpu(options: argparse.Namespace, bar: Progress) -> report.Figures:
    def run(plan: Plan) -> list[RankReport]:
        return run_ranks(measure_links, CPU_WORLD, plan, None, timeout=options.timeout)

    # CPU time is noisy where ranks share cores: two ranks, and more rounds.
    return _measured(options, bar, "CPU time", (None,), 2 * options.repeats, run)


def _measured(
    options: argparse.Namespace,
    bar: Progress,
    name: str,
    rates: tuple[str | None, ...],
    repeats: int,
    run: Callable[[Plan], list[RankReport]],
) -> report.Figures:
    with tempfile.NamedTemporaryFile() as progress:
        plan = Plan(
            methods=tuple(options.methods), rates=rates, repeats=repeats, round_seconds=options.round_seconds,
            batch=options.batch, tokens=options.tokens, layers=options.layers, progress=progress.name,
        )  # fmt: skip
        with _followed(bar, name, Path(progress.name), plan.ticks):
            return report.figures(run(plan))


@contextmanager
def _followed(bar: Progress, name: str, file: Path, ticks: int) -> Iterator[None]:
    """Move a bar as the ranks' progress file grows."""
    task = bar.add_task(name, total=ticks)
    done = threading.Event()

    def follow() -> None:
        while not done.wait(0.2):
            bar.update(task, completed=file.stat().st_size)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
        bar.update(task, completed=ticks)
    finally:
        done.set()
        thread.join()


def _memory(options: argparse.Namespace, bar: Progress) -> dict[str, float]:
    """Peak memory above plain DDP's, in gradient sizes: fresh processes for each method, the median of three tries."""
    # Memory hardly depends on the rank, so one rank is enough.
    methods = [m for m in options.methods if m != LOCAL and "@" not in m and Method.parse(m).rank in (0, 4)]
    tries = 1 if options.quick else 3
    peaks: dict[str, list[float]] = {method: [] for method in methods}
    gradients = 1.0
    task = bar.add_task("memory", total=tries * len(methods))
    for _ in range(tries):
        for method in methods:
            ranks = run_ranks(
                peak_memory, MEMORY_WORLD, method, options.memory_width, MEMORY_LAYERS, timeout=options.timeout
            )
            peaks[method].append(max(peak for peak, _ in ranks))
            gradients = ranks[0][1]
            bar.advance(task)
    plain = statistics.median(peaks[PLAIN])
    return {method: (statistics.median(values) - plain) / gradients for method, values in peaks.items()}


def _facts(options: argparse.Namespace, arguments: list[str] | None, load: list[float]) -> dict[str, Any]:
    words = sys.argv[1:] if arguments is None else arguments
    return {
        "command": shlex.join(["python", "-m", "tests.benchmarks.compression_links", *words]),
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "machine": describe_machine(),
        "load": f"{load[0]:.1f} before, {load[1]:.1f} after",
        "versions": f"lightning-efficient {lightning_efficient.__version__}",
        "hosts": options.hosts,
        "batch": f"{options.batch} x {options.tokens} tokens for each rank",
    }


def _page(
    options: argparse.Namespace,
    facts: dict[str, Any],
    links: report.Figures | None,
    cpu: report.Figures | None,
    memory: dict[str, float],
    found: list[report.Target],
) -> str:
    parts = [
        "# Compressed gradients over slow links",
        f"Measured {facts['date']} on {facts['machine']} (load {facts['load']}); {facts['versions']}.",
        f"```\n{facts['command']}\n```",
        "Ratios are between methods in the same round of one run, the median over rounds; absolute times are of this "
        "machine, whose ranks share its cores. A name is `method[:rank][@bucket_cap_mb]`; compressed methods use "
        f"4 MiB buckets unless said, `{PLAIN}` its own default, and torch's `powerSGD_hook` (`{TORCH}`) one bucket, "
        "because over gloo it aborts or hangs with more.",
    ]
    if links is not None:
        model = f"{facts['hosts']} hosts, a transformer of {links.parameters / 1e6:.2f} M parameters, float32, SGD"
        parts += [f"## Speed-up over plain DDP\n\n{model}, {facts['batch']}.", report.link_table(links)]
        for rate in dict.fromkeys(rate for rate, _ in links.seconds):
            parts += [f"### {report.link(rate).capitalize()}", report.detail_table(links, rate)]
    if cpu is not None:
        parts += [f"## CPU time\n\n{CPU_WORLD} ranks on the loopback interface, no limit.", report.cpu_table(cpu)]
    if memory:
        size = options.memory_width**2 * MEMORY_LAYERS * 4 / 2**20
        what = f"{MEMORY_WORLD} ranks, {size:.0f} MiB of gradients, peak resident memory in processes of their own."
        parts += [f"## Memory above plain DDP\n\n{what}", report.memory_table(memory)]
    parts += ["## Targets", report.target_table(found)]
    return "\n\n".join(parts) + "\n"


def _write(out: Path, facts: dict[str, Any], text: str, raw: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    month = facts["date"][:7].replace("-", "")
    stem = out / f"compression_links_{len(os.sched_getaffinity(0))}core_cpu_{month}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n")
    print(text)
    print(f"written: {stem}.md and .json")


def _make_quick(options: argparse.Namespace) -> None:
    """Check that everything runs: few methods, a smaller model, one round. The figures mean little."""
    options.methods, options.rates = QUICK_METHODS, ("200mbit",)
    options.hosts, options.repeats, options.round_seconds = 2, 1, 0.1
    options.batch, options.tokens, options.layers, options.memory_width = 4, 8, 1, 512


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.compression_links",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="see that it works, in under a minute; fixes the settings below")
    add("--out", type=Path, default=Path("docs/benchmarks"), help="folder for the .md and .json (%(default)s)")
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure (all)")
    add("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help="method[:rank][@bucket_cap_mb]")
    add("--rates", nargs="+", default=list(RATES), metavar="RATE", help="links, such as 50mbit, or none (%(default)s)")
    add("--hosts", type=int, default=4, help="(%(default)s)")
    add("--repeats", type=int, default=5, help="rounds through all methods on each link (%(default)s)")
    add("--round-seconds", type=float, default=2.0, help="of one method in a round, 1 to 20 steps (%(default)s)")
    add("--batch", type=int, default=16, help="sequences for each rank (%(default)s)")
    add("--tokens", type=int, default=16, help="per sequence (%(default)s)")
    add("--layers", type=int, default=4, help="of the transformer; 4 make 5.26 M parameters (%(default)s)")
    add("--memory-width", type=int, default=MEMORY_WIDTH, help=f"of {MEMORY_LAYERS} square layers (%(default)s)")
    add("--timeout", type=float, default=3600.0, help="seconds for a section; then its ranks are killed (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
