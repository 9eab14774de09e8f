r"""What the links of a topology cost: a line :math:`t = \alpha + \beta N` for each collective on each group of ranks.

Measured as a layer uses them: all groups of an axis at once, so that ranks behind one uplink share it, and calls back
to back, so that what a token bucket or the buffers of a network card let pass at once does not count as the link's
rate. N is the size of the whole message in bytes, see :class:`~lightning_efficient.moe.planning.steps.Message`.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning_efficient._links import AlphaBeta, fit_line
from lightning_efficient.moe.planning.steps import Message, Op, ranks_of
from lightning_efficient.moe.planning.timeline import DEVICE
from lightning_efficient.moe.topology import Axis, MoESizes

#: What layers use, in the order in which it is measured.
LINKS: tuple[tuple[Op, Axis], ...] = (
    ("all_to_all", "block"),
    ("all_to_all", "ep"),
    ("all_gather", "mp"),
    ("all_gather", "esp"),
    ("reduce_scatter", "esp"),
    ("all_reduce", "esp"),
)
#: Groups whose collectives run at the same time in some schedule.
_MEET: tuple[tuple[Axis, Axis], ...] = (("block", "mp"), ("ep", "esp"), ("ep", "mp"))
_SIZES = tuple(2**power for power in (15, 18, 20, 22))
_SAMPLE_BYTES = 2**20
_LEAST_SAMPLE_BYTES = 2**17
_ROUNDS = 7
_LEAST_FIT = 0.5
_SURE_FIT = 0.25
_TOGETHER_S = 0.06
_TOGETHER_ROUNDS = 3


class Sampler(Protocol):
    """Times collectives on all ranks at once; every rank gets the time of the slowest."""

    def alone(self, op: Op, axis: Axis, n_bytes: int, *, calls: int) -> float:
        """Seconds of a call, of so many back to back."""

    def together(self, first: tuple[Op, Axis, int], second: tuple[Op, Axis, int]) -> float:
        """Seconds until two that were started at the same time have both ended."""

    def beside_device(self, link: tuple[Op, Axis, int], seconds: float) -> tuple[float, float]:
        """Seconds of about so much work of the device alone, and until both it and a collective have ended."""


@dataclass(frozen=True, slots=True)
class Links:
    """What the links cost.

    Args:
        fits: the line of each collective and group.
        shares: how much two resources slow each other, from 0 (not at all) to 1 (together they take the sum).
        lanes: collectives of one group that the backend works on at once.
        lag: what a message takes when nothing else is under way, beyond latency and the link's work on it, as a share
            of that work. Over TCP acknowledgements wait behind the bytes of the other direction, and a rank for the
            slower of two others. Calls back to back, as the lines are measured, hide it, and so do chunks.
        refused: why a line is not to be relied on, by collective and group.
        seconds: that the measurement took.
    """

    fits: Mapping[tuple[Op, Axis], AlphaBeta]
    shares: Mapping[tuple[str, str], float] = field(default_factory=dict)
    lanes: int = 1
    lag: float = 0.0
    refused: Mapping[tuple[Op, Axis], str] = field(default_factory=dict)
    seconds: float = 0.0

    def cost(self, message: Message) -> tuple[float, float]:
        """Return the latency of a message and the seconds that the link works on it.

        Raises:
            ValueError: there is no line for it.
        """
        found = self.fits.get((message.op, message.axis))
        if found is not None:
            work_s = found.beta_s_per_byte * message.n_bytes
            return found.alpha_s + self.lag * work_s, work_s
        gather = self.fits.get(("all_gather", message.axis))
        if message.op == "all_reduce" and gather is not None:  # its two halves
            work_s = gather.beta_s_per_byte * message.n_bytes
            return 2 * (gather.alpha_s + self.lag * work_s), 2 * work_s
        raise ValueError(
            f"there is no line for {message.op} over {message.axis}: its time is unknown. Measure the links with these "
            "sizes of groups."
        )

    def share(self, one: str, other: str) -> float:
        """Return how much two resources slow each other; a group slows itself fully."""
        if one == other:
            return 1.0
        return self.shares.get((one, other), self.shares.get((other, one), 0.0))

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "fits": [[*key, fit.alpha_s, fit.beta_s_per_byte, fit.residual] for key, fit in self.fits.items()],
            "shares": [[*key, share] for key, share in self.shares.items()],
            "lanes": self.lanes,
            "lag": self.lag,
            "refused": [[*key, reason] for key, reason in self.refused.items()],
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Links:
        """Read what :meth:`as_dict` wrote."""
        return cls(
            fits={(op, axis): AlphaBeta(*line) for op, axis, *line in values["fits"]},
            shares={(one, other): share for one, other, share in values["shares"]},
            lanes=values["lanes"],
            lag=values["lag"],
            refused={(op, axis): reason for op, axis, reason in values["refused"]},
            seconds=values["seconds"],
        )


def measure_links(
    sizes: MoESizes, sampler: Sampler, *, lanes: int = 1, lag: float = 0.0, budget_s: float = 2.5
) -> Links:
    """Measure what the collectives of layers cost. All ranks call it, and get the same answer.

    All they decide on the way, they decide by times that they agree on.

    Args:
        sizes: of the groups.
        sampler: what times collectives.
        lanes: collectives of one group that the backend works on at once.
        lag: of the backend: it is too noisy to be measured in time.
        budget_s: seconds for everything, roughly. On slow links messages are smaller and rounds fewer; two sizes are
            always measured, once at least.
    """
    clock = _Budgeted(sampler)
    twin = twins(sizes)
    wanted = list(dict.fromkeys((op, twin[axis]) for op, axis in LINKS if axis in twin))
    fits: dict[tuple[Op, Axis], AlphaBeta] = {}
    refused: dict[tuple[Op, Axis], str] = {}
    for key, points in _sweep(clock, wanted, budget_s=0.7 * budget_s).items():
        fits[key] = AlphaBeta(*fit_line(points, robust=True))
        if (reason := why_refused(points, fits[key])) is not None:
            refused[key] = reason
    shares = _shares(clock, fits, twin, lag=lag, budget_s=budget_s)
    for op, axis in LINKS:
        if axis in twin:
            fits[op, axis] = fits[op, twin[axis]]
            if (op, twin[axis]) in refused:
                refused[op, axis] = refused[op, twin[axis]]
    return Links(fits, shares, lanes, lag, refused, clock.spent_s)


def twins(sizes: MoESizes) -> dict[Axis, Axis]:
    """Return the axes with more than one rank in a group, each with the first whose groups have the same ranks."""
    ranks = ranks_of(sizes)
    first: dict[tuple[int, int], Axis] = {}
    found: dict[Axis, Axis] = {}
    for axis in ("block", "ep", "mp", "esp"):
        if ranks[axis] > 1:
            stride = ranks["esp"] if axis == "ep" else 1
            found[axis] = first.setdefault((ranks[axis], stride), axis)
    return found


def why_refused(points: Sequence[tuple[float, float]], line: AlphaBeta) -> str | None:
    r"""Return why a line is not to be relied on, or None.

    It is where it explains less than half of the times' relative variance, :math:`R^2 < 0.5`, and is off by more than
    a quarter: times that hardly depend on the size are a latency, and no noise.

    Args:
        points: pairs of bytes and seconds.
        line: through them.
    """
    inverse = [1 / seconds for _, seconds in points]
    level = sum(inverse) / sum(each * each for each in inverse)  # the constant with the least relative squares
    around_level = sum((level / seconds - 1) ** 2 for _, seconds in points)
    around_line = sum((line.predict(n_bytes) / seconds - 1) ** 2 for n_bytes, seconds in points)
    if line.residual > _SURE_FIT and around_line > (1 - _LEAST_FIT) * around_level:
        return f"its times do not lie on a line (they are off by {line.residual:.0%})"
    return None


class _Budgeted:
    """Adds up what is spent, as all ranks see it."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.spent_s = 0.0

    def alone(self, op: Op, axis: Axis, n_bytes: int, *, calls: int) -> float:
        seconds = self.sampler.alone(op, axis, n_bytes, calls=calls)
        self.spent_s += calls * seconds
        return seconds

    def together(self, first: tuple[Op, Axis, int], second: tuple[Op, Axis, int]) -> float:
        seconds = self.sampler.together(first, second)
        self.spent_s += seconds
        return seconds

    def beside_device(self, link: tuple[Op, Axis, int], seconds: float) -> tuple[float, float]:
        device_s, both_s = self.sampler.beside_device(link, seconds)
        self.spent_s += device_s + both_s
        return device_s, both_s


def _sweep(
    clock: _Budgeted, wanted: Iterable[tuple[Op, Axis]], *, budget_s: float
) -> dict[tuple[Op, Axis], list[tuple[float, float]]]:
    """Points of each collective: medians over rounds that take turns, so that a disturbance does not hit one alone."""
    wanted = list(wanted)
    each_s = budget_s / len(wanted)
    plans: dict[tuple[Op, Axis], list[tuple[int, int]]] = {}
    for op, axis in wanted:
        clock.alone(op, axis, _LEAST_SAMPLE_BYTES, calls=1)  # connects, and empties what lets short messages pass
        per_byte = clock.alone(op, axis, _LEAST_SAMPLE_BYTES, calls=2) / _LEAST_SAMPLE_BYTES
        plans[op, axis] = _plan(per_byte, budget_s=each_s / 2)
    times: dict[tuple[Op, Axis], dict[int, list[float]]] = {key: defaultdict(list) for key in plans}
    spent_s = dict.fromkeys(plans, 0.0)
    for number in range(_ROUNDS):
        for (op, axis), samples in plans.items():
            if spent_s[op, axis] * (number + 1) > each_s * max(number, 1):  # one more round would be too long
                continue
            for n_bytes, calls in samples:
                times[op, axis][n_bytes].append(clock.alone(op, axis, n_bytes, calls=calls))
                spent_s[op, axis] += calls * times[op, axis][n_bytes][-1]
    return {
        key: [(float(n_bytes), statistics.median(each)) for n_bytes, each in by_size.items()]
        for key, by_size in times.items()
    }


def _plan(per_byte: float, *, budget_s: float) -> list[tuple[int, int]]:
    """Sizes, and how often to call each in a sample, so that a round over all sizes fits the budget."""
    affordable = int(budget_s / per_byte) if per_byte > 0 else _SIZES[-1]
    sample = min(max(affordable // 3, _LEAST_SAMPLE_BYTES), _SAMPLE_BYTES)
    plan: list[tuple[int, int]] = []
    left = affordable
    for size in _SIZES:
        size = size if size <= left else min(size, sample)
        calls = max(2, -(-sample // size))  # by itself a message takes longer
        if len(plan) >= 2 and (size * calls > left or size <= plan[-1][0]):
            break
        plan.append((size, calls))
        left -= size * calls
    return plan


def _shares(
    clock: _Budgeted,
    fits: Mapping[tuple[Op, Axis], AlphaBeta],
    twin: Mapping[Axis, Axis],
    *,
    lag: float,
    budget_s: float,
) -> dict[tuple[str, str], float]:
    """How much groups, and the device, slow each other."""
    pairs = {meet: (twin[meet[0]], twin[meet[1]]) for meet in _MEET if meet[0] in twin and meet[1] in twin}
    measured = sorted({pair for pair in pairs.values() if pair[0] != pair[1]})
    axes = sorted(set(twin.values()))
    each_s = max(budget_s - clock.spent_s, 0.2 * budget_s) / (2 * len(measured) + 3 * len(axes))
    lasting = {axis: _lasting(axis, fits, min(each_s, _TOGETHER_S), lag) for axis in axes}
    between: dict[tuple[Axis, Axis], list[float]] = defaultdict(list)
    beside: dict[Axis, list[float]] = defaultdict(list)
    for _ in range(_TOGETHER_ROUNDS):
        for one, other in measured:
            (first, first_s), (second, second_s) = lasting[one], lasting[other]
            between[one, other].append(_share_of(first_s, second_s, clock.together(first, second)))
        for axis in axes:
            link, link_s = lasting[axis]
            device_s, both_s = clock.beside_device(link, link_s)
            beside[axis].append(_share_of(device_s, link_s, both_s))
        if clock.spent_s > budget_s:
            break
    shares: dict[tuple[str, str], float] = {
        meet: 1.0 if pair[0] == pair[1] else statistics.median(between[pair]) for meet, pair in pairs.items()
    }
    shares.update({(DEVICE, axis): statistics.median(beside[twin[axis]]) for axis in twin})
    return shares


def _share_of(one_s: float, other_s: float, both_s: float) -> float:
    """0 where both together take as long as the longer one, 1 where they take the sum."""
    shorter, longer = sorted((one_s, other_s))
    return min(max((both_s - longer) / shorter, 0.0), 1.0) if shorter > 0 else 0.0


def _lasting(
    axis: Axis, fits: Mapping[tuple[Op, Axis], AlphaBeta], seconds: float, lag: float
) -> tuple[tuple[Op, Axis, int], float]:
    """A collective of about so many seconds, within the sizes that were measured, and its seconds."""
    op = next(op for op, at in fits if at == axis)
    line = fits[op, axis]
    per_byte = (1 + lag) * line.beta_s_per_byte
    wanted = (seconds - line.alpha_s) / per_byte if per_byte else _SIZES[-1]
    n_bytes = int(min(max(wanted, _LEAST_SAMPLE_BYTES), _SIZES[-1]))
    return (op, axis, n_bytes), line.alpha_s + per_byte * n_bytes
