"""The figures of `compression_links`, from what the ranks saw to tables and targets."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tests.benchmarks._links_methods import LOCAL, PLAIN, TORCH, Method
from tests.benchmarks._links_rank import RankReport
from tests.support.collectives import Collective

Rate = str | None


@dataclass(frozen=True, slots=True)
class Figures:
    """One section's figures.

    Attributes:
        seconds: By (link, method): a step's time in each round, of the slowest rank.
        cpu: By (link, method): a step's CPU time in each round, mean over ranks.
        tx_bytes: By (link, method): bytes a host sent per step, median over rounds, mean over hosts.
        payload: By method: bytes a rank hands to collectives per step.
        wire: By method: bytes a host should send for that, without headers.
        collectives: By method: collectives per step.
        parameters: Of the model.
    """

    seconds: dict[tuple[Rate, str], list[float]]
    cpu: dict[tuple[Rate, str], list[float]]
    tx_bytes: dict[tuple[Rate, str], float]
    payload: dict[str, float]
    wire: dict[str, float]
    collectives: dict[str, float]
    parameters: int

    def speedup(self, rate: Rate, over: str, method: str) -> float | None:
        """How many times faster `method` steps than `over`: the median over rounds of the ratio in one round."""
        return _ratio(self.seconds, (rate, over), (rate, method))

    def cpu_added(self, rate: Rate, method: str, over: str) -> float | None:
        """CPU seconds per step of `method` beyond those of `over`: the median over rounds."""
        mine, base = self.cpu.get((rate, method)), self.cpu.get((rate, over))
        return statistics.median(m - b for m, b in zip(mine, base, strict=True)) if mine and base else None

    def as_json(self) -> dict[str, Any]:
        """The same with names for keys."""
        plain = asdict(self)
        for name in ("seconds", "cpu", "tx_bytes"):
            plain[name] = {f"{link(rate)} {method}": v for (rate, method), v in plain[name].items()}
        return plain


@dataclass(frozen=True, slots=True)
class Target:
    """A claim about the figures: `at least` or `at most` a bound."""

    claim: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if (self.value >= self.bound) == self.at_least or self.value == self.bound else "MISSED"


def figures(reports: list[RankReport]) -> Figures:
    """Join the ranks' reports."""
    keys = list(reports[0].samples)
    world_size = len(reports)

    def join(what: str, how: Callable[[list[float]], float]) -> dict[tuple[Rate, str], list[float]]:
        columns = {key: zip(*(getattr(r.samples[key], what) for r in reports), strict=True) for key in keys}
        return {key: [how(list(column)) for column in rounds] for key, rounds in columns.items()}

    sent = join("tx_bytes", statistics.fmean)
    seen = reports[0].collectives  # of two steps
    return Figures(
        seconds=join("seconds", max),
        cpu=join("cpu", statistics.fmean),
        tx_bytes={key: statistics.median(values) for key, values in sent.items()},
        payload={name: sum(c.nbytes for c in two) / 2 for name, two in seen.items()},
        wire={name: sum(_ring_bytes(c, world_size) for c in two) / 2 for name, two in seen.items()},
        collectives={name: len(two) / 2 for name, two in seen.items()},
        parameters=reports[0].parameters,
    )


def targets(links: Figures | None, cpu: Figures | None, memory: dict[str, float]) -> list[Target]:
    """What compression promises, held against the figures."""
    found: list[Target] = []
    if links is not None:
        for over, method, rate, bound in (
            (TORCH, "acp_sgd:4", "100mbit", 1.5),
            (f"{TORCH}:32", "acp_sgd:32", "100mbit", 1.7),
            (TORCH, "acp_sgd:8", "100mbit", 1.2),
            (TORCH, "acp_sgd:4", "500mbit", 1.2),
            (PLAIN, "acp_sgd:4", "100mbit", 9.0),
            (PLAIN, "acp_sgd:4", "50mbit", 20.0),
            (PLAIN, "acp_sgd:4", None, 0.97),
        ):
            peer = f"{over}:4" if over == TORCH else over
            value = links.speedup(rate, peer, method)
            found.append(Target(f"{method} steps faster than {peer}, {link(rate)}", value, bound, at_least=True))
        exposed = links.speedup("100mbit", "acp_sgd:32", LOCAL)
        found.append(Target("acp_sgd:32 step over no communication, 100mbit", exposed, 1.2, at_least=False))
        found += _byte_targets(links)
    if cpu is not None:
        mine, peer = (cpu.cpu_added(None, m, PLAIN) for m in ("acp_sgd:4", f"{TORCH}:4"))
        share = mine / peer if mine is not None and peer else None
        claim = f"CPU time acp_sgd:4 adds to {PLAIN}, over what {TORCH}:4 adds"
        found.append(Target(claim, share, 0.35, at_least=False))
    if memory:
        claim = f"memory of acp_sgd:4 above {PLAIN}, in gradient sizes"
        found.append(Target(claim, memory.get("acp_sgd:4"), 1.35, at_least=False))
    return found


def _byte_targets(links: Figures) -> list[Target]:
    """Bytes on the wire against the ring's formula: headers come on top, so up to a tenth more.

    Not for methods that send so little that the barriers around a measurement count.
    """
    found = []
    for (rate, method), sent in links.tx_bytes.items():
        if rate == "100mbit" and Method.parse(method).kind in (PLAIN, "acp_sgd"):
            claim = f"bytes {method} really sent over the ring formula, {link(rate)}"
            found.append(Target(claim, sent / links.wire[method], 1.10, at_least=False))
    return found


def link_table(links: Figures) -> str:
    """Speed-up over plain DDP, by method and link."""
    rates = list(dict.fromkeys(rate for rate, _ in links.seconds))
    methods = list(dict.fromkeys(method for _, method in links.seconds))
    head = ["method", *(link(rate) for rate in rates)]
    rows = [[f"`{method}`", *(_cell(links.speedup(rate, PLAIN, method), "x") for rate in rates)] for method in methods]
    rows.append(["*step of `ddp`, s*", *(f"{_median(links.seconds, (rate, PLAIN)):.3f}" for rate in rates)])
    return _table(head, rows)


def detail_table(links: Figures, rate: Rate) -> str:
    """One link in detail: times, their spread, and bytes."""
    rows = []
    for (at, method), seconds in links.seconds.items():
        if at != rate:
            continue
        sent, wire = links.tx_bytes[at, method], links.wire[method]
        rows.append([
            f"`{method}`",
            f"{1e3 * statistics.median(seconds):.0f}",
            f"{1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f}",
            _cell(links.speedup(rate, method, LOCAL), "x"),
            f"{links.collectives[method]:g}",
            f"{links.payload[method] / 1e6:.3f}",
            f"{wire / 1e6:.3f}",
            f"{sent / 1e6:.3f}",
            _cell(links.speedup(rate, f"{TORCH}:{Method.parse(method).rank}", method), "x"),
        ])  # fmt: skip
    head = [
        "method", "step, ms", "range, ms", "over no communication", "collectives", "payload, MB", "ring formula, MB",
        "sent, MB", "over torch's hook, same rank",
    ]  # fmt: skip
    return _table(head, rows)


def cpu_table(cpu: Figures) -> str:
    """CPU time per step."""
    rows = []
    for _, method in cpu.cpu:
        added = [cpu.cpu_added(None, method, over) for over in (LOCAL, PLAIN)]
        rows.append([f"`{method}`", f"{1e3 * _median(cpu.cpu, (None, method)):.1f}",
                     *("-" if a is None else f"{1e3 * a:+.1f}" for a in added)])  # fmt: skip
    return _table(["method", "CPU per step, ms", "above no communication, ms", "above plain DDP, ms"], rows)


def memory_table(memory: dict[str, float]) -> str:
    """Peak memory above plain DDP's."""
    return _table(["method", "gradient sizes"], [[f"`{name}`", f"{value:.2f}"] for name, value in memory.items()])


def target_table(found: list[Target]) -> str:
    """Targets and whether they are met."""
    rows = [[t.claim, f"{'>=' if t.at_least else '<='} {t.bound:g}", _cell(t.value, ""), t.verdict] for t in found]
    return _table(["claim", "target", "measured", ""], rows)


def link(rate: Rate) -> str:
    """A link's name in tables."""
    return rate or "no limit"


def _ring_bytes(collective: Collective, world_size: int) -> float:
    factors = {"all_reduce": 2 * (world_size - 1) / world_size, "all_gather": world_size - 1}
    return factors.get(collective.op, 0.0) * collective.nbytes


def _ratio(table: dict[tuple[Rate, str], list[float]], top: tuple[Rate, str], bottom: tuple[Rate, str]) -> float | None:
    above, below = table.get(top), table.get(bottom)
    if not above or not below:
        return None
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _median(table: dict[tuple[Rate, str], list[float]], key: tuple[Rate, str]) -> float:
    return statistics.median(table.get(key) or [float("nan")])


def _cell(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.2f}{unit}" if value < 10 else f"{value:.1f}{unit}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
