"""What each rank of `parm_layers` does for one cell: build the layers, compare their outputs, time them in turn.

Dimension letters: S tokens of a rank, M model size, E experts, H hidden size of an expert, k choices per token.
"""

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_efficient.moe import MoELayer, MoETopology, parallelize, schedule_named
from lightning_efficient.moe.planning import AutoSchedule, Choice, choose
from tests.benchmarks._parm_cells import EXPERTS, HIDDEN_PER_DIM, PEER, Cell, Shape, candidates
from tests.benchmarks._parm_deepspeed import DeepSpeedMoE, LayerWeights, deepspeed_can

BEHIND = {1: 1.5, 3: 1.2}
"""After so many rounds, candidates so many times slower than the fastest leave: their place is known."""
STAY = (PEER, "deepspeed")
"""These do not leave, and `paper` not before the last of those rounds."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure.

    Attributes:
        seconds: of the rounds after the last of `BEHIND`, about.
        min_rounds: at least so many, however long they take.
        max_rounds: at most so many.
        peer: whether DeepSpeed takes part, where it has such groups.
        timeout_s: of collectives.
    """

    seconds: float
    min_rounds: int
    max_rounds: int
    peer: bool
    timeout_s: float


@dataclass(slots=True)
class CellResult:
    """What one cell gave.

    Attributes:
        cell: its name.
        seconds: of forward and backward by candidate, one entry for each round: the slowest rank's.
        differences: by candidate whose output must be that of `deepspeed`: the largest, over the largest output.
        drops: whether tokens were dropped, by capacity of all tokens or of a slice of them.
        auto: what `schedule="auto"` takes.
        model: what it would take by its model of the layer, without trials.
        planning_s: seconds that it measured, all of it, as nothing was known of the links.
        predicted: seconds of its candidates, by that model.
        tried: seconds of those that were tried.
    """

    cell: str
    seconds: dict[str, list[float]]
    differences: dict[str, float] = field(default_factory=dict)
    drops: bool = False
    auto: str | None = None
    model: str | None = None
    planning_s: float = 0.0
    predicted: dict[str, float] = field(default_factory=dict)
    tried: dict[str, float] = field(default_factory=dict)


def measure_cell(rank: int, world_size: int, cell: Cell, plan: Plan) -> CellResult:
    """Measure one cell; the same result on all ranks."""
    topology = MoETopology.create(cell.sizes, timeout=timedelta(seconds=plan.timeout_s))
    shape = cell.shape
    x_SM = torch.randn(shape.S, shape.M, generator=torch.Generator().manual_seed(topology.dp.rank)).requires_grad_()
    grad_SM = torch.randn(shape.S, shape.M, generator=torch.Generator().manual_seed(99 + topology.dp.rank))
    layer, weights = _layer(shape)
    parallelize(layer, topology)
    began = time.perf_counter()
    choice = _planned(layer, x_SM)
    planning_s = _largest(time.perf_counter() - began)
    planned = [each.schedule.label for each in choice.predictions]
    auto, model = choice.schedule.label, choose(choice.predictions).label if choice.predictions else None
    labels = dict.fromkeys([*candidates(cell.sizes), *planned, auto])
    runs: dict[str, Callable[[Tensor], Tensor]] = {label: _run(layer, label) for label in labels}
    parameters = list(layer.parameters())
    if plan.peer and deepspeed_can(topology):
        peer = DeepSpeedMoE(topology, weights, top_k=shape.k, capacity_factor=shape.f)
        runs = {PEER: peer, **runs}
        parameters += peer.module.parameters()
    full, sliced = (_drops(layer, x_SM, label) for label in ("deepspeed", "s1"))
    with torch.no_grad():
        expected_SM = runs["deepspeed"](x_SM)
    differences = {}
    for name, run in runs.items():  # connections open, buffers grow
        y_SM = run(x_SM)
        y_SM.backward(grad_SM)
        if _must_agree(name, shape, full=full, sliced=sliced):
            apart = (y_SM.detach() - expected_SM).abs().max() / expected_SM.abs().max()
            differences[name] = _largest(float(apart))

    def step(run: Callable[[Tensor], Tensor]) -> float:
        for parameter in (x_SM, *parameters):
            parameter.grad = None
        return _timed(lambda: run(x_SM).backward(grad_SM))

    steps: dict[str, Callable[[], float]] = {name: partial(step, run) for name, run in runs.items()}
    seconds = _rounds(steps, plan, stay={*STAY, auto})
    predicted = {each.schedule.label: each.seconds for each in choice.predictions}
    return CellResult(
        cell.name, seconds, differences, full or sliced, auto=auto, model=model, planning_s=planning_s,
        predicted=predicted, tried=dict(choice.measured),
    )  # fmt: skip


def _layer(shape: Shape) -> tuple[MoELayer, LayerWeights]:
    """Our layer, whole, and its weights; the same on all ranks."""
    torch.manual_seed(0)
    layer = MoELayer(
        shape.M, HIDDEN_PER_DIM * shape.M, EXPERTS, shape.k, capacity_factor=shape.f, activation="gelu",
        normalize="after_drop",
    )  # fmt: skip
    experts = layer.experts
    return layer, LayerWeights(
        layer.router.weight.detach().clone(), experts.w_in.detach()[:, :, 0].clone(), experts.w_out.detach().clone()
    )


def _run(layer: MoELayer, label: str) -> Callable[[Tensor], Tensor]:
    schedule = schedule_named(label)
    return lambda x_SM: layer.run(x_SM, schedule)[0]


def _planned(layer: MoELayer, x_SM: Tensor) -> Choice:
    """What `schedule="auto"` takes, and why."""
    planner = AutoSchedule(layer.topology)
    planner.schedule_for(layer, x_SM)
    (choice,) = planner.plan.choices.values()
    return choice


@torch.no_grad()
def _drops(layer: MoELayer, x_SM: Tensor, label: str) -> bool:
    """Whether a schedule drops an assignment, on any rank."""
    return _largest(float(layer.run(x_SM, schedule_named(label))[1].dropped)) > 0


def _must_agree(name: str, shape: Shape, *, full: bool, sliced: bool) -> bool:
    """Whether an output must be that of our DeepSpeed order, with the tokens dropped of all, or of a slice."""
    if name == PEER:
        return shape.k > 1 or not full  # with k = 1, which tokens DeepSpeed drops is not defined
    return not (schedule_named(name).drops_by_slice and (full or sliced))


def _rounds(steps: dict[str, Callable[[], float]], plan: Plan, *, stay: Collection[str]) -> dict[str, list[float]]:
    """Time the candidates in turn, A B C A B C ...: what disturbs the machine disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    running, spent = list(steps), 0.0
    for number in range(1, plan.max_rounds + 1):
        if number > plan.min_rounds and spent > plan.seconds:
            break
        first = number % len(running)
        for name in running[first:] + running[:first]:  # nobody always follows the same one
            seconds[name].append(steps[name]())
            spent += seconds[name][-1]
        if number in BEHIND:
            medians = {name: statistics.median(seconds[name]) for name in running}
            most, last = BEHIND[number] * min(medians.values()), number == max(BEHIND)
            running = [
                name for name in running
                if medians[name] <= most or name in stay or (name == "paper" and not last)
            ]  # fmt: skip
            spent = 0.0
    return seconds


def _timed(run: Callable[[], object]) -> float:
    """Seconds of the slowest rank, all of which begin together."""
    dist.barrier()
    began = time.perf_counter()
    run()
    return _largest(time.perf_counter() - began)


def _largest(value: float) -> float:
    """The largest over ranks, so that all decide alike."""
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)
