"""Every rank's phases side by side, and the rank that the others wait for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lightning_efficient.dissect.result import PHASES, Breakdown, RankTimes, Straggler

NOTICEABLE = 0.05
"""Share of a step by which a rank has to be behind the median to be named."""


def rank_times(rank: int, breakdown: Breakdown) -> RankTimes:
    """Sum a rank's rows by phase."""
    return RankTimes(rank, breakdown.step_s, **{f"{phase}_s": breakdown.phase_s(phase) for phase in PHASES})


def find_straggler(breakdowns: Sequence[Breakdown]) -> Straggler | None:
    """Name the rank that is busy longest, if it stands out.

    All ranks take equally long, because they wait for each other; the slow one is the one that waits least.

    Args:
        breakdowns: one for each rank, in their order.

    Returns:
        The rank, and the row in which it is furthest behind the median of all ranks; None where no rank is behind the
        median by 5 % of the step.
    """
    if len(breakdowns) < 2:
        return None
    busy = [each.step_s - each.phase_s("communication") for each in breakdowns]
    rank = max(range(len(busy)), key=busy.__getitem__)
    # Without the rank itself: of two ranks, the median would be half way to it.
    behind_s = busy[rank] - statistics.median(value for other, value in enumerate(busy) if other != rank)
    if behind_s < NOTICEABLE * breakdowns[rank].step_s:
        return None
    own = {row.name: row.total_s - row.communication_s for row in breakdowns[rank].rows}
    others = [
        {row.name: row.total_s - row.communication_s for row in each.rows}
        for other, each in enumerate(breakdowns)
        if other != rank
    ]
    lost = {name: total - statistics.median(each.get(name, 0.0) for each in others) for name, total in own.items()}
    row = max(lost, key=lost.__getitem__)
    return Straggler(rank=rank, behind_s=behind_s, row=row, row_behind_s=lost[row])
