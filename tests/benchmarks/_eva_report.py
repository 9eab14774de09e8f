"""Tables, JSON and plots of the convergence benchmark."""

import datetime
import math
import statistics
from pathlib import Path
from typing import Any

from tests.benchmarks._eva_methods import BASELINE, METHODS
from tests.benchmarks._eva_runs import WINDOW, Run
from tests.benchmarks._eva_tasks import TASKS
from tests.benchmarks.machine import describe_machine

CURVE_POINTS = 60

INTRO = f"""# How fast Eva converges

Every method is tuned on seed 0 with the same number of trials and then trained on fresh seeds with the best settings
found; the table has those seeds only. The search first tries three learning rates, 4.6 times apart, and for a clip two
values; then the neighbours of the best trial so far: learning rates 2.2 times apart, the other settings, mostly 3 times
apart, learning rates 1.5 times apart, and last both at once. It ends early where no neighbour is left, and goes on only
while the best learning rate is the largest or smallest tried beside its other settings; *trials* says how many there
were. A setting marked * has a neighbour that was not tried. All learning rates fall linearly to 0, weight decay is 0,
float32 on one thread.

- *loss*: mean training loss of the last {WINDOW} steps, mean and standard deviation over seeds.
- *steps to AdamW's loss*: the first step whose mean training loss over the last {WINDOW} is no more than AdamW's final
  loss of the same seed, by seed; `-`: never. *steps ratio*: their sum over AdamW's own, which may get there a little
  before its last step, because the mean over {WINDOW} steps is noisy.
- *step time*: CPU time of a whole training step over AdamW's; all methods take turns in one process. *time ratio* is
  the steps ratio times the step time.
- A *control* is a method without its curvature term: what it reaches is not due to curvature.
"""


def steps_to(losses: list[float], target: float) -> int | None:
    """Return the first step at which the running mean is at most ``target``."""
    total = sum(losses[:WINDOW])
    for end in range(WINDOW, len(losses) + 1):
        if end > WINDOW:
            total += losses[end - 1] - losses[end - 1 - WINDOW]
        if total / WINDOW <= target * (1 + 1e-6):
            return end
    return None


def summarise(
    task: str, runs: dict[str, list[Run]], searches: dict[str, dict[str, Any]], times: dict[str, float]
) -> list[dict[str, Any]]:
    """Return a row for each method of a task, best loss first, as plain data."""
    targets = {run.seed: statistics.fmean(run.losses[-WINDOW:]) for run in runs.get(BASELINE, []) if not run.failure}
    own = {run.seed: steps_to(run.losses, targets[run.seed]) for run in runs.get(BASELINE, []) if not run.failure}
    rows = []
    for name, of_method in runs.items():
        finite = [run for run in of_method if not run.failure]
        reached = [
            steps_to(run.losses, targets[run.seed]) if run.seed in targets and not run.failure else None
            for run in of_method
        ]
        pairs = [(steps, own[run.seed]) for steps, run in zip(reached, of_method, strict=True) if steps is not None]
        complete = len(pairs) == len(of_method)
        ratio = sum(steps for steps, _ in pairs) / sum(steps for _, steps in pairs) if complete else None
        relative = times[name] / times[BASELINE] if {name, BASELINE} <= times.keys() else None
        rows.append(
            {
                "task": task,
                "method": name,
                **searches[name],
                "seeds": [run.seed for run in of_method],
                "loss": _mean(run.score for run in finite),
                "loss_std": _spread([run.score for run in finite]),
                "val_loss": _mean(run.val_loss for run in finite),
                "accuracy": _mean(run.accuracy for run in finite if run.accuracy is not None),
                "failures": [run.failure for run in of_method if run.failure],
                "steps_to_adamw": reached,
                "steps_ratio": ratio,
                "step_ms": 1e3 * times[name] if name in times else None,
                "step_ratio": relative,
                "time_ratio": ratio * relative if ratio and relative else None,
                "curve": mean_curve([run.losses for run in finite]),
            }
        )
    return sorted(rows, key=lambda row: (len(row["failures"]), row["loss"] if row["loss"] is not None else math.inf))


def mean_curve(all_losses: list[list[float]]) -> list[list[float]]:
    """Return at most `CURVE_POINTS` of (step, loss), each the mean over seeds and the steps since the point before."""
    if not all_losses:
        return []
    steps = min(map(len, all_losses))
    ends = sorted({max(1, round(steps * (i + 1) / CURVE_POINTS)) for i in range(CURVE_POINTS)})
    points = []
    for begin, end in zip([0, *ends], ends, strict=False):
        points.append([end, float(f"{statistics.fmean(x for each in all_losses for x in each[begin:end]):.4g}")])
    return points


def _mean(values: Any) -> float | None:
    values = list(values)
    return float(f"{statistics.fmean(values):.5g}") if values else None


def _spread(values: list[float]) -> float | None:
    return float(f"{statistics.stdev(values):.3g}") if len(values) > 1 else None


def markdown(rows: list[dict[str, Any]], steps: dict[str, int], command: str) -> str:
    """Return the page."""
    today = datetime.date.today().isoformat()
    lines = [INTRO, f"Command: `{command}`", "", f"Machine: {describe_machine()}. Date: {today}", ""]
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        with_accuracy = any(row["accuracy"] is not None for row in of_task)
        lines += [f"## {task}", "", f"{TASKS[task].about[0].upper()}{TASKS[task].about[1:]}; {steps[task]} steps.", ""]
        head = ["method", "best settings", "trials", "loss", "validation loss"]
        head += ["validation accuracy, %"] if with_accuracy else []
        head += ["steps to AdamW's loss", "steps ratio", "step time", "time ratio"]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(_cells(row, with_accuracy))} |" for row in of_task]
        absent = [f"{method.name}: {method.missing[task]}." for method in METHODS.values() if task in method.missing]
        present = {row["method"] for row in of_task}
        absent += [
            f"{m.name}: not chosen or not finished."
            for m in METHODS.values()
            if m.name not in present and task not in m.missing
        ]
        lines += ["", *(["Not run: " + " ".join(absent), ""] if absent else [])]
    lines += ["## Methods", ""]
    lines += [f"- **{name}**: {METHODS[name].about}." for name in dict.fromkeys(row["method"] for row in rows)]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], with_accuracy: bool) -> list[str]:
    settings = ", ".join(
        f"{name} {value:g}{'*' if name in row['open'] else ''}" for name, value in row["params"].items()
    )
    loss = _number(row["loss"], ".4f") + (f" ± {row['loss_std']:.4f}" if row["loss_std"] is not None else "")
    if row["failures"]:
        failed = f"{len(row['failures'])} of {len(row['seeds'])} seeds: {', '.join(sorted(set(row['failures'])))}"
        loss = failed if row["loss"] is None else f"{failed}; others {loss}"
    trials = f"{row['trials']}" + (f" ({row['failed_trials']} failed)" if row["failed_trials"] else "")
    cells = [row["method"], settings, trials, loss, _number(row["val_loss"], ".4f")]
    cells += [_number(row["accuracy"], ".1f")] if with_accuracy else []
    cells += [", ".join("-" if each is None else str(each) for each in row["steps_to_adamw"])]
    return cells + [_number(row[name], ".2f") for name in ("steps_ratio", "step_ratio", "time_ratio")]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(rows: list[dict[str, Any]], folder: Path, methods: list[str] | None = None) -> list[Path]:
    """Draw the loss curves of each task as SVG, without anything that differs from one drawing to the next."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    paths = []
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "eva", "path.simplify": True, "font.size": 9}):
        for task in dict.fromkeys(row["task"] for row in rows):
            figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
            for i, row in enumerate(r for r in rows if r["task"] == task and r["curve"]):
                if methods is not None and row["method"] not in methods:
                    continue
                dashed = row["method"].startswith("control")
                style = "--" if dashed else "-" if i < 20 else ":"  # there are twenty colours
                width = 2.0 if row["method"].startswith(("Eva-f", "EvaP")) else 1.1
                color = plt.get_cmap("tab20")(i % 20)
                axes.plot(*zip(*row["curve"], strict=True), style, lw=width, color=color, label=row["method"])
            axes.set(xlabel="step", ylabel="training loss, mean over seeds", yscale="log", title=task)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
            path = folder / f"eva_convergence_{task}.svg"
            figure.savefig(path, metadata={"Date": None, "Creator": None})
            plt.close(figure)
            paths.append(path)
    return paths
