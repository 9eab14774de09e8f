"""Which ranks share tokens, own the same experts, or hold shards of one expert.

Rank maps are contiguous, the innermost first (Parm, section 2)::

    mp  = rank % MP              dp = rank // MP               DP  = P / MP
    esp = rank % ESP             ep = (rank // ESP) % EP       edp = rank // (EP * ESP)

The EP * ESP ranks with equal edp are a *block*: together they hold every expert once. Sizes of MP and ESP are
independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

Axis: TypeAlias = Literal["mp", "dp", "ep", "esp", "block", "edp", "world"]
"""Names of the groups of ranks."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that talk to each other.

    Args:
        axis: what they share.
        size: how many they are.
        rank: the own position among them.
        process_group: what torch calls them; None where the size is 1, or where nothing is distributed.
    """

    axis: Axis
    size: int = 1
    rank: int = 0
    process_group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class MoESizes:
    """How many ranks share a job; checked against the number of ranks.

    Args:
        model_parallel: MP: ranks with the same tokens, which may hold shards of the dense weights.
        expert_parallel: EP: ranks among which whole experts are spread.
        expert_sharding: ESP: ranks among which the hidden size of each expert is cut.

    Raises:
        ValueError: a size is below 1.
    """

    model_parallel: int = 1
    expert_parallel: int = 1
    expert_sharding: int = 1

    def __post_init__(self) -> None:
        for name in ("model_parallel", "expert_parallel", "expert_sharding"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}_size is {getattr(self, name)}: a group has at least one rank. Set it to 1 or more."
                )

    def check_world(self, world_size: int) -> None:
        """Check that groups of these sizes fill the world.

        Raises:
            ValueError: they do not.
        """
        if world_size % self.model_parallel:
            raise ValueError(
                f"model_parallel_size={self.model_parallel} does not divide the {world_size} ranks: each group of "
                "that many ranks works on the same tokens. Choose a divisor of the number of devices."
            )
        block = self.expert_parallel * self.expert_sharding
        if world_size % block:
            raise ValueError(
                f"expert_parallel_size={self.expert_parallel} x expert_sharding_size={self.expert_sharding} = {block} "
                f"does not divide the {world_size} ranks: each block of that many ranks holds every expert once. "
                "Choose sizes whose product divides the number of devices."
            )

    def check_experts(self, num_experts: int, hidden_size: int, *, where: str = "the layer") -> None:
        """Check that the experts of a layer can be spread.

        Args:
            num_experts: E.
            hidden_size: H.
            where: name of the layer, for the error.

        Raises:
            ValueError: E is not a multiple of EP, or H of ESP.
        """
        if num_experts % self.expert_parallel:
            raise ValueError(
                f"{where} has {num_experts} experts, not divisible by expert_parallel_size={self.expert_parallel}: "
                "each rank of a group owns equally many. Change the number of experts or the size."
            )
        if hidden_size % self.expert_sharding:
            raise ValueError(
                f"{where} has experts of hidden size {hidden_size}, not divisible by expert_sharding_size="
                f"{self.expert_sharding}: each rank of a group holds an equal part. Change the hidden size or the size."
            )


class MoETopology:
    """The groups a rank belongs to, and the mesh its experts lie on.

    ``MoETopology()`` is a single process, where every group has one rank and nothing is sent.

    Args:
        sizes: of the groups.
        world_size: P.
        rank: the own one.
        groups: by axis; missing ones have one rank.
        mesh: dimensions ``edp``, ``ep``, ``esp``: where the experts' weights lie. None: they are plain tensors.
    """

    def __init__(
        self,
        sizes: MoESizes | None = None,
        *,
        world_size: int = 1,
        rank: int = 0,
        groups: dict[Axis, Group] | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        groups = groups or {}
        self.sizes = sizes or MoESizes()
        self.world_size = world_size
        self.rank = rank
        self.mesh = mesh
        self.mp = groups.get("mp", Group("mp"))
        self.dp = groups.get("dp", Group("dp"))
        self.ep = groups.get("ep", Group("ep"))
        self.esp = groups.get("esp", Group("esp"))
        self.block = groups.get("block", Group("block"))
        self.edp = groups.get("edp", Group("edp"))
        self.world = groups.get("world", Group("world"))

    def __deepcopy__(self, memo: object) -> MoETopology:
        return self  # a copy of a model works in the same groups

    @classmethod
    def create(cls, sizes: MoESizes, *, device_type: str = "cpu", timeout: timedelta | None = None) -> MoETopology:
        """Form the groups, on all ranks of the default process group together.

        Args:
            sizes: of the groups.
            device_type: where the experts' weights will live, ``cpu`` or ``cuda``.
            timeout: after which a collective of a group fails; default: torch's.

        Raises:
            ValueError: the sizes do not fill the world.
        """
        world_size, rank = dist.get_world_size(), dist.get_rank()
        sizes.check_world(world_size)
        mp, esp, block = sizes.model_parallel, sizes.expert_sharding, sizes.expert_parallel * sizes.expert_sharding
        job: dict[Axis, Callable[[int], int]] = {  # ranks with equal values form a group
            "mp": lambda r: r // mp,
            "dp": lambda r: r % mp,
            "edp": lambda r: r % block,
            "ep": lambda r: r // block * esp + r % esp,
            "esp": lambda r: r // esp,
            "block": lambda r: r // block,
            "world": lambda r: 0,
        }
        groups, process_groups = {}, {}
        for axis, of in job.items():
            members = [
                [r for r in range(world_size) if of(r) == value] for value in sorted({*map(of, range(world_size))})
            ]
            process_groups[axis], _ = dist.new_subgroups_by_enumeration(members, timeout=timeout)
            mine = members[[rank in each for each in members].index(True)]
            groups[axis] = Group(axis, len(mine), mine.index(rank), process_groups[axis] if len(mine) > 1 else None)
        mesh = DeviceMesh.from_group(
            [process_groups[axis] for axis in ("edp", "ep", "esp")],
            device_type,
            mesh=torch.arange(world_size).view(-1, sizes.expert_parallel, esp),
            mesh_dim_names=("edp", "ep", "esp"),
        )
        return cls(sizes, world_size=world_size, rank=rank, groups=groups, mesh=mesh)
