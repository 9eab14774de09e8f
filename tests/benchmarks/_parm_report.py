"""The figures of `parm_layers`, from the rounds of each cell to tables and targets."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lightning_efficient.moe import SCHEDULES
from tests.benchmarks._links_report import Target
from tests.benchmarks._parm_cells import PEER, Cell
from tests.benchmarks._parm_rank import CellResult

LONG_S = 0.05
"""Layers that take as long are bound by communication, and are what the choice is judged by."""
NEAR = 1.1
HEADLINE = "slow_inter@200mbit 2,2,2 S1024 M512 k2 f1.25"
BASELINES = [name for name, schedule in SCHEDULES.items() if not schedule.can_be_chunked]
CHOICES = [name for name in SCHEDULES if name not in BASELINES]


@dataclass(frozen=True, slots=True)
class Row:
    """A cell and what was measured in it."""

    cell: Cell
    result: CellResult

    def seconds(self, label: str | None) -> float | None:
        """Median over rounds; None where the candidate did not run."""
        found = self.result.seconds.get(label or "")
        return statistics.median(found) if found else None

    @property
    def best(self) -> str:
        """The fastest of our schedules, the paper's baseline aside."""
        return min((label for label in self.result.seconds if label not in (PEER, "paper")), key=self._known)

    @property
    def layer_s(self) -> float:
        """How long the layer takes in DeepSpeed's order: DeepSpeed's own where it runs, else ours."""
        return self.seconds(PEER) or self._known("deepspeed")

    def fastest_of(self, name: str) -> str | None:
        """The label with the best number of chunks of a schedule; None where it did not run."""
        labels = [label for label in self.result.seconds if label.partition("/")[0] == name]
        return min(labels, key=self._known, default=None)

    def ratio(self, over: str, label: str | None) -> float | None:
        """How many times as long `over` takes as `label`."""
        above, below = self.seconds(over), self.seconds(label)
        return above / below if above and below else None

    def regret(self, label: str | None) -> float | None:
        """How many times as long a choice takes as the best."""
        chosen = self.seconds(label)
        return chosen / self._known(self.best) if chosen else None

    def _known(self, label: str) -> float:
        return statistics.median(self.result.seconds[label])


def targets(rows: list[Row]) -> list[Target]:
    """What the layers promise, held against the figures; `auto` is judged where the planner has chosen."""
    differences = [value for row in rows for value in row.result.differences.values()]
    order = _all(rows, lambda row: row.ratio("deepspeed", PEER))
    found = [
        Target("largest difference of outputs that must agree, over the largest output",
               max(differences, default=None), 1e-4, at_least=False),
        Target("our `deepspeed` order's time over DeepSpeed's, geometric mean", _mean(order), 1.1, at_least=False),
    ]  # fmt: skip
    long = [row for row in rows if row.layer_s >= LONG_S]
    head = [row for row in rows if row.cell.name == HEADLINE]
    for who, label in (("`auto`", lambda row: row.result.auto), ("the best candidate", lambda row: row.best)):
        paper, peer, long_peer, head_peer = (
            _all(part, lambda row, over=over, label=label: row.ratio(over, label(row)))  # type: ignore[misc]
            for part, over in ((rows, "paper"), (rows, PEER), (long, PEER), (head, PEER))
        )
        found += [
            Target(f"`paper` over {who}, geometric mean", _mean(paper), 2.5, at_least=True),
            Target(f"`paper` over {who}, best", max(paper, default=None), 5.0, at_least=True),
            Target(f"`paper` over {who}, least", min(paper, default=None), 1.1, at_least=True),
            Target(f"DeepSpeed over {who}, {HEADLINE}", _mean(head_peer), 1.4, at_least=True),
            Target(f"DeepSpeed over {who}, layers of 50 ms and more, geometric mean",
                   _mean(long_peer), 1.3, at_least=True),
            Target(f"DeepSpeed over {who}, least", min(peer, default=None), 0.95, at_least=True),
        ]  # fmt: skip
    regrets = _all(long, lambda row: row.regret(row.result.auto))
    near = sum(regret <= NEAR for regret in regrets) / len(regrets) if regrets else None
    claim = "over the best, layers of 50 ms and more, geometric mean"
    planning = [row.result.planning_s for row in rows if row.result.auto]
    return [
        *found,
        Target("share of layers of 50 ms and more in which `auto` is within 10 % of the best", near, 0.85, True),
        Target(f"time of `auto` {claim}", _mean(regrets), 1.05, at_least=False),
        Target(f"time of what its model alone would take {claim}",
               _mean(_all(long, lambda row: row.regret(row.result.model))), 1.05, at_least=False),
        Target("seconds of planning, links and layer unknown, median",
               statistics.median(planning) if planning else None, 5.0, at_least=False),
        Target("share of layers planned within 5 s",
               sum(each <= 5 for each in planning) / len(planning) if planning else None, 1.0, at_least=True),
        Target("seconds of planning, links and layer unknown, most", max(planning, default=None), 5.0, at_least=False),
    ]  # fmt: skip


def network_table(rows: list[Row]) -> str:
    """One network: milliseconds of forward and backward, and ratios."""
    head = [
        "MP,EP,ESP", "S", "M", "k", "f", *(f"`{name}`" for name in BASELINES), PEER, *(f"`{name}`" for name in CHOICES),
        "best", f"{PEER} / best", "`paper` / best", "`auto`", "`auto` / best",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        shape = row.cell.shape
        lines.append([
            row.cell.topology, str(shape.S), str(shape.M), str(shape.k), f"{shape.f:g}",
            *(_ms(row, name) for name in (*BASELINES, PEER)),
            *(_ms(row, row.fastest_of(name), chunks=True) for name in CHOICES),
            f"`{row.best}`", _cell(row.ratio(PEER, row.best)), _cell(row.ratio("paper", row.best)),
            f"`{row.result.auto}`" if row.result.auto else "-", _cell(row.regret(row.result.auto)),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary_table(rows: list[Row]) -> str:
    """Each network: how many times as long others take as what `auto` chose, and that as the best."""
    head = ["network", "layers", "`paper` / `auto`", f"{PEER} / `auto`", "`auto` / best"]
    lines = [head, ["---"] * len(head)]
    for network in dict.fromkeys(row.cell.network for row in rows):
        own = [row for row in rows if row.cell.network == network]
        paper, peer = (_all(own, lambda row, over=over: row.ratio(over, row.result.auto)) for over in ("paper", PEER))  # type: ignore[misc]
        regrets = _all(own, lambda row: row.regret(row.result.auto))
        lines.append([network, str(len(own)), *map(_spread, (paper, peer, regrets))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def progress_line(row: Row) -> str:
    """One cell in a line."""
    times = ", ".join(f"{name} {_ms(row, name)}" for name in (*BASELINES, PEER, row.best))
    rounds = max(map(len, row.result.seconds.values()))
    return f"{row.cell.name}: {times} ms; {rounds} rounds" + (f"; auto {row.result.auto}" if row.result.auto else "")


def _ms(row: Row, label: str | None, *, chunks: bool = False) -> str:
    seconds = row.seconds(label)
    if seconds is None or label is None:
        return "-"
    return f"{1e3 * seconds:.0f}" + (f" /{label.partition('/')[2]}" if chunks and "/" in label else "")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _spread(values: list[float]) -> str:
    return f"{_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def _all(rows: Iterable[Row], of: Callable[[Row], float | None]) -> list[float]:
    return [value for value in map(of, rows) if value is not None]


def _mean(values: list[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None
