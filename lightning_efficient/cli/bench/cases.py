"""A sweep as a list of cases: each with a name, the words of its command line, and why it cannot run, if it cannot."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from lightning_efficient.cli.bench.sweep import AUTO, DEFAULT_KEYS, OVERLAY_AXES, Sweep, Value, shipped_or_local
from lightning_efficient.cli.bench.techniques import (
    CONTROL,
    NONE,
    TECHNIQUES,
    combination_name,
    parse_combination,
    why_not_together,
)
from lightning_efficient.cli.errors import UserError
from lightning_efficient.cli.recipes import find_recipe

_PREFIX = {"model": "", "technique": "", "seq": "seq", "micro_batch": "mb", "world": "world"}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a sweep finds to run on.

    Attributes:
        gpus: CUDA devices; 0 where the sweep asks for the CPU.
        packages: those of :data:`TECHNIQUES` that are installed.
    """

    gpus: int
    packages: frozenset[str]

    @classmethod
    def here(cls, sweep: Sweep) -> Machine:
        """Look at this machine."""
        import torch

        accelerators = [_accelerator_of(find_recipe(sweep.recipe)), *_accelerator_words(sweep.overrides)]
        on_cpu = accelerators[-1].rsplit("=", 1)[-1] == "cpu"
        wanted = {package for each in TECHNIQUES.values() for package, _ in each.extras}
        return cls(
            gpus=0 if on_cpu or not torch.cuda.is_available() else torch.cuda.device_count(),
            packages=frozenset(name for name in wanted if importlib.util.find_spec(name) is not None),
        )


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of a sweep.

    Attributes:
        case_id: unique in the sweep.
        axes: its point in the matrix.
        recipes: files that overlay each other.
        words: what follows them on the command line.
        ladder: the case without its batch size: of one ladder, the batches above the first that does not fit are left.
        auto: whether the sweep looks for the largest batch.
    """

    case_id: str
    axes: Mapping[str, str | int]
    recipes: tuple[Path, ...]
    words: tuple[str, ...]
    ladder: str
    auto: bool

    @property
    def folder(self) -> str:
        """Name of the folder of its log and report."""
        return "".join(letter if letter.isalnum() or letter in "+-=._" else "_" for letter in self.case_id)


def expand(sweep: Sweep) -> list[Case]:
    """Return every cell of a sweep's matrix, batches in rising order.

    Args:
        sweep: the sweep.

    Raises:
        UserError: an unknown technique, two that exclude each other, a recipe that is not there, or two cells of one
            name.
    """
    base = find_recipe(sweep.recipe)
    auto = sweep.matrix.get("micro_batch") == (AUTO,)
    axes = {
        axis: _doublings(sweep.limits.max_micro_batch)
        if axis == "micro_batch" and auto
        else sorted(values, key=int)
        if axis == "micro_batch"
        else values
        for axis, values in _in_order(sweep.matrix)
    }
    cases = [
        _case(sweep, base, dict(zip(axes, point, strict=True)), auto=auto)
        for point in itertools.product(*axes.values())
    ]
    cases += _controls(cases) if sweep.control else []
    for names in ([case.case_id for case in cases], [case.folder for case in cases]):
        if len(set(names)) < len(names):
            name = Counter(names).most_common(1)[0][0]
            raise UserError(f"two cells are named {name}: their results would mix. Name each value once.")
    return cases


def why_not(case: Case, sweep: Sweep, machine: Machine) -> str:
    """Return the sentence that says why a case cannot run on a machine; empty if it can."""
    world, techniques = int(case.axes["world"]), _techniques(case)
    if reason := why_not_together(techniques):
        return reason
    for name in techniques:
        if name in sweep.rules.needs_cuda and not machine.gpus:
            return f"{name} needs CUDA, and there is no GPU here."
    for name in techniques:
        if name in sweep.rules.needs_world_2 and world < 2:
            return f"{name} needs 2 processes or more; world is {world}."
    if machine.gpus and world > machine.gpus:
        return f"world {world} needs {world} GPUs, and there are {machine.gpus} here."
    for name in techniques:
        for package, extra in TECHNIQUES[name].extras if name in TECHNIQUES else ():
            if package not in machine.packages:
                return f"{name} needs {package}: pip install 'lightning-efficient[{extra}]'."
    return ""


def needs_cuda(case: Case, sweep: Sweep) -> bool:
    """Whether a technique of the case runs on GPUs only."""
    return any(name in sweep.rules.needs_cuda for name in _techniques(case))


def fingerprint(sweep: Sweep, cases: Sequence[Case]) -> str:
    """Return a hash of what the cases run: command lines, the texts of their recipes, the window, and threads."""
    files = {path: path.read_text(encoding="utf-8") for case in cases for path in case.recipes}
    what = [
        [[case.case_id, [files[path] for path in case.recipes], case.words] for case in cases],
        [getattr(sweep.window, name) for name in ("warmup", "clean", "dissect", "memory")],
        sweep.limits.threads,
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def select(cases: Sequence[Case], only: Sequence[str]) -> list[Case]:
    """Return the cases that fit all filters such as ``technique=F+R``; several values are joined by commas.

    Raises:
        UserError: a filter is no ``axis=value``, or nothing fits it.
    """
    for each in only:
        axis, equals, values = each.partition("=")
        known = list(cases[0].axes) if cases else []
        if not equals or (cases and axis not in known):
            raise UserError(f"--only {each}: it is an axis and values, of {', '.join(known)}. Write technique=F+R.")
        fitting = [case for case in cases if str(case.axes.get(axis)) in values.split(",")]
        if not fitting:
            there = dict.fromkeys(str(case.axes.get(axis)) for case in cases)
            raise UserError(f"--only {each}: no case has that. The values of {axis} are {', '.join(there)}.")
        cases = fitting
    return list(cases)


def _case(sweep: Sweep, base: Path, point: dict[str, Value], *, auto: bool) -> Case:
    techniques = parse_combination(str(point["technique"]), sweep.rules)
    point["technique"] = combination_name(techniques)
    recipes = [base]
    if "model" in point:
        recipes.append(shipped_or_local("bench/models", str(point["model"])))
    recipes += [find_recipe(TECHNIQUES[name].overlay) for name in techniques]
    words = [
        word
        for axis, value in point.items()
        if axis not in OVERLAY_AXES
        for word in (f"--{sweep.keys[axis]}", _word(value))
    ]
    return Case(
        case_id="/".join(_part(axis, value) for axis, value in point.items()),
        axes={axis: value if isinstance(value, (str, int)) else str(value) for axis, value in point.items()},
        recipes=tuple(recipes),
        words=(*sweep.overrides, *words),
        ladder="/".join(_part(axis, value) for axis, value in point.items() if axis != "micro_batch"),
        auto=auto,
    )


def _controls(cases: Sequence[Case]) -> list[Case]:
    """The base once more, after all others, wherever something is compared with it."""
    compared = {_without_technique(case) for case in cases if case.axes["technique"] != NONE}
    bases = [case for case in cases if case.axes["technique"] == NONE and not case.auto]
    return [
        replace(case, case_id=f"{case.case_id}/again", axes={**case.axes, CONTROL: 2}, ladder=f"{case.ladder}/again")
        for case in bases
        if _without_technique(case) in compared
    ]


def _without_technique(case: Case) -> tuple[tuple[str, str | int], ...]:
    return tuple((axis, value) for axis, value in case.axes.items() if axis != "technique")


def _in_order(matrix: Mapping[str, tuple[Value, ...]]) -> Iterator[tuple[str, tuple[Value, ...]]]:
    """The axes as they stand in the names of cases: ours, then the user's own."""
    ours = ["model", "technique", *DEFAULT_KEYS]
    yield from ((axis, matrix[axis]) for axis in ours if axis in matrix)
    yield from ((axis, values) for axis, values in matrix.items() if axis not in ours)


def _doublings(most: int) -> tuple[Value, ...]:
    return tuple(2**power for power in range(most.bit_length()))


def _techniques(case: Case) -> list[str]:
    return str(case.axes["technique"]).split("+")


def _part(axis: str, value: Value) -> str:
    return f"{_PREFIX[axis]}{value}" if axis in _PREFIX else f"{axis}={value}"


def _word(value: Value) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _accelerator_of(recipe: Path) -> str:
    """What a recipe says of trainer.accelerator; ``auto`` where it says nothing."""
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    trainer = data.get("trainer") if isinstance(data, Mapping) else None
    return str(trainer.get("accelerator") or "auto") if isinstance(trainer, Mapping) else "auto"


def _accelerator_words(overrides: Sequence[str]) -> list[str]:
    """The values that the overrides give to trainer.accelerator, written with a space or an equals sign."""
    joined = [word for word in overrides if word.startswith("--trainer.accelerator=")]
    apart = [after for word, after in itertools.pairwise(overrides) if word == "--trainer.accelerator"]
    return joined + apart
