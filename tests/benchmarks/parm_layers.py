"""What a mixture-of-experts layer takes over slow links: each schedule of ours, and DeepSpeed's own layer.

Four real ranks run forward and backward of one layer. All candidates of a layer run in one set of processes and take
turns, round after round, so that their ratios stand although the machine has other work. `slow_inter` is two nodes of
two ranks, with a slow link between the nodes and none inside; `homogeneous` four nodes, each with a link of its own;
`unlimited` the loopback interface.

Finished cells are kept in a file, so that a killed run goes on. Needs root and iproute2 for the links, and DeepSpeed
0.19.8 for the comparison with it (`pip install -c constraints.txt -e '.[deepspeed]'`). `--quick` checks that it works.
"""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks import _parm_report as report
from tests.benchmarks._links_report import target_table
from tests.benchmarks._parm_cells import GRID, NETWORKS, PEER, QUICK, WORLD_SIZE, Cell, cells
from tests.benchmarks._parm_deepspeed import VERSION, why_no_deepspeed
from tests.benchmarks._parm_rank import BEHIND, CellResult, Plan, measure_cell
from tests.benchmarks.machine import describe_machine
from tests.netlab import Lab
from tests.netlab.lab import INTERFACE
from tests.support.ranks import run_ranks

OUT = Path(__file__).parents[2] / "docs" / "benchmarks"
NAME = "parm_layers_2core_cpu_202611"
WORK = Path("build") / "parm_layers"


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not measured yet, write the page and the raw figures, and return 0."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.seconds, options.min_rounds, options.max_rounds = 0.5, 3, 5
    wanted = cells(QUICK if options.quick else GRID, options.cells)
    if not wanted:
        raise SystemExit(f"No cell has a name that matches {options.cells!r}: see --list.")
    if options.list:
        print(*(cell.name for cell in wanted), sep="\n")
        return 0
    load = os.getloadavg()[0]
    reason = why_no_deepspeed()
    if reason:
        print(f"without {PEER}: {reason}", file=sys.stderr)
    plan = Plan(options.seconds, options.min_rounds, options.max_rounds, peer=reason is None, timeout_s=options.timeout)
    file = options.work / ("quick.jsonl" if options.quick else "cells.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        file.unlink(missing_ok=True)
    done = _done(file)
    for number, cell in enumerate(wanted, start=1):
        known = cell.name in done
        if not known:
            done[cell.name] = _measured(cell, plan)
            with file.open("a") as lines:
                lines.write(json.dumps(asdict(done[cell.name])) + "\n")
        line = report.progress_line(report.Row(cell, done[cell.name]))
        print(f"[{number}/{len(wanted)}] {line}{' (from before)' if known else ''}", flush=True)
    rows = [report.Row(cell, done[cell.name]) for cell in wanted]
    found = report.targets(rows)
    words = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "tests.benchmarks.parm_layers", *words])
    text = _page(rows, command, options, load=load)
    raw = {
        "command": command,
        "machine": describe_machine(),
        "load": load,
        "cells": [asdict(row.result) for row in rows],
        "targets": [asdict(target) | {"verdict": target.verdict} for target in found],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{NAME}.md").write_text(text, encoding="utf-8")
    (options.out / f"{NAME}.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    print(text)
    return 0


def _measured(cell: Cell, plan: Plan) -> CellResult:
    network = NETWORKS[cell.network]
    with contextlib.ExitStack() as stack:
        places = env = None
        if network.hosts:
            lab = stack.enter_context(Lab(network.hosts, rate=network.rate))
            # Two ranks of a host reach each other without its link: that is the fast inside of a node.
            places = [lab.namespaces[rank * network.hosts // WORLD_SIZE] for rank in range(WORLD_SIZE)]
            env = {"GLOO_SOCKET_IFNAME": INTERFACE}
        results: list[CellResult] = run_ranks(
            measure_cell, WORLD_SIZE, cell, plan, timeout=plan.timeout_s, netns=places, env=env
        )
    return results[0]


def _done(file: Path) -> dict[str, CellResult]:
    """Cells of an earlier run; the line that a killed run left unfinished is removed."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    file.write_text("".join(whole))
    return {result.cell: result for result in (CellResult(**json.loads(line)) for line in whole)}


def _page(rows: list[report.Row], command: str, options: argparse.Namespace, *, load: float) -> str:
    slower = ", and ".join(
        f"after round {number} {behind:g} times as long as the fastest" for number, behind in BEHIND.items()
    )
    apart = max(value for row in rows for value in row.result.differences.values())
    parts = [
        "# Mixture-of-experts layers over slow links",
        f"Measured {datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()} on {describe_machine()}; "
        f"load {load:.1f} before.",
        f"```\n{command}\n```",
        f"Milliseconds of forward and backward of one layer on {WORLD_SIZE} ranks: per round the slowest rank, the "
        f"median over rounds. There are {options.min_rounds} rounds and more, for {options.seconds:g} s; a candidate "
        f"leaves that takes {slower}, but DeepSpeed, its order and what `auto` chose stay. "
        "Float32, 8 experts with two linear maps and gelu, H = 2 M; S tokens on each rank. All candidates of a layer "
        "run in one set of processes, in turn, one thread for each rank, so ratios count, not times: the ranks share "
        "the cores. A number behind a slash is the best number of chunks.",
        "`paper` is the baseline of the Parm paper and `deepspeed` the order of DeepSpeed since 0.7.1, both in our "
        f"code. `{PEER}` is its own layer, version {VERSION}, with Megatron's tensor-parallel experts; it has no "
        "groups where ESP is neither 1 nor MP. `auto` is what the planner chooses from measured links.",
        f"Outputs that must agree, with the drops there are, differ by {apart:.1g} of the largest output at most.",
        "`slow_inter` is two nodes of two ranks, whose nodes have a link of that rate each; `homogeneous` four nodes "
        "of one rank; `unlimited` the loopback interface.",
    ]
    parts += [
        "## Summary",
        "Geometric means and ranges over all layers of a network.",
        report.summary_table(rows),
    ]
    for network in dict.fromkeys(row.cell.network for row in rows):
        parts += [f"## {network}", report.network_table([row for row in rows if row.cell.network == network])]
    parts += ["## Targets", target_table(report.targets(rows))]
    return "\n\n".join(parts) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.parm_layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few small layers and rounds, to see that it works")
    add("--cells", default="", metavar="REGEX", help="only cells whose names hold a match, such as '2,2,2 S1024'")
    add("--list", action="store_true", help="print the names of the cells, and measure nothing")
    add("--fresh", action="store_true", help="forget the cells of earlier runs")
    add("--seconds", type=float, default=4.0, help="of rounds for each cell, once the slow have left (%(default)s)")
    add("--min-rounds", type=int, default=5, help="for each cell (%(default)s)")
    add("--max-rounds", type=int, default=40, help="for each cell (%(default)s)")
    add("--timeout", type=float, default=600.0, help="seconds for a cell; then its ranks are killed (%(default)s)")
    add("--work", type=Path, default=WORK, help="folder for finished cells (%(default)s)")
    add("--out", type=Path, default=OUT, help="folder for the .md and .json (docs/benchmarks)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
