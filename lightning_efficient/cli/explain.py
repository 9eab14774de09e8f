"""Turns jsonargparse's error trees into one sentence with the nearest valid name.

jsonargparse reports every branch of a type that did not match, several lines each. Only one of them is about what the
user wrote; `explain` finds it. A message of an unknown form is kept, less its noise, so nothing is ever hidden.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable

from jsonargparse import ArgumentParser

from lightning_efficient.cli.errors import did_you_mean

_NOISE = re.compile(
    r"^(- )?(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class '(NoneType|str)'>"
    r"|Expected a path but|Not a valid subclass of|Subclass types expect one of|a class path \(str\)|a dict with"
    r"|Parser key \"[^\"]*\":$|$)"
)
_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS_OF_VALUE = re.compile(r"Given value: Namespace\(class_path='([\w.]+)'")


def explain(message: str, options: Iterable[str], *, command: str = "") -> str:
    """Return one readable error for a message of jsonargparse.

    Args:
        message: The text jsonargparse would print.
        options: Every dotted option of the command (`trainer.max_steps`), for suggestions.
        command: The subcommand's name, for the text.

    Returns:
        What is wrong, and the nearest valid name where there is one.
    """
    options = list(options)
    if found := re.match(r"unrecognized arguments: (.*)", message):
        flags = [word.split("=")[0] for word in found[1].split() if word.startswith("-")]
        return " ".join(_unknown_flag(flag, options, command) for flag in flags) or f"Unexpected words: {found[1]}."
    if found := re.match(r"Subcommand '(\w+)' does not accept option '([^']+)'", message):
        return f"'{found[2]}' is not a setting of '{found[1]}'.{did_you_mean(found[2], options)}"
    if "arguments are required" in message and "model" in message:
        return (
            "No model is given. Pass a recipe with -c RECIPE ('lightning-efficient recipes list' shows them), "
            "or a class with --model."
        )
    return _explain_tree(message)


def explain_construction(message: str) -> str:
    """Return the part of an error that a constructor raised, without the type branches jsonargparse wraps it in."""
    owners = _CLASS_OF_VALUE.findall(message)
    said = _without_noise(message)
    return f"{owners[0].rsplit('.', 1)[-1]}: {said}" if owners else said


def _unknown_flag(flag: str, options: list[str], command: str) -> str:
    hint = did_you_mean(flag.lstrip("-"), options, prefix="--")
    return f"'{flag}' is not an option{f' of {command!r}' if command else ''}.{hint}"


def _explain_tree(message: str) -> str:
    lines = message.splitlines()
    for pattern, say in _LEAVES:
        hits = [(number, found) for number, line in enumerate(lines) if (found := pattern.search(line))]
        if hits:
            # The deepest branch is the one that got furthest into what the user wrote.
            number, found = max(hits, key=lambda hit: _depth(lines[hit[0]]))
            return say(found, _keys_above(lines, number), message)
    keys = _KEY.findall(message)
    said = _without_noise(message)
    return f"{_where(keys)}{said}" if keys and said else said or message


def _keys_above(lines: list[str], number: int) -> list[str]:
    """The keys that lead to a line: those of the lines above it that are indented less and less."""
    keys, depth = _KEY.findall(lines[number]), _depth(lines[number])
    for line in reversed(lines[:number]):
        if line.strip() and _depth(line) < depth:
            depth = _depth(line)
            keys = _KEY.findall(line) + keys
    return keys


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip(" -"))


def _where(keys: list[str]) -> str:
    return ".init_args.".join(keys) + ": " if keys else ""


def _without_noise(message: str) -> str:
    lines = (line.strip() for line in message.splitlines())
    return " ".join(line.removeprefix("- ") for line in lines if not _NOISE.match(line))


def _say_option(found: re.Match[str], keys: list[str], message: str) -> str:
    option = found["option"]
    before = message[: message.index(found[0])]
    # The innermost class named before the option is the one that refused it; an optimizer given as a callable is
    # named after it instead, in the value.
    owners = re.findall(r"given class_path '([\w.]+)'", before)
    if "callable class" in before.splitlines()[-1]:
        owners += re.findall(r"Got value: Namespace\(class_path='([\w.]+)'", message)
    if not owners:
        return f"{_where(keys)}'{option}' is not accepted."
    owner = owners[-1].rsplit(".", 1)[-1]
    if option.split(".")[0] in ("init_arg", "init_argss", "args", "initargs", "int_args", "init-args"):
        return f"{_where(keys)}'{option.split('.')[0]}' is not a key of a class. Did you mean 'init_args'?"
    return f"{_where(keys)}{owner} has no argument '{option}'.{did_you_mean(option, parameters_of(owners[-1]))}"


def _say_attribute(found: re.Match[str], keys: list[str], message: str) -> str:
    module, name = found["module"], found["name"]
    hint = did_you_mean(name, _public_names(module), prefix=f"{module}.")
    return f"{_where(keys)}there is no '{name}' in '{module}'.{hint}"


def _say_module(found: re.Match[str], keys: list[str], message: str) -> str:
    parent, _, name = found["name"].rpartition(".")
    candidates = _public_names(parent) if parent else [info.name for info in pkgutil.iter_modules()]
    hint = did_you_mean(name, candidates, prefix=f"{parent}." if parent else "")
    return f"{_where(keys)}there is no module '{found['name']}'.{hint}"


def _say_short_name(found: re.Match[str], keys: list[str], message: str) -> str:
    names = [cls.__name__ for base in _base_classes(message) for cls in _subclasses(base)]
    kind = "/".join(sorted({base.__name__ for base in _base_classes(message)}))
    return (
        f"{_where(keys)}there is no {kind or 'class'} called '{found['name']}'."
        f"{did_you_mean(found['name'], names) or ' Write its full import path, e.g. my_package.MyClass.'}"
    )


def _say_wrong_base(found: re.Match[str], keys: list[str], message: str) -> str:
    # jsonargparse cuts the path out where it is the value itself.
    path = (found["path"] or "").strip() or _value(message)
    return f"{_where(keys)}{path} is not a {found['base']}."


def _say_literal(found: re.Match[str], keys: list[str], message: str) -> str:
    choices = list(dict.fromkeys(re.findall(r"'([^']+)'", " ".join(re.findall(r"Literal\[[^\]]*\]", message)))))
    value = _value(message)
    return f"{_where(keys)}'{value}' is not one of {', '.join(choices)}.{did_you_mean(value, choices)}"


def _say_type(found: re.Match[str], keys: list[str], message: str) -> str:
    value = _short(_value(message))
    wanted = re.findall(r"Expected an? <class '([\w.]+)'>", _branch(message, found[0]))
    kinds = " or ".join(dict.fromkeys("null" if kind == "NoneType" else kind.rsplit(".", 1)[-1] for kind in wanted))
    return f"{_where(keys)}expected {kinds}, got '{value}'."


def _say_missing_file(found: re.Match[str], keys: list[str], message: str) -> str:
    return f"There is no file '{found['path']}'."


def _say_yaml(found: re.Match[str], keys: list[str], message: str) -> str:
    return "The recipe is not valid YAML: " + " ".join(message[message.index(found[0]) + len(found[0]) :].split()) + "."


def _branch(message: str, text: str) -> str:
    """The lines around `text` with its indentation: the alternatives of one union, not those of the union around it."""
    lines = message.splitlines()
    at = max((number for number, line in enumerate(lines) if text in line), key=lambda number: _depth(lines[number]))
    return "\n".join(line for line in lines if _depth(line) == _depth(lines[at]))


_Say = Callable[[re.Match[str], list[str], str], str]

# Most telling first: a branch about an argument or a name beats one about a type.
_LEAVES: list[tuple[re.Pattern[str], _Say]] = [
    (re.compile(r"Option '(?P<option>[^']+)' is not accepted"), _say_option),
    (re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'"), _say_attribute),
    (re.compile(r"No module named '(?P<name>[\w.]+)'"), _say_module),
    (re.compile(r"Expected a dot import path string: (?P<name>\S+)"), _say_short_name),
    (re.compile(r"Import path (?P<path>\S+ )?does not correspond to a subclass of (?P<base>\w+)"), _say_wrong_base),
    (re.compile(r"File does not exist: '(?P<path>[^']+)'"), _say_missing_file),
    (re.compile(r"Problems parsing config:"), _say_yaml),
    (re.compile(r"Expected a typing\.Literal"), _say_literal),
    (re.compile(r"Expected an? <class '(?!NoneType)"), _say_type),
]


def _value(message: str) -> str:
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    # For a callable, jsonargparse appends the whole value to that of the argument.
    return given[1].split(". Got value: ")[0].strip() if given else ""


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def parameters_of(class_path: str) -> list[str]:
    """Return the constructor's parameter names of a class, as jsonargparse resolves them through `**kwargs`.

    Args:
        class_path: Dotted import path.

    Returns:
        Names without `self`; empty where the class cannot be imported.
    """
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
        return [str(key) for key in ArgumentParser().add_class_arguments(cls, fail_untyped=False, sub_configs=True)]
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def _public_names(module: str) -> list[str]:
    try:
        loaded = importlib.import_module(module)
    except ImportError:
        return []
    inside = [info.name for info in pkgutil.iter_modules(getattr(loaded, "__path__", []))]
    return [name for name in [*dir(loaded), *inside] if not name.startswith("_")]


def _base_classes(message: str) -> list[type]:
    paths = re.findall(r"Subtypes: \[(.*)\]", message)
    bases = []
    for path in re.findall(r"[a-z_]\w*(?:\.\w+)+", " ".join(paths)):
        module, _, name = path.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
        if isinstance(found, type) and found not in bases:
            bases.append(found)
    return bases


def _subclasses(base: type) -> list[type]:
    direct: list[type] = base.__subclasses__()
    return direct + [deeper for child in direct for deeper in _subclasses(child)]
