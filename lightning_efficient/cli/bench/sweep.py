"""The sweep file: what it may say, and what is said about it when it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lightning_efficient.cli.bench.techniques import NONE, TECHNIQUES, Rules
from lightning_efficient.cli.errors import UserError, did_you_mean
from lightning_efficient.cli.recipes import find_recipe
from lightning_efficient.dissect.result import Window

AUTO = "auto"
FORMATS = ("md", "csv", "json", "html")
OVERLAY_AXES = ("model", "technique")
DEFAULT_KEYS = {"seq": "data.block_size", "micro_batch": "data.batch_size", "world": "trainer.devices"}
Value = str | int | float | bool
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a case ends.

    Attributes:
        timeout_s: seconds for one case, start of its process included.
        memory_gib: memory that each process of a case may take on the host; None for all there is.
        max_micro_batch: where ``micro_batch: auto`` stops doubling.
        threads: of each process on the host; None for what torch and Lightning choose.
    """

    timeout_s: float = 600.0
    memory_gib: float | None = None
    max_micro_batch: int = 256
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go.

    Attributes:
        out: folder.
        formats: of the report; the results themselves are always kept as JSON lines.
    """

    out: str = "bench_out"
    formats: tuple[str, ...] = FORMATS


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep file.

    Attributes:
        recipe: the base that every case starts from.
        matrix: axis to its values; ``technique`` and ``world`` are always there.
        keys: where an axis goes in the recipe.
        rules: which techniques exclude each other, and what they need.
        window: steps of each case.
        limits: where a case ends.
        report: where results go.
        overrides: words for every case's command line.
        control: whether the base is measured again at the end, which shows how much the machine itself has changed.
    """

    recipe: str
    matrix: Mapping[str, tuple[Value, ...]]
    keys: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_KEYS))
    rules: Rules = field(default_factory=Rules)
    window: Window = field(default_factory=Window)
    limits: Limits = Limits()
    report: Output = Output()
    overrides: tuple[str, ...] = ()
    control: bool = True


def read_sweep(name: str) -> Sweep:
    """Read a sweep file.

    Args:
        name: a path, or the name of a shipped one such as ``bench/quick``.

    Raises:
        UserError: there is no such file, or it holds something that a sweep does not.
    """
    path = find_recipe(name)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML ({' '.join(str(error).split())}). Correct it there.") from error
    try:
        return parse_sweep(data)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from error


def parse_sweep(data: Any) -> Sweep:
    """Return the sweep that plain values describe.

    Raises:
        UserError: unknown keys, or values of the wrong kind or out of range.
    """
    if not isinstance(data, Mapping) or not {"recipe", "matrix"} <= set(data):
        raise UserError("a sweep has at least the keys 'recipe' and 'matrix'. See 'recipes show bench/quick' for one.")
    _known(data, [each.name for each in fields(Sweep)], "a sweep")
    keys = {**DEFAULT_KEYS, **_mapping(data, "keys")}
    for axis, key in keys.items():
        if not isinstance(key, str) or not key:
            raise UserError(f"keys.{axis} is {key!r}: it names the place in the recipe. Write e.g. data.batch_size.")
    sweep = Sweep(
        recipe=_text(data["recipe"], "recipe"),
        matrix=_matrix(data["matrix"], keys),
        keys=keys,
        rules=_rules(_mapping(data, "rules")),
        window=_window(_mapping(data, "window")),
        limits=_limits(_mapping(data, "limits")),
        report=_output(_mapping(data, "report")),
        overrides=tuple(_text(word, "overrides") for word in _sequence(data.get("overrides") or [], "overrides")),
        control=_checked(data.get("control", True), "control", bool, "true or false"),
    )
    find_recipe(sweep.recipe)
    return sweep


def _matrix(data: Any, keys: Mapping[str, str]) -> dict[str, tuple[Value, ...]]:
    if not isinstance(data, Mapping):
        raise UserError("matrix is no mapping: it holds axes and their values. Write e.g. technique: [none, F].")
    matrix: dict[str, tuple[Value, ...]] = {}
    for axis, given in data.items():
        if axis not in OVERLAY_AXES and axis not in keys:
            raise UserError(
                f"matrix.{axis} is an unknown axis.{did_you_mean(str(axis), [*OVERLAY_AXES, *keys])} Known are "
                f"{', '.join([*OVERLAY_AXES, *keys])}; give another one its place in the recipe, as 'keys: "
                f"{{{axis}: model.init_args.{axis}}}'."
            )
        values = (AUTO,) if axis == "micro_batch" and given == AUTO else tuple(_sequence(given, f"matrix.{axis}"))
        matrix[str(axis)] = _axis_values(str(axis), values)
    matrix.setdefault("technique", (NONE,))
    matrix.setdefault("world", (1,))
    return matrix


def _axis_values(axis: str, values: tuple[Any, ...]) -> tuple[Value, ...]:
    for value in values:
        if axis in OVERLAY_AXES:
            _text(value, f"matrix.{axis}")
        elif axis in DEFAULT_KEYS and value != AUTO:
            _whole(value, f"matrix.{axis}", least=1)
        elif not isinstance(value, (str, int, float, bool)):
            raise UserError(f"matrix.{axis} holds {value!r}: a value is a word or a number. Write e.g. [1, 2].")
        if value == AUTO and axis in DEFAULT_KEYS and (axis != "micro_batch" or len(values) > 1):
            raise UserError(f"matrix.{axis} holds 'auto': only micro_batch can, and then alone: 'micro_batch: auto'.")
    twice = [value for at, value in enumerate(values) if value in values[:at]]
    if not values or twice:
        what = f"holds {twice[0]!r} twice" if twice else "has no value"
        raise UserError(f"matrix.{axis} {what}: every case is measured once. Write each value once.")
    return values


def _rules(data: Mapping[str, Any]) -> Rules:
    _known(data, [each.name for each in fields(Rules)], "rules")
    default = Rules()

    def letters(names: Any, where: str) -> tuple[str, ...]:
        for name in _sequence(names, where):
            if name not in TECHNIQUES and (name != NONE or where == "rules.exclusive"):
                raise UserError(
                    f"{where} holds '{name}': there is no such technique.{did_you_mean(str(name), TECHNIQUES)} Known "
                    f"are {', '.join(TECHNIQUES)}."
                )
        return tuple(names)

    groups = _sequence(data["exclusive"], "rules.exclusive") if "exclusive" in data else None
    return Rules(
        exclusive=default.exclusive if groups is None else tuple(letters(each, "rules.exclusive") for each in groups),
        needs_cuda=letters(data.get("needs_cuda", list(default.needs_cuda)), "rules.needs_cuda"),
        needs_world_2=letters(data.get("needs_world_2", list(default.needs_world_2)), "rules.needs_world_2"),
    )


def _window(data: Mapping[str, Any]) -> Window:
    least = {"warmup": 0, "clean": 1, "dissect": 0, "memory": 0}
    _known(data, list(least), "window")
    window = Window(**{name: _whole(value, f"window.{name}", least=least[name]) for name, value in data.items()})
    if window.memory > 1:
        raise UserError(f"window.memory is {window.memory}: bytes are counted in one step. Write 1, or 0 not to count.")
    return window


def _limits(data: Mapping[str, Any]) -> Limits:
    _known(data, [each.name for each in fields(Limits)], "limits")
    limits = Limits(**data)
    for name in ("timeout_s", "memory_gib"):
        value = getattr(limits, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        if not is_number and not (name == "memory_gib" and value is None):
            raise UserError(f"limits.{name} is {value!r}: a limit is a number above 0. Write e.g. {name}: 120.")
    _whole(limits.max_micro_batch, "limits.max_micro_batch", least=1)
    if limits.threads is not None:
        _whole(limits.threads, "limits.threads", least=1)
    return limits


def _output(data: Mapping[str, Any]) -> Output:
    _known(data, [each.name for each in fields(Output)], "report")
    formats = tuple(_sequence(data.get("formats", list(FORMATS)), "report.formats"))
    for each in formats:
        if each not in FORMATS:
            raise UserError(f"report.formats holds {each!r}: known are {', '.join(FORMATS)}. Write some of them.")
    return Output(_text(data.get("out", Output().out), "report.out"), formats)


def _known(data: Mapping[Any, Any], names: Sequence[str], where: str) -> None:
    for key in data:
        if key not in names:
            raise UserError(f"{where} has no key '{key}'.{did_you_mean(str(key), names)} Known are {', '.join(names)}.")


def _mapping(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    return _checked(data.get(key) or {}, key, dict, "a mapping of names to values")


def _sequence(value: Any, where: str) -> list[Any]:
    return _checked(value, where, list, "a list, such as [a, b]")


def _text(value: Any, where: str) -> str:
    return _checked(value, where, str, "a word; quote a number: '7'", lambda text: bool(text))


def _whole(value: Any, where: str, *, least: int) -> int:
    # bool is a kind of int
    return _checked(value, where, int, f"a whole number, {least} or more", lambda n: n is not True and n >= least)


def _checked(
    value: Any, where: str, kind: type[ValueT], what: str, valid: Callable[[Any], bool] | None = None
) -> ValueT:
    if not isinstance(value, kind) or (valid is not None and not valid(value)):
        raise UserError(f"{where} is {value!r}: it has to be {what}. Correct it in the sweep file.")
    return value


def shipped_or_local(folder: str, name: str) -> Path:
    """Return the recipe ``folder/name`` where there is one, else the recipe ``name``.

    Raises:
        UserError: neither is there; the message has the places searched.
    """
    try:
        return find_recipe(f"{folder}/{name}")
    except UserError:
        return find_recipe(name)
