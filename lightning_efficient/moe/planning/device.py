"""What a layer's own work costs on this device: the gate, moving rows through memory, and the experts.

Measured on all ranks at once, as they may share cores, and with the layer's own functions. Seconds are a line over
rows: what a call costs however small, and what a row adds.

Dimension letters: S tokens, M model size, H hidden units of an expert on this rank, L experts of this rank, E experts,
R rows of an expert, k choices per token.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_efficient._links import AlphaBeta, fit_line
from lightning_efficient.moe.experts import Experts, ExpertWeights
from lightning_efficient.moe.ops import invert, permute, unpermute
from lightning_efficient.moe.planning.sampler import Clock
from lightning_efficient.moe.planning.shape import LayerShape, rows
from lightning_efficient.moe.planning.steps import Work
from lightning_efficient.moe.router import Router
from lightning_efficient.moe.schedule import SCHEDULES
from lightning_efficient.moe.topology import MoESizes

Direction: TypeAlias = Literal["forward", "backward"]
Run: TypeAlias = Callable[[], tuple[Tensor, Sequence[Tensor]]]

_FEW, _MANY = 1, 4
_LONG_ENOUGH_S = 0.015
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class DeviceCost:
    """Seconds of a layer's own work.

    Args:
        lines: latency and seconds per row, by kind of work and direction.
        seconds: that the measurement took.
    """

    lines: Mapping[tuple[Work, Direction], AlphaBeta]
    seconds: float = 0.0

    def cost(self, work: Work, n_rows: int, direction: Direction) -> float:
        """Return the seconds of work on so many rows."""
        return self.lines[work, direction].predict(n_rows)

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        lines = [[*key, line.alpha_s, line.beta_s_per_byte, line.residual] for key, line in self.lines.items()]
        return {"lines": lines, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeviceCost:
        """Read what :meth:`as_dict` wrote."""
        return cls({(work, way): AlphaBeta(*line) for work, way, *line in values["lines"]}, values["seconds"])


def measure_device(shape: LayerShape, sizes: MoESizes, clock: Clock, *, budget_s: float = 1.0) -> DeviceCost:
    """Measure a layer's own work. All ranks call it, and get the same answer.

    Args:
        shape: of the layer.
        sizes: of the groups.
        clock: of all ranks.
        budget_s: seconds for everything, roughly. Each kind of work is measured on two numbers of rows, once at least.
    """
    typical = rows(SCHEDULES["s1"], shape, sizes)
    bench = _Bench(shape, sizes, clock.device)
    most: dict[Work, int] = {"gate": typical.gate, "move": typical.experts, "experts": typical.experts}
    lines: dict[tuple[Work, Direction], AlphaBeta] = {}
    spent_s = 0.0
    for number, (work, n) in enumerate(most.items()):
        allowed_s = (budget_s - spent_s) / (len(most) - number)
        found, took_s = _measure(lambda r, w=work: bench.make(w, r), n, clock, allowed_s)  # type: ignore[misc]
        spent_s += took_s
        lines.update({(work, way): line for way, line in found.items()})
    return DeviceCost(lines, spent_s)


def _measure(
    make: Callable[[int], Run], most: int, clock: Clock, budget_s: float
) -> tuple[dict[Direction, AlphaBeta], float]:
    spent_s = 0.0
    few = max(1, min(64, most // _MANY))
    while True:  # enough rows to be timed, on what this device is
        _time_both(make(few), clock)
        (seconds,) = clock.slowest(sum(_time_both(make(few), clock)))
        spent_s += 2 * seconds
        if seconds > _LONG_ENOUGH_S / 3 or few * _MANY * 2 > most:
            break
        few *= 2
    times: dict[int, list[tuple[float, float]]] = {few: [], few * _MANY: []}
    for _ in range(_ROUNDS):
        for n, own in times.items():
            own.append(_time_both(make(n), clock))
        spent_s += clock.slowest(sum(sum(own[-1]) for own in times.values()))[0]
        if spent_s > budget_s:
            break
    # The rank that is slowest in the median: in a single round, one of many that share cores always has to wait.
    medians = {n: clock.slowest(*map(statistics.median, zip(*own, strict=True))) for n, own in times.items()}
    ways: tuple[Direction, Direction] = ("forward", "backward")
    return {
        way: AlphaBeta(*fit_line([(float(n), each[index]) for n, each in medians.items()]))
        for index, way in enumerate(ways)
    }, spent_s


def _time_both(run: Run, clock: Clock) -> tuple[float, float]:
    """Seconds of forward and backward on this rank."""
    made: list[tuple[Tensor, Sequence[Tensor]]] = []
    with torch.enable_grad():
        forward_s = clock.own_time(lambda: made.append(run()))
        y, inputs = made[0]
        grad = torch.ones_like(y)
        backward_s = clock.own_time(lambda: torch.autograd.grad(y, inputs, grad))
    return forward_s, backward_s


class _Bench:
    """The layer's functions on inputs of a size; weights and inputs come from a generator of its own."""

    def __init__(self, shape: LayerShape, sizes: MoESizes, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(0)
        M, E = shape.dim, shape.num_experts
        L, H = max(1, E // sizes.expert_parallel), max(1, shape.hidden // sizes.expert_sharding)
        self.weights = ExpertWeights(self._draw(L, M, shape.matrices * H), self._draw(L, H, M))
        self.gate_EM = self._draw(E, M, dtype=torch.float32)
        with torch.device("meta"):  # only their functions are wanted
            activation: Literal["swiglu", "gelu"] = "swiglu" if shape.matrices == 2 else "gelu"
            self.experts = Experts(L, M, H, activation=activation)
            self.router = Router(M, E, shape.top_k)

    def make(self, work: Work, n_rows: int) -> Run:
        """Return what does that work on so many rows, and gives the output and what gradients are wanted of."""
        return {"gate": self._gate, "move": self._move, "experts": self._run_experts}[work](n_rows)

    def _gate(self, S: int) -> Run:
        x_SM = self._draw(S, self.shape.dim)

        def run() -> tuple[Tensor, Sequence[Tensor]]:
            routing = self.router(x_SM, self.gate_EM)
            return torch.cat((routing.weight_Sk.flatten(), routing.load)), (x_SM, self.gate_EM)

        return run

    def _move(self, N: int) -> Run:
        """A row into a slot and out of it: two moves, hence for half as many rows."""
        S = max(1, N // 2)
        x_SM, weight_S1 = self._draw(S, self.shape.dim), self._draw(S, 1, dtype=torch.float32)
        slot_S1 = torch.randperm(S, device=self.device, generator=self.generator)[:, None]
        source_N = invert(slot_S1, S)

        def run() -> tuple[Tensor, Sequence[Tensor]]:
            moved_NM = permute(x_SM, slot_S1, source_N)
            return unpermute(moved_NM, weight_S1, slot_S1, source_N), (x_SM, weight_S1)

        return run

    def _run_experts(self, N: int) -> Run:
        L, M = self.weights.into_EMN.shape[:2]
        x_LRM = self._draw(L, max(1, N // L), M)

        def run() -> tuple[Tensor, Sequence[Tensor]]:
            y_LRM = self.experts.padded(x_LRM, self.weights)
            return y_LRM, (x_LRM, self.weights.into_EMN, self.weights.out_EHM)

        return run

    def _draw(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*size, device=self.device, generator=self.generator)
        return drawn.div_(size[-1] ** 0.5).to(dtype or self.shape.torch_dtype).requires_grad_()
