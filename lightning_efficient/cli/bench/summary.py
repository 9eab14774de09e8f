"""What the results of a sweep say: sentences and tables, as pure functions of the results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_efficient.cli.bench.techniques import CONTROL, NONE, TECHNIQUES
from lightning_efficient.dissect.report.dissection import main_breakdown
from lightning_efficient.dissect.report.numbers import quantity
from lightning_efficient.dissect.report.tables import Cell, Column, Table
from lightning_efficient.dissect.result import PHASES, CaseResult, DissectReport

LEAST_DIFFERENCE = 0.02
"""Share by which two speeds have to differ at least, whatever their scatter, for one to be called faster."""
_SETTINGS_IN_LEAD = 2
_WITHIN = ("technique", "micro_batch", CONTROL)
_NOT_QUIET = 0.1  # above it, the machine's own change is worth a sentence
_NAMES = {"model": "", "seq": "seq ", "world": "world ", "micro_batch": "batch "}


@dataclass(frozen=True, slots=True)
class Setting:
    """The results that differ only in technique, batch and run: those to compare.

    Attributes:
        axes: what they have in common.
        name: the same as words.
        results: all of them.
    """

    axes: Mapping[str, str | int]
    name: str
    results: tuple[CaseResult, ...]

    @property
    def best(self) -> dict[str, CaseResult]:
        """The fastest batch of each technique that ran."""
        found: dict[str, CaseResult] = {}
        for result in self.results:
            speed = rate(result)
            known = rate(found[technique]) if (technique := str(result.axes["technique"])) in found else None
            if speed is not None and (known is None or speed[0] > known[0]):
                found[technique] = result
        return found

    @property
    def by_memory(self) -> dict[str, tuple[CaseResult, CaseResult]]:
        """Each technique whose memory is known, with none, at the largest batch that both ran."""
        found: dict[str, tuple[CaseResult, CaseResult]] = {}
        for result in self.results:
            base = _base(self, result)
            if base is None or CONTROL in result.axes or not (memory(result) and memory(base)):
                continue
            technique = str(result.axes["technique"])
            if technique not in found or _batch(result) > _batch(found[technique][0]):
                found[technique] = result, base
        return found

    def at(self, result: CaseResult) -> str:
        """The batch of a result in words, where there are several."""
        several = len({each.axes.get("micro_batch") for each in self.results}) > 1
        return f" at batch {_batch(result)}" if several else ""

    @property
    def drift(self) -> float | None:
        """Share by which the base's speed differs between its two runs, the largest over batches; None without two."""
        found = []
        for again in self.results:
            first = _base(self, again) if CONTROL in again.axes else None
            ratio = relative_speed(again, first) if first else None
            if ratio:
                found.append(max(ratio, 1 / ratio) - 1)
        return max(found, default=None)

    @property
    def largest_batch(self) -> dict[str, int]:
        """The largest batch of each technique that ran; empty where only one batch was asked for."""
        if len({result.axes.get("micro_batch") for result in self.results}) < 2:
            return {}
        found: dict[str, int] = {}
        for result in self.results:
            if result.status == "ok":
                technique = str(result.axes["technique"])
                found[technique] = max(found.get(technique, 0), int(result.axes["micro_batch"]))
        return found


_GATHERS = ("FullyShardedStrategy", "ModelParallelStrategy", "FSDPStrategy")


def settings(results: Sequence[CaseResult]) -> list[Setting]:
    """Return the results by setting, in their order."""
    groups: dict[tuple[tuple[str, str | int], ...], list[CaseResult]] = {}
    for result in results:
        key = tuple((axis, value) for axis, value in result.axes.items() if axis not in _WITHIN)
        groups.setdefault(key, []).append(result)
    return [
        Setting(dict(key), ", ".join(f"{_NAMES.get(axis, axis + ' ')}{value}" for axis, value in key), tuple(members))
        for key, members in groups.items()
    ]


def rate(result: CaseResult) -> tuple[float, str] | None:
    """Return the speed of a case and its unit: tokens, else samples, else steps a second; None if it has none."""
    if result.report is None:
        return None
    throughput = result.report.throughput
    if throughput.tokens_per_s is not None:
        return throughput.tokens_per_s, "tokens/s"
    if throughput.samples_per_s is not None:
        return throughput.samples_per_s, "samples/s"
    return 1 / throughput.step_s.mean, "steps/s"


def memory(result: CaseResult) -> tuple[int, str] | None:
    """Return the bytes by which cases are compared, and what they are; None where they are unknown.

    On CUDA the peak of the allocator. On the CPU the resident peak is mostly Python and torch themselves, hence the sum
    of what training holds: parameters, gradients, optimizer state, and what a forward pass keeps for backward.
    """
    if result.report is None:
        return None
    parts = result.report.memory
    if result.report.machine.accelerator == "cuda":
        return None if parts.peak_bytes is None else (parts.peak_bytes, "peak memory")
    if parts.saved_bytes is None or result.report.machine.strategy in _GATHERS:
        return None  # what a sharded model gathers for a while is in none of these
    held = parts.parameter_bytes + parts.gradient_bytes + parts.optimizer_bytes + parts.saved_bytes
    return held, "training state"


def relative_speed(result: CaseResult, base: CaseResult) -> float | None:
    """Return how many times as fast a case is as the base; None where one has no speed."""
    own, other = rate(result), rate(base)
    return own[0] / other[0] if own and other and own[1] == other[1] else None


def is_faster(result: CaseResult, base: CaseResult, *, drift: float = 0.0) -> bool:
    """Whether a case is faster than the base by more than chance: 2 %, two standard errors, and the machine's drift."""
    ratio = relative_speed(result, base)
    if ratio is None or result.report is None or base.report is None:
        return False
    noise = 2 * math.hypot(_standard_error(result.report), _standard_error(base.report))
    return ratio > 1 + max(LEAST_DIFFERENCE, noise, drift)


def lead(results: Sequence[CaseResult]) -> list[str]:
    """Return the sentences that say what came out: fastest, least memory, what dominates a step, what did not run."""
    sentences: list[str] = []
    compared = [each for each in settings(results) if each.best]
    for setting in compared[:_SETTINGS_IN_LEAD]:
        prefix = f"{setting.name}: " if len(compared) > 1 else ""
        sentences += [prefix + sentence for sentence in _verdicts(setting)]
    if len(compared) > _SETTINGS_IN_LEAD:
        sentences += _overall(compared)
    return [*sentences, _counts(results)]


def macro_table(results: Sequence[CaseResult]) -> Table:
    """Return one row for each case: every cell measured or explained; axes that never change stand in the caption."""
    axes = list(dict.fromkeys(axis for result in results for axis in result.axes))
    constant = [axis for axis in axes if axis != "technique" and len({r.axes.get(axis) for r in results}) == 1]
    varying = ["technique", *(axis for axis in axes if axis != "technique" and axis not in constant)]
    bases = {id(r): _base(setting, r) for setting in settings(results) for r in setting.results}
    units = {speed[1] for result in results if (speed := rate(result))}
    memories = {used[1] for result in results if (used := memory(result))}
    columns = [
        Column("speed", units.pop() if len(units) == 1 else "", bar=True),
        Column("speed by none", "x"),
        Column("step p50", "s"),
        Column("step p90", "s"),
        Column("spread", "%", digits=2),
        Column(memories.pop() if len(memories) == 1 else "memory", "B", bar=True),
        Column("memory by none", "x"),
        Column("process peak", "B"),
        Column("saved", "B"),
        Column("MFU", "%"),
        Column("exposed communication", "%", digits=2),
    ]
    rows = [
        [
            *(_axis(result, axis) for axis in varying),
            result.status,
            *_measured(result, bases[id(result)]),
            result.reason,
        ]
        for result in results
    ]
    first = len(varying) + 1
    empty = [at for at in range(len(columns)) if all(row[first + at] is None for row in rows)]
    columns = [column for at, column in enumerate(columns) if at not in empty]
    rows = [[cell for at, cell in enumerate(row) if at - first not in empty] for row in rows]
    common = ", ".join(f"{_NAMES.get(axis, axis + ' ')}{results[0].axes.get(axis)}" for axis in constant)
    return Table([*varying, "status", *columns, "why"], rows, caption=common)


def technique_table(results: Sequence[CaseResult]) -> Table:
    """Return what the letters mean."""
    used = {name for result in results for name in str(result.axes["technique"]).split("+")}
    rows = [[NONE, "the recipe without any technique"], *([t.letters, t.what] for t in TECHNIQUES.values())]
    return Table(["technique", "what it is"], [row for row in rows if row[0] in used])


def costs(report: DissectReport) -> list[tuple[str, float]]:
    """Return the parts of a dissected step and their shares, largest first: role and phase, or what lies beside."""
    breakdown = main_breakdown(report)
    if breakdown is None or not breakdown.step_s:
        return []
    shares: dict[str, float] = {}
    for row in breakdown.rows:
        for phase in PHASES:
            name = f"{row.role} {phase}" if row.is_module else row.name.strip("<>")
            shares[name] = shares.get(name, 0.0) + float(getattr(row, f"{phase}_s")) / breakdown.step_s
    return sorted(shares.items(), key=lambda item: -item[1])


def _verdicts(setting: Setting) -> list[str]:
    best = setting.best
    base = best.get(NONE)
    if base is None:
        fastest = max(best, key=lambda name: rate(best[name]) or (0, ""))
        return [f"Fastest: {fastest}, {_speed(best[fastest])}; 'none' did not run, so nothing is compared with it."]
    return [
        _fastest(setting, base),
        *_failed(setting),
        *_unrest(setting),
        *_least_memory(setting),
        *_dominates(base),
        *_batches(setting),
    ]


def _failed(setting: Setting) -> list[str]:
    names = {
        str(each.axes["technique"]) for each in setting.results if each.status in ("failed", "timeout", "diverged")
    }
    lost = sorted(names - setting.best.keys())
    return [f"Not measured, as every case of it ended badly: {', '.join(lost)}."] if lost else []


def _fastest(setting: Setting, base: CaseResult) -> str:
    best = setting.best
    if len(best) == 1:
        return f"Only none was measured: {_speed(base)}{setting.at(base)}."
    name = max(best, key=lambda each: relative_speed(best[each], base) or 0.0)
    ratio = relative_speed(best[name], base)
    its = f"{_speed(base)}{setting.at(base)}"
    if name == NONE or ratio is None or not is_faster(best[name], base, drift=setting.drift or 0.0):
        close = "" if name == NONE or ratio is None else f" ({name} is at {ratio:.2f})"
        return f"Fastest: none, {its}; no technique is faster than it by more than chance{close}."
    return f"Fastest: {name}, {ratio:.2f} times none ({_bare(best[name])}{setting.at(best[name])} against {its})."


def _least_memory(setting: Setting) -> list[str]:
    """Of one batch each: a larger one would hide what a technique saves."""
    used = {name: _memories(*pair) for name, pair in setting.by_memory.items()}
    if NONE not in used or len(used) == 1:
        return []
    name = min(used, key=lambda each: used[each][0] / used[each][1])
    n_bytes, base_bytes, what = used[name]
    if name == NONE or n_bytes > (1 - LEAST_DIFFERENCE) * base_bytes:
        n_bytes, _, what = used[NONE]
        at = setting.at(setting.by_memory[NONE][0])
        return [f"Least memory: none, {quantity(n_bytes, 'B')} of {what}{at}; no technique needs less."]
    result, base = setting.by_memory[name]
    amounts = f"{quantity(n_bytes, 'B')} against {quantity(base_bytes, 'B')} of {what}{setting.at(result)}"
    return [
        f"Least memory: {name}, {n_bytes / base_bytes:.2f} of none ({amounts}), at "
        f"{relative_speed(result, base) or 0:.2f} times its speed."
    ]


def _memories(result: CaseResult, base: CaseResult) -> tuple[int, int, str]:
    own, other = memory(result), memory(base)
    assert own  # `by_memory` holds cases whose memory is known
    assert other
    return own[0], other[0], own[1]


def _dominates(base: CaseResult) -> list[str]:
    parts = costs(base.report)[:3] if base.report else []
    if not parts:
        return []
    shares = ", ".join(f"{quantity(share, '%', digits=2)} is {name}" for name, share in parts)
    return [f"A step of none: {shares}."]


def _batches(setting: Setting) -> list[str]:
    largest = setting.largest_batch
    if NONE not in largest:
        return []
    name = max(largest, key=lambda each: largest[each])
    if len(largest) == 1:
        return [f"Largest batch: {largest[NONE]}."]
    if largest[name] == largest[NONE]:
        return [f"Largest batch: {largest[NONE]} for none; no technique fits more of those tried."]
    return [f"Largest batch: {largest[name]} with {name}, {largest[NONE]} with none."]


def _unrest(setting: Setting) -> list[str]:
    if setting.drift is None or setting.drift <= _NOT_QUIET:
        return []
    return [
        f"Careful: none, measured again at the end, differs by {quantity(setting.drift, '%', digits=2)} from its first "
        "run. The machine was not quiet; smaller differences of speed mean nothing, and memory is not concerned."
    ]


def _overall(compared: Sequence[Setting]) -> list[str]:
    """One sentence over all settings: the geometric mean of the ratios to none, of techniques that ran in each."""
    ratios: dict[str, list[float]] = {}
    usable = [each for each in compared if NONE in each.best]
    for setting in usable:
        for name, result in setting.best.items():
            if (ratio := relative_speed(result, setting.best[NONE])) is not None:
                ratios.setdefault(name, []).append(ratio)
    means = {n: math.exp(sum(map(math.log, r)) / len(r)) for n, r in ratios.items() if len(r) == len(usable)}
    if not means:
        return []
    order = sorted(means, key=lambda name: -means[name])[:3]
    ranking = ", ".join(f"{name} {means[name]:.2f}" for name in order)
    return [
        f"Over all {len(usable)} settings, speed to none in geometric mean: {ranking}. The other settings are below."
    ]


def _counts(results: Sequence[CaseResult]) -> str:
    counts = Counter(result.status for result in results)
    others = ", ".join(f"{n} {status}" for status, n in counts.items() if status != "ok")
    return (
        f"{counts['ok']} of {len(results)} cases measured{f'; {others}, each with its reason below' if others else ''}."
    )


def _measured(result: CaseResult, base: CaseResult | None) -> list[Cell]:
    report, speed, used = result.report, rate(result), memory(result)
    if report is None or speed is None:
        return [None] * 11
    step, base_memory = report.throughput.step_s, memory(base) if base else None
    breakdown = main_breakdown(report)
    exposed = breakdown.phase_s("communication") / breakdown.step_s if breakdown and breakdown.step_s else None
    return [
        speed[0],
        relative_speed(result, base) if base else None,
        step.p50,
        step.p90,
        step.std / step.mean if step.mean else None,
        used[0] if used else None,
        used[0] / base_memory[0] if used and base_memory else None,
        report.memory.peak_bytes if report.machine.accelerator != "cuda" else None,
        report.memory.saved_bytes,
        report.flops.mfu,
        exposed if report.machine.world_size > 1 else None,
    ]


def _base(setting: Setting, result: CaseResult) -> CaseResult | None:
    """The case without technique at the same batch."""
    wanted = {axis: value for axis, value in result.axes.items() if axis != CONTROL} | {"technique": NONE}
    return next((each for each in setting.results if each.axes == wanted and each.status == "ok"), None)


def _standard_error(report: DissectReport) -> float:
    step = report.throughput.step_s
    return step.std / step.mean / math.sqrt(step.count) if step.mean else 0.0


def _batch(result: CaseResult) -> int:
    return int(result.axes.get("micro_batch", 0))


def _axis(result: CaseResult, axis: str) -> Cell:
    return result.axes.get(axis, 1 if axis == CONTROL else None)


def _speed(result: CaseResult) -> str:
    speed = rate(result)
    return quantity(*speed) if speed else "no speed"


def _bare(result: CaseResult) -> str:
    speed = rate(result)
    return quantity(speed[0]) if speed else "none"
