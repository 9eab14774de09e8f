"""`bench -c SWEEP.yaml`: runs the cells that are missing, one after the other, then writes the report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_efficient.cli.bench.cases import Case, Machine, expand, fingerprint, needs_cuda, select, why_not
from lightning_efficient.cli.bench.outputs import write_outputs
from lightning_efficient.cli.bench.runner import run_case
from lightning_efficient.cli.bench.store import Store, read_results
from lightning_efficient.cli.bench.summary import lead, rate
from lightning_efficient.cli.bench.sweep import FORMATS, Sweep, read_sweep
from lightning_efficient.cli.errors import CommandParser, UserError
from lightning_efficient.cli.files import require_folder
from lightning_efficient.dissect.report.numbers import quantity
from lightning_efficient.dissect.result import CaseResult

RESULTS = "results.jsonl"
_DESCRIPTION = """\
Measures every cell of a sweep's matrix: models, techniques, lengths, batches, processes. Each cell runs in a process of
its own, so a cell that runs out of memory, hangs or crashes ends alone. Results are kept as they come: killed and
started again, a sweep runs only what is missing. In the end it writes tables and a page to read.
"""
_EXAMPLES = """\
examples:
  lightning-efficient bench -c bench/quick                               two CPU cores, some minutes
  lightning-efficient bench -c bench/quick --list                        what would run, and what would not, and why
  lightning-efficient bench -c bench/paper --only model=7b --only technique=none,F,R,F+R,L,LFA
  lightning-efficient bench -c bench/quick --retry failed                those that failed once more
"""
_RETRIED = {"failed": ("failed", "timeout"), "oom": ("oom",)}
_STYLES = {"ok": "green", "skipped": "dim", "oom": "yellow", "timeout": "yellow"}


def main(argv: Sequence[str]) -> int:
    """Run `bench` with the words after it.

    Args:
        argv: e.g. `["-c", "bench/quick", "--list"]`.

    Returns:
        The exit code: 0, or 1 where a case failed or ran out of time.

    Raises:
        UserError: An option or the sweep file is wrong, or with `--strict` a case needs a GPU that is not there.
    """
    options = _parser().parse_args(list(argv))
    sweep = read_sweep(options.config)
    everything = expand(sweep)
    cases, machine = select(everything, options.only), Machine.here(sweep)
    if options.strict:
        _require_gpus(cases, sweep, machine)
    if options.list:
        _list(cases, sweep, machine)
        return 0
    out = Path(options.out or sweep.report.out)
    require_folder(out, "--out")
    with Store(out / RESULTS, fingerprint(sweep, everything), fresh=options.fresh) as store:
        try:
            _run(cases, sweep, machine, store, out, retry=options.retry)
        finally:
            # Also after Ctrl-C: what is there can be read, and goes on with the same command.
            results = [store.results[each.case_id] for each in everything if each.case_id in store.results]
            written = write_outputs(results, out, sweep.report.formats, title=_title(options.config))
    _conclude(results, written)
    here = {case.case_id for case in cases}
    return int(any(each.status in ("failed", "timeout") for each in results if each.case_id in here))


def report_main(argv: Sequence[str]) -> int:
    """Run `bench report` with the words after it.

    Args:
        argv: e.g. `["bench_out/results.jsonl"]`.

    Returns:
        The exit code: 0.

    Raises:
        UserError: There is no such file, or it holds no results.
    """
    parser = CommandParser(
        prog="lightning-efficient bench report",
        description="Writes the tables and the page of a sweep's results again; runs nothing.",
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl", help="what a sweep has written")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default: that of the results)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all of them")
    options = parser.parse_args(list(argv))
    results = read_results(options.results)
    if not results:
        raise UserError(f"{options.results} holds no case yet: the sweep has only begun. Wait for its first case.")
    title = options.results.resolve().parent.name
    _conclude(results, write_outputs(results, options.out or options.results.parent, options.formats, title=title))
    return 0


def _run(cases: Sequence[Case], sweep: Sweep, machine: Machine, store: Store, out: Path, *, retry: str | None) -> None:
    console = Console(soft_wrap=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=escape(case.case_id))
            before = store.results.get(case.case_id)
            if not _is_done(before, retry):
                result = _result(case, sweep, machine, store, out, progress)
                if result != before:
                    store.append(result)
                progress.console.print(_line(result))
            progress.advance(task)


def _result(case: Case, sweep: Sweep, machine: Machine, store: Store, out: Path, progress: Progress) -> CaseResult:
    if reason := why_not(case, sweep, machine) or _beyond(case, store.results):
        return CaseResult(case.case_id, dict(case.axes), "skipped", reason)
    folder = (out / "cases" / case.folder).resolve()
    return run_case(case, sweep, folder, tick=progress.refresh if progress.live.is_started else lambda: None)


def _is_done(result: CaseResult | None, retry: str | None) -> bool:
    """Whether a case need not run; a skipped one is looked at again, since what it lacked may be there by now."""
    if result is None or result.status == "skipped":
        return False
    return retry != "all" and result.status not in _RETRIED.get(retry or "", ())


def _beyond(case: Case, results: Mapping[str, CaseResult]) -> str:
    """Why a batch is not tried: a smaller one has ended the search."""
    if "micro_batch" not in case.axes:
        return ""
    stops = ("oom", "timeout", "failed") if case.auto else ("oom",)
    for smaller in results.values():
        same = {**smaller.axes, "micro_batch": 0} == {**case.axes, "micro_batch": 0}
        if same and smaller.status in stops and int(smaller.axes["micro_batch"]) < int(case.axes["micro_batch"]):
            how = {"oom": "ran out of memory", "timeout": "ran out of time", "failed": "failed"}[smaller.status]
            return f"micro_batch {smaller.axes['micro_batch']} {how}: larger ones are not tried."
    return ""


def _require_gpus(cases: Sequence[Case], sweep: Sweep, machine: Machine) -> None:
    lacking = [case.case_id for case in cases if needs_cuda(case, sweep) and not machine.gpus]
    if lacking:
        raise UserError(
            f"--strict: {len(lacking)} of {len(cases)} cases need CUDA, such as {lacking[0]}, and there is no GPU "
            "here. Run on a machine with one, or without --strict to have them skipped."
        )


def _list(cases: Sequence[Case], sweep: Sweep, machine: Machine) -> None:
    console = Console(soft_wrap=True, highlight=False)
    reasons = [why_not(case, sweep, machine) for case in cases]
    width = max(len(case.case_id) for case in cases)
    for case, reason in zip(cases, reasons, strict=True):
        console.print(f"{case.case_id:<{width}}  {f'skip: {reason}' if reason else 'run'}", markup=False)
    skipped = sum(map(bool, reasons))
    console.print(f"{len(cases)} cases: {len(cases) - skipped} to run, {skipped} to skip.")


def _line(result: CaseResult) -> str:
    style = _STYLES.get(result.status, "red")
    measured = rate(result)
    text = quantity(measured[0], measured[1]) if measured else result.reason
    return f"[{style}]{result.status:<8}[/{style}] {escape(result.case_id)}  {result.wall_s:.0f} s  {escape(text)}"


def _conclude(results: Sequence[CaseResult], written: Sequence[Path]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print()
    for sentence in lead(results):
        console.print(sentence, markup=False)
    console.print(f"\nWrote {', '.join(str(path) for path in written)}", markup=False)


def _title(config: str) -> str:
    return Path(config).with_suffix("").as_posix()


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="lightning-efficient bench",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config", required=True, metavar="SWEEP", help="a sweep file, or the name of one: bench/quick")
    add("--list", action="store_true", help="list the cases, and why some would be skipped; run nothing")
    add("--only", action="append", default=[], metavar="AXIS=VALUE", help="only these cases, e.g. technique=none,F")
    add("--out", metavar="DIR", help="folder of the results (default: the sweep's report.out)")
    resume = parser.add_mutually_exclusive_group()
    resume.add_argument("--resume", action="store_true", help="run only what is missing in the folder (the default)")
    resume.add_argument(
        "--fresh", action="store_true", help="begin anew; the results there become results.old.jsonl (.old2, ...)"
    )
    add(
        "--retry",
        choices=["failed", "oom", "all"],
        help="also run again what failed or ran out of time, what ran out "
        "of memory (its limit was raised, or others have left), or everything",
    )
    add("--strict", action="store_true", help="a case that needs a GPU where there is none is an error, no skip")
    return parser
