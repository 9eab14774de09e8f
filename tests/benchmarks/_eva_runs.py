"""Trainings of the convergence benchmark: one run, the search for settings, the cache of what is done, step times."""

import copy
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from tests.benchmarks._eva_builders import Params
from tests.benchmarks._eva_methods import METHODS, Knob, Method
from tests.benchmarks._eva_tasks import TASKS, batches

LR_PER_DECADE = 6  # values of the finest ladder of learning rates
LR_STRIDE = 2  # the search moves by a factor of 2.2, and by half as much where nothing else is left to try
WINDOW = 20  # steps that a reported loss is the mean of
EXTRA_TRIALS = 8  # at most, for a method whose best learning rate is the last one tried


@dataclass(frozen=True)
class Run:
    """One training. `score` is the mean training loss of the last `WINDOW` steps, infinite after a failure."""

    task: str
    method: str
    params: Params
    seed: int
    steps: int
    score: float
    val_loss: float = math.inf
    accuracy: float | None = None
    failure: str = ""
    losses: list[float] = field(default_factory=list)

    @property
    def key(self) -> str:
        return key_of(self.task, self.method, self.params, self.seed, self.steps)


def key_of(task: str, method: str, params: Params, seed: int, steps: int) -> str:
    return json.dumps([task, method, sorted(params.items()), seed, steps])


class Cache:
    """Finished runs in a file of one JSON object per line, so that an interrupted benchmark goes on."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "runs.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.runs = {run.key: run for run in (Run(**json.loads(line)) for line in lines if line.endswith("}"))}

    def get(
        self, task: str, method: Method, params: Params, seed: int, steps: int, *, train: bool = True
    ) -> Run | None:
        """Return the run, after doing it if it is not done and ``train``."""
        key = key_of(task, method.name, params, seed, steps)
        if key not in self.runs and train:
            self.runs[key] = train_once(task, method, params, seed, steps)
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(self.runs[key])) + "\n")
        return self.runs.get(key)


def set_lr(optimizers: list[Optimizer], base: list[list[float]], share: float) -> None:
    for optimizer, lrs in zip(optimizers, base, strict=True):
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * share


def train_once(task_name: str, method: Method, params: Params, seed: int, steps: int) -> Run:
    """Train with a learning rate that falls linearly to 0."""
    task = TASKS[task_name]
    train, validation = batches(task_name, seed, steps)
    net = task.make_model(seed)
    losses: list[float] = []
    failure = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizers = method.build(net, params)
        base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        try:
            for step, batch in enumerate(train):
                set_lr(optimizers, base, 1 - step / steps)
                loss = task.loss(net, batch)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                losses.append(loss.item())
                if not losses[-1] < 100 * losses[0]:
                    failure = "diverged"
                    break
        except torch.linalg.LinAlgError:
            failure = "eigh failed"
    score = statistics.fmean(losses[-WINDOW:])
    if not failure and not score < losses[0]:
        failure = "diverged"
    rounded = [float(f"{each:.5g}") for each in losses]
    if failure:
        return Run(task_name, method.name, params, seed, steps, math.inf, failure=failure, losses=rounded)
    net.eval()
    with torch.no_grad():
        val_loss = task.loss(net, validation).item()
    accuracy = task.accuracy(net, validation) if task.accuracy else None
    return Run(task_name, method.name, params, seed, steps, score, val_loss, accuracy, losses=rounded)


# ---- the search ----------------------------------------------------------------------------------------------------


def ladder(value: float, per_decade: int, move: int = 0) -> float:
    """Return the value ``move`` rungs up from the one nearest to ``value``: 1, 3, 10, or 1, 1.5, 2.2, 3.2 in sixths."""
    rung = round(math.log10(value) * per_decade) + move
    return float(f"{10 ** (rung / per_decade):.{1 if per_decade == 2 else 2}g}")


def first_grid(task: str, method: Method, adamw_lr: float) -> list[Params]:
    """Three learning rates a factor of 4.6 apart, times the first values of the knobs."""
    lrs = [ladder(method.lr[task], LR_PER_DECADE, move * LR_STRIDE) for move in (-2, 0, 2)]
    starts = [knob.start or (ladder(adamw_lr, LR_PER_DECADE),) for knob in method.knobs.values()]
    return [
        {"lr": lr, **dict(zip(method.knobs, values, strict=True))}
        for values in itertools.product(*starts)
        for lr in lrs
    ]


def next_trial(method: Method, done: list[tuple[Params, float]]) -> tuple[Params | None, bool]:
    """Return what to try next to the best trial, and whether the best learning rate is the last one tried."""
    best, score = min(done, key=lambda each: each[1])
    if score == math.inf:
        return {**best, "lr": ladder(min(p["lr"] for p, _ in done), LR_PER_DECADE, -2 * LR_STRIDE)}, True
    tried = [p for p, _ in done]
    beside = {p["lr"] for p in tried if {**p, "lr": 0} == {**best, "lr": 0}}
    for sign in (1, -1):
        within = [ladder(best["lr"], LR_PER_DECADE, sign * move) for move in range(1, LR_STRIDE + 1)]
        if not beside & set(within):
            return {**best, "lr": within[-1]}, not any(sign * (lr - best["lr"]) > 0 for lr in beside)
    moved = [(name, value) for name, knob in method.knobs.items() for value in knob_neighbours(name, knob, best[name])]
    trials = [{**best, name: value} for name, value in moved]
    trials += [{**best, "lr": ladder(best["lr"], LR_PER_DECADE, move)} for move in (1, -1)]
    for move in (LR_STRIDE, -LR_STRIDE):
        trials += [{**best, name: value, "lr": ladder(best["lr"], LR_PER_DECADE, move)} for name, value in moved]
    return next((trial for trial in trials if trial not in tried), None), False


def knob_neighbours(name: str, knob: Knob, value: float) -> list[float]:
    """Return the next larger and the next smaller value, where there is one."""
    if knob.choices:
        at = knob.choices.index(value)
        return [*knob.choices[at + 1 : at + 2], *knob.choices[max(0, at - 1) : at]]
    stride = LR_STRIDE if name.endswith("_lr") else 1
    return [ladder(value, knob.per_decade, sign * stride) for sign in (1, -1)]


def tune(
    task: str, method: Method, trials: int, adamw_lr: float, run: Callable[[Params], Run | None]
) -> list[tuple[Params, float]]:
    """Search for settings with ``trials`` trainings, more only where the best learning rate is at the edge."""
    done: list[tuple[Params, float]] = []
    todo = first_grid(task, method, adamw_lr)[:trials]
    while todo:
        params = todo.pop(0)
        result = run(params)
        if result is None:
            return done
        done.append((params, result.score))
        if not todo:
            trial, at_edge = next_trial(method, done)
            if trial is not None and (len(done) < trials or (at_edge and len(done) < trials + EXTRA_TRIALS)):
                todo.append(trial)
    return done


# ---- step times ----------------------------------------------------------------------------------------------------


def step_times(task_name: str, params_of: dict[str, Params], rounds: int, tick: Callable[[], None]) -> dict[str, float]:
    """Return seconds of CPU time of a whole step of each method, all taking turns, step by step, in this process.

    A method whose steps differ with a period gets the mean, over the phases of the period, of the medians.
    """
    task = TASKS[task_name]
    train, _ = batches(task_name, 0, 1)
    start_net = task.make_model(0)
    nets: dict[str, nn.Module] = {name: copy.deepcopy(start_net) for name in params_of}
    optimizers = {name: METHODS[name].build(nets[name], params) for name, params in params_of.items()}
    for each in itertools.chain.from_iterable(optimizers.values()):
        for group in each.param_groups:
            group["lr"] *= 1e-3  # hundreds of steps on one batch shall not diverge, whatever the method
    times: dict[str, list[float]] = {name: [] for name in params_of}
    for round_ in range(rounds):
        for name in list(params_of) if round_ % 2 else list(reversed(params_of)):
            begin = time.process_time()
            loss = task.loss(nets[name], train[0])
            for optimizer in optimizers[name]:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers[name]:
                optimizer.step()
            times[name].append(time.process_time() - begin)
        tick()
    seconds = {}
    for name, params in params_of.items():
        period = METHODS[name].period
        period = int(params[period]) if isinstance(period, str) else period
        warm = times[name][min(period, rounds // 2) :]
        seconds[name] = statistics.fmean(
            statistics.median(warm[phase::period]) for phase in range(min(period, len(warm)))
        )
    return seconds
