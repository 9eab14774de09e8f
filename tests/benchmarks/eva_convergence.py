"""How fast Eva, Eva-f and Eva-s converge beside SGD, AdamW, Muon, SOAP, Shampoo, FOOF and controls without curvature.

    python -m tests.benchmarks.eva_convergence                  # about half an hour on one core
    python -m tests.benchmarks.eva_convergence --quick          # a look; writes nothing
    python -m tests.benchmarks.eva_convergence --timing-only    # trains nothing: step times anew, pages from the cache
    python -m tests.benchmarks.eva_convergence --plot           # the loss curves of the last JSON page, as SVG

Every method gets the same number of trials on seed 0, and is judged on other seeds. Finished trainings are kept below
--cache, so a run that was stopped goes on where it was; delete the folder after a change of a method or a task. Needs
the extra `bench`, and `plots` for --plot.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from tests.benchmarks._eva_builders import Params
from tests.benchmarks._eva_methods import BASELINE, METHODS, Method
from tests.benchmarks._eva_report import markdown, plot, summarise
from tests.benchmarks._eva_runs import Cache, Run, knob_neighbours, next_trial, step_times, tune
from tests.benchmarks._eva_tasks import TASKS

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "eva_convergence_2core_cpu_202611"
CACHE = Path(tempfile.gettempdir()) / "lightning_efficient_eva_convergence"
TUNING_SEED = 0


def search(
    cache: Cache, task: str, method: Method, args: argparse.Namespace, adamw_lr: float, progress: Progress
) -> dict[str, Any] | None:
    """Tune a method; return the best settings and how they were found, None if a run is missing and none may start."""
    bar = progress.add_task(f"{task}: {method.name}", total=args.trials)

    def run(params: Params) -> Run | None:
        result = cache.get(task, method, params, TUNING_SEED, args.steps[task], train=not args.timing_only)
        progress.advance(bar)
        return result

    done = tune(task, method, args.trials, adamw_lr, run)
    progress.remove_task(bar)
    if not done:
        return None
    best, score = min(done, key=lambda each: each[1])
    return {
        "params": best,
        "tuning_loss": score,
        "trials": len(done),
        "failed_trials": sum(score == float("inf") for _, score in done),
        "open": untried_beside(method, done),
    }


def untried_beside(method: Method, done: list[tuple[Params, float]]) -> list[str]:
    """Return the settings of the best trial that have a neighbour which was not tried."""
    best, _ = min(done, key=lambda each: each[1])
    tried = [params for params, _ in done]
    names = ["lr"] if next_trial(method, done)[1] else []
    return names + [
        name
        for name, knob in method.knobs.items()
        if any({**best, name: value} not in tried for value in knob_neighbours(name, knob, best[name]))
    ]


def run_task(cache: Cache, task: str, args: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Tune, train on the seeds, and measure the step times of one task."""
    wanted = [
        m.on(task) for m in METHODS.values() if task not in m.missing and (m.name in args.methods or m.name == BASELINE)
    ]
    wanted.sort(key=lambda method: method.name != BASELINE)  # others may start from AdamW's learning rate
    searches: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[Run]] = {}
    for method in wanted:
        adamw_lr = searches[BASELINE]["params"]["lr"] if BASELINE in searches else method.lr[task]
        found = search(cache, task, method, args, adamw_lr, progress)
        if found is None:
            continue
        results = [
            cache.get(task, method, found["params"], seed, args.steps[task], train=not args.timing_only)
            for seed in args.seeds
        ]
        if complete := [run for run in results if run is not None]:
            searches[method.name], runs[method.name] = found, complete
            scores = ", ".join(f"{run.score:.4f}" for run in complete)
            progress.console.print(f"{task}: {method.name}: {found['params']} -> {scores}", highlight=False)
    bar = progress.add_task(f"{task}: step times", total=args.rounds)
    times = step_times(
        task, {name: each["params"] for name, each in searches.items()}, args.rounds, lambda: progress.advance(bar)
    )
    progress.remove_task(bar)
    return summarise(task, runs, searches, times)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few trials, steps and seeds; prints, writes nothing")
    parser.add_argument("--timing-only", action="store_true", help="measure step times and rewrite the pages")
    parser.add_argument("--plot", action="store_true", help="draw the curves of the JSON page at --out; nothing else")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument(
        "--methods", nargs="*", choices=METHODS, default=list(METHODS), help="default: all; AdamW always"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="seeds reported (default 1 2 3)")
    parser.add_argument("--trials", type=int, default=18, help="trials of each method and task (default 18)")
    parser.add_argument("--rounds", type=int, default=150, help="timed steps of each method (default 150)")
    for name, task in TASKS.items():
        parser.add_argument(f"--{name}-steps", type=int, default=task.steps, help=f"default {task.steps}")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of finished runs (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=OUT, help="path of the results without suffix")
    args = parser.parse_args()
    if args.quick:
        args.trials, args.seeds, args.rounds, args.cache = 3, [1], 12, args.cache / "quick"
    args.steps = {name: 30 if args.quick else getattr(args, f"{name}_steps") for name in TASKS}
    return args


def main() -> None:
    """Train, measure, print, and write the Markdown and JSON files."""
    args = parse()
    if args.plot:
        rows = json.loads(args.out.with_suffix(".json").read_text())
        print(*plot(rows, args.out.parent), sep="\n")
        return
    torch.set_num_threads(1)
    cache = Cache(args.cache)
    with Progress() as progress:
        rows = [row for task in args.tasks for row in run_task(cache, task, args, progress)]
    changed = [f" --{name}-steps {n}" for name, n in args.steps.items() if n != TASKS[name].steps and not args.quick]
    command = "python -m tests.benchmarks.eva_convergence" + "".join(changed)
    page = markdown(rows, args.steps, command)
    print(page)
    if not args.quick:
        args.out.with_suffix(".md").write_text(page)
        args.out.with_suffix(".json").write_text(json.dumps(rows, separators=(",", ":")).replace("},{", "},\n{") + "\n")


if __name__ == "__main__":
    main()
