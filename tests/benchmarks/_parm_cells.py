"""The grid of `parm_layers`: networks, topologies and shapes of a layer, and which of them are measured.

Dimension letters: S tokens of a rank, M model size, H hidden size of an expert, E experts, k choices per token, f
capacity factor.
"""

import re
from dataclasses import dataclass

from lightning_efficient.moe import SCHEDULES, MoESizes

WORLD_SIZE = 4
EXPERTS = 8
HIDDEN_PER_DIM = 2
CHUNKS = (2, 4)
PEER = "DeepSpeed"
"""The real layer; `deepspeed` is its order in our code."""


@dataclass(frozen=True, slots=True)
class Network:
    """What joins the ranks.

    Attributes:
        hosts: that share the ranks evenly; 0: no lab, the loopback interface without limit.
        rate: of each host's link, in each direction.
    """

    hosts: int
    rate: str | None


NETWORKS = {
    "slow_inter@200mbit": Network(2, "200mbit"),
    "slow_inter@50mbit": Network(2, "50mbit"),
    "homogeneous@200mbit": Network(4, "200mbit"),
    "unlimited": Network(0, None),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a layer; H = 2 M and E = 8."""

    S: int
    M: int
    k: int
    f: float


SHAPES = {
    "A": Shape(128, 128, 1, 1.0),
    "B": Shape(512, 256, 2, 1.25),
    "C": Shape(1024, 512, 2, 1.25),
    "D": Shape(512, 512, 1, 2.0),
    "E": Shape(1024, 256, 2, 1.0),
    "F": Shape(128, 512, 2, 2.0),
    "G": Shape(1024, 128, 1, 1.25),
}

GRID = {
    "slow_inter@200mbit": {"2,2,2": "ABCDEF", "2,4,1": "ABCE", "4,4,1": "BCG", "1,2,2": "BC", "4,2,2": "BCG"},
    "slow_inter@50mbit": {"2,2,2": "ABDF", "2,4,1": "BE", "4,4,1": "BF", "1,2,2": "B", "4,2,2": "B"},
    "homogeneous@200mbit": {"2,2,2": "ABCE", "2,4,1": "BF", "4,4,1": "BD", "4,2,2": "BG"},
    "unlimited": {"2,2,2": "B", "2,4,1": "B", "4,4,1": "D", "1,2,2": "F", "4,2,2": "E"},
}
"""By network and topology (MP, EP, ESP): shapes."""

QUICK = {
    "slow_inter@200mbit": {"2,2,2": "B", "4,4,1": "A"},
    "slow_inter@50mbit": {"2,2,2": "A"},
    "homogeneous@200mbit": {"2,4,1": "B"},
    "unlimited": {"1,2,2": "A", "4,2,2": "A"},
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer on one network.

    Attributes:
        network: a name in `NETWORKS`.
        sizes: of the groups.
        shape: of the layer.
    """

    network: str
    sizes: MoESizes
    shape: Shape

    @property
    def topology(self) -> str:
        """MP, EP and ESP."""
        return f"{self.sizes.model_parallel},{self.sizes.expert_parallel},{self.sizes.expert_sharding}"

    @property
    def name(self) -> str:
        """All of it, for filters and files."""
        shape = self.shape
        return f"{self.network} {self.topology} S{shape.S} M{shape.M} k{shape.k} f{shape.f:g}"


def cells(grid: dict[str, dict[str, str]], pattern: str = "") -> list[Cell]:
    """Return the cells of a grid whose names hold a match of a regular expression."""
    every = (
        Cell(network, MoESizes(*map(int, topology.split(","))), SHAPES[letter])
        for network, topologies in grid.items()
        for topology, letters in topologies.items()
        for letter in letters
    )
    return [cell for cell in every if re.search(pattern, cell.name)]


def candidates(sizes: MoESizes) -> list[str]:
    """Return the labels of all schedules that differ from each other on groups of these sizes.

    Without expert sharding the hierarchical forms are the fused ones, and `s2` in one chunk is the DeepSpeed order. On
    MP groups of one rank a split after the gate is one before it, and has nothing to merge.
    """
    labels = []
    for name, schedule in SCHEDULES.items():
        baseline = not schedule.can_be_chunked
        if not baseline and sizes.expert_sharding == 1 and schedule.transport == "hierarchical":
            continue
        if not baseline and sizes.model_parallel == 1 and schedule.split == "after":
            continue
        one_part = schedule.overlap == "layer" and not (name == "s2" and sizes.expert_sharding == 1)
        labels += [name] if one_part else []
        labels += [] if baseline else [schedule.with_chunks(chunks).label for chunks in CHUNKS]
    return labels
