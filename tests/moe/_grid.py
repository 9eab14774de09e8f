"""The grid of layers, splits of the ranks and schedules that `test_equivalence.py` walks, and the comparison it makes.

Dimension letters: D data-parallel ranks, S tokens, M model size, H hidden size, E experts, k choices per token.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_efficient.moe import (
    SCHEDULES,
    FixedSchedule,
    GradientSync,
    MoELayer,
    MoESizes,
    MoETopology,
    parallelize,
    schedule_named,
)
from tests.moe.reference import Result, reference

M, H, E = 4, 8, 8
"""H and E go into 8 parts: as many as there are ranks at most."""

Drops = Literal["position", "probs", "even", "dropless"]

DROPS: tuple[Drops, ...] = ("position", "probs", "even", "dropless")
"""A capacity of the even share, by either policy; one in which every expert could take all; none."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A layer and its tokens; `skewed`: all tokens go to the first experts."""

    k: int
    drops: Drops
    activation: Literal["gelu", "swiglu"]
    bias: bool = False
    S: int = 6
    normalize: Literal["before_drop", "after_drop", "never"] = "before_drop"
    skewed: bool = False

    def layer(self, dtype: torch.dtype = torch.float64) -> MoELayer:
        """The whole layer, the same on every rank; its losses weigh enough to be seen in all gradients."""
        torch.manual_seed(3)
        factor = {"position": 1.0, "probs": 1.0, "even": E / self.k, "dropless": None}[self.drops]
        layer = MoELayer(
            M,
            H,
            E,
            self.k,
            activation=self.activation,
            bias=self.bias,
            capacity_factor=factor,
            min_capacity=1,
            drop_policy="probs" if self.drops == "probs" else "position",
            normalize=self.normalize,
            aux_loss_coef=0.7,
            z_loss_coef=0.05,
        )
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        if self.skewed:
            torch.nn.init.zeros_(layer.router.weight)  # of equal probabilities, the lower expert is chosen
        return layer.to(dtype)

    def data(self, D: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Tokens of each data-parallel rank, and gradients of the outputs."""
        generator = torch.Generator().manual_seed(5)
        draws = torch.randn(2, 8, self.S, M, generator=generator, dtype=torch.float64)[:, :D]
        return draws[0].to(dtype), draws[1].to(dtype)


Expected = dict[tuple[Setting, int, int], Result]
"""What the definition gives, by setting, data-parallel ranks, and slices of the tokens before the gate."""


def expected(settings: Sequence[Setting], world: int, model_parallel: Sequence[int]) -> Expected:
    """Run the definition for all that ranks will compare with it."""
    wanted = {(s, world // mp, slices) for s in settings for mp in model_parallel for slices in {1, mp}}
    return {(s, D, slices): reference(s.layer(), *s.data(D), slices=slices) for s, D, slices in wanted}


def splits(world: int, model_parallel: int | None = None) -> list[MoESizes]:
    """Every split of so many ranks, or those of one MP."""
    parts = [n for n in range(1, world + 1) if world % n == 0]
    return [
        MoESizes(mp, ep, esp)
        for mp, ep, esp in product(parts, parts, parts)
        if world % (ep * esp) == 0 and model_parallel in (None, mp)
    ]


SOME_SPLITS = [
    MoESizes(1, 1, 1),
    MoESizes(2, 1, 1),
    MoESizes(4, 1, 1),
    MoESizes(1, 4, 1),
    MoESizes(1, 1, 4),
    MoESizes(1, 2, 1),
    MoESizes(2, 2, 1),
    MoESizes(2, 2, 2),
    MoESizes(4, 1, 2),
]
"""Of 4 ranks: every axis alone, and two or three together, with copies of the experts or without."""


def labels(chunks: Sequence[int] = (1, 2, 3, 4)) -> list[str]:
    """All schedules, in so many chunks where they can be cut."""
    return [each.with_chunks(n).label for each in SCHEDULES.values() for n in (chunks if each.can_be_chunked else (1,))]


Case = tuple[MoESizes, Setting, str]


@dataclass(slots=True)
class Compared:
    """A case, and by how much each tensor differs from the definition on this rank.

    Attributes:
        case: what was run.
        apart: the largest difference of elements.
        relative: the same over the largest element of the whole tensor.
        dropped: assignments without a slot.
    """

    case: Case
    apart: dict[str, float]
    relative: dict[str, float]
    dropped: int

    @property
    def worst(self) -> float:
        return max(self.apart.values())


def compare(
    rank: int,
    world: int,
    cases: Sequence[tuple[MoESizes, Setting, Sequence[str]]],
    known: Expected,
    precision: Literal["float64", "float32", "bfloat16"] = "float64",
) -> list[Compared]:
    """Run cases on this rank; groups are formed, and a layer is spread, once for all schedules of a setting."""
    found, topologies = [], dict[MoESizes, MoETopology]()
    for sizes, setting, schedules in cases:
        topology = topologies.get(sizes) or topologies.setdefault(sizes, MoETopology.create(sizes))
        dtype = torch.float64 if precision == "float64" else torch.float32
        layer = setting.layer(dtype)
        parallelize(layer, topology)
        sync = GradientSync(layer, topology)
        for label in schedules:
            layer.scheduler = FixedSchedule(schedule_named(label))
            layer.zero_grad()
            slices = sizes.model_parallel if schedule_named(label).drops_by_slice else 1
            result = known[setting, topology.dp.size, slices]
            autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()
            run = run_once(layer, sync, topology, setting.data(topology.dp.size, dtype), result, autocast)
            found.append(Compared((sizes, setting, label), *run))
        sync.remove()
    return found


def run_once(
    layer: MoELayer,
    sync: GradientSync,
    topology: MoETopology,
    data: tuple[Tensor, Tensor],
    result: Result,
    autocast: Any = nullcontext(),  # noqa: B008
) -> tuple[dict[str, float], dict[str, float], int]:
    """One forward and backward; return what :class:`Compared` holds beside the case."""
    D, d = topology.dp.size, topology.dp.rank
    x_SM, grad_SM = data[0][d].clone().requires_grad_(), data[1][d]
    with autocast:
        y_SM = layer(x_SM)
        assert layer.aux_loss is not None
        loss = (y_SM.to(grad_SM.dtype) * grad_SM).sum() + layer.aux_loss
    loss.backward()
    sync.finish()
    assert layer.stats is not None
    balance, z = layer.router.losses(layer.stats.load, layer.stats.tokens)
    mine: dict[str, Tensor | None] = {
        "y": y_SM,
        "dx": x_SM.grad,
        "d router": layer.router.weight.grad,
        "aux": layer.aux_loss,
        "balance": balance,
        "z": z,
    }
    theirs = {
        "y": result.y[d],
        "dx": D * result.dx[d],  # the reference's loss is the mean over data-parallel ranks
        "d router": result.d_router,
        "aux": result.aux[d],
        "balance": result.balance[d],
        "z": result.z[d],
    }
    for name, parameter in layer.experts.named_parameters():
        assert isinstance(parameter, DTensor)
        mine[f"d {name}"] = parameter.grad
        theirs[f"d {name}"] = own_part(result.d_experts[f"experts.{name}"], name, topology)
    apart = {name: distance(value, theirs[name]) for name, value in mine.items()}
    whole = {**result.d_experts, "experts.y": result.y, "experts.dx": D * result.dx}
    largest = {
        name: float(whole.get(f"experts.{name.removeprefix('d ')}", each).abs().max()) for name, each in theirs.items()
    }
    relative = {name: value / largest[name] for name, value in apart.items()}
    return apart, relative, int(layer.stats.dropped)


def distance(mine: Tensor | None, theirs: Tensor) -> float:
    """The largest difference, infinite where a tensor is missing, has another shape, or has a NaN."""
    if isinstance(mine, DTensor):
        mine = mine.to_local()
    if mine is None or mine.shape != theirs.shape:
        return float("inf")
    return float((mine.detach().double() - theirs).abs().nan_to_num(float("inf")).max())


def own_part(whole: Tensor, name: str, topology: MoETopology) -> Tensor:
    """The experts and hidden units of a rank, by the rank map of the research: independent of the layer's own code."""
    EP, ESP = topology.sizes.expert_parallel, topology.sizes.expert_sharding
    ep, esp = topology.rank // ESP % EP, topology.rank % ESP
    part = whole[ep * (whole.shape[0] // EP) :][: whole.shape[0] // EP]
    dim = {"w_in": 3, "w_out": 1, "b_in": 2, "b_out": None}[name]
    return part if dim is None else part.narrow(dim, esp * (part.shape[dim] // ESP), part.shape[dim] // ESP)
