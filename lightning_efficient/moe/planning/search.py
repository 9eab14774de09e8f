r"""Which schedule to try next on the layer itself: a model that learns where the predictions err.

Predictions are wrong in ways that schedules have in common: by how many chunks cost, by packing, by transport. With
the features :math:`\phi` of a schedule, its time is taken to be :math:`\log t = \log \hat t + w^\top \phi + \epsilon`,
and w to be normal with mean 0. Each run of a schedule narrows w by Bayesian linear regression, hence the times of all
that were not run. Next comes the schedule with the lowest plausible time, as in the LinUCB algorithm (Li et al., WWW
2010): one that is likely fast, or of which little is known.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from lightning_efficient.moe.planning.predict import Prediction
from lightning_efficient.moe.schedule import Schedule

#: Standard deviations of w: of all alike, by log2(chunks) / 3, packing, fused transport, a split after the gate.
_SPREAD = torch.tensor([0.3, 0.25, 0.2, 0.2, 0.15], dtype=torch.float64)
#: And of what a schedule has for itself, and of a run, both relative.
_OWN, _NOISE = 0.05, 0.08
#: The fastest is believed after so many runs, or two that took so many seconds.
_SURE_RUNS, _SURE_S = 8, 0.4
#: Where no other is plausibly faster by this share, the search ends.
_WORTH = 0.03


class Search:
    """Tells which schedule to run next, from the predictions and the runs so far.

    Args:
        predictions: of the candidates.
        spread: how far off predictions may be, as a multiple of what is usual.

    Attributes:
        runs: seconds of each run, by schedule.
    """

    def __init__(self, predictions: Sequence[Prediction], *, spread: float = 1.0) -> None:
        self.runs: dict[Schedule, list[float]] = {}
        self._schedules = [each.schedule for each in predictions]
        self._log_predicted = torch.tensor([math.log(each.seconds) for each in predictions], dtype=torch.float64)
        self._spread, self._own = spread * _SPREAD, spread * _OWN
        self._features = torch.tensor([_features(each) for each in self._schedules], dtype=torch.float64)

    @property
    def measured(self) -> dict[Schedule, float]:
        """Median seconds of those that ran."""
        return {schedule: statistics.median(seconds) for schedule, seconds in self.runs.items()}

    def note(self, schedule: Schedule, seconds: float) -> None:
        """Take a run into account."""
        self.runs.setdefault(schedule, []).append(seconds)

    def next(self) -> Schedule | None:
        """Return the schedule to run; None: the fastest is found."""
        if not self.runs:
            return self._schedules[int(self._log_predicted.argmin())]
        log_seconds, spread = self._expected()
        lowest = log_seconds - spread
        measured = self.measured
        best = min(measured, key=lambda schedule: measured[schedule])
        runs = self.runs[best]
        sure = len(runs) >= _SURE_RUNS or (len(runs) > 1 and sum(runs) >= _SURE_S)
        others = [low for schedule, low in zip(self._schedules, lowest.tolist(), strict=True) if schedule != best]
        if sure and min(others, default=math.inf) > math.log((1 - _WORTH) * measured[best]):
            return None
        return self._schedules[int(lowest.argmin())]

    def _expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithm of each schedule's seconds, and its standard deviation."""
        precision = torch.diag(self._spread**-2)
        pull = torch.zeros(len(self._spread), dtype=torch.float64)
        ran = {self._schedules.index(schedule): seconds for schedule, seconds in self.runs.items()}
        for index, seconds in ran.items():
            phi, weight = self._features[index], 1 / (self._own**2 + _NOISE**2 / len(seconds))
            precision += weight * torch.outer(phi, phi)
            pull += weight * phi * (math.log(statistics.median(seconds)) - self._log_predicted[index])
        covariance = torch.linalg.inv(precision)
        log_seconds = self._log_predicted + self._features @ (covariance @ pull)
        spread = ((self._features @ covariance * self._features).sum(1) + self._own**2).sqrt()
        for index, seconds in ran.items():
            log_seconds[index] = math.log(statistics.median(seconds))
            spread[index] = _NOISE / math.sqrt(len(seconds))
        return log_seconds, spread


def _features(schedule: Schedule) -> list[float]:
    chunks, fused = math.log2(schedule.chunks) / 3, schedule.transport == "fused"
    return [1.0, chunks, float(schedule.packed), float(fused), float(schedule.split == "after")]
