"""The groups of ranks are those of the rank map, for every split; sizes that cannot be are refused with what to do."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from lightning_efficient.moe import MoELayer, MoESizes, MoETopology, parallelize, schedule_named
from lightning_efficient.moe.schedule import SCHEDULES
from lightning_efficient.moe.topology import Axis
from tests.moe._grid import splits
from tests.support.ranks import run_ranks

AXES: tuple[Axis, ...] = ("mp", "dp", "ep", "esp", "block", "edp", "world")


@dataclass(slots=True)
class Place:
    """Of one rank in one topology: in each group its position and, as gathered, all members."""

    sizes: MoESizes
    members: dict[str, list[int]]
    positions: dict[str, int]
    mesh: tuple[list[int], tuple[int, ...]]


def _places(rank: int, world: int) -> list[Place]:
    found = []
    for sizes in splits(world)[:: 1 if world == 4 else 2]:
        topology = MoETopology.create(sizes)
        members, positions = {}, {}
        for axis in AXES:
            group = getattr(topology, axis)
            positions[axis] = group.rank
            members[axis] = [rank]
            if group.size > 1:
                members[axis] = dist.get_process_group_ranks(group.process_group)
            assert group.axis == axis
            assert group.size == len(members[axis])
            assert (group.process_group is None) == (group.size == 1)
        assert topology.mesh is not None
        assert topology.mesh.mesh_dim_names == ("edp", "ep", "esp")
        coordinate = topology.mesh.get_coordinate()
        assert coordinate is not None
        found.append(Place(sizes, members, positions, (list(coordinate), tuple(topology.mesh.shape))))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world", [4, 6])
def test_groups_follow_the_rank_map(world: int) -> None:
    ranks = run_ranks(_places, world, timeout=120)
    assert len(ranks[0]) == 18
    for r, found in enumerate(ranks):
        for each in found:
            MP, EP, ESP = each.sizes.model_parallel, each.sizes.expert_parallel, each.sizes.expert_sharding
            Q = EP * ESP
            of = {  # position in the group, and what all members have in common
                "mp": (r % MP, lambda x, MP=MP: x // MP),
                "dp": (r // MP, lambda x, MP=MP: x % MP),
                "esp": (r % ESP, lambda x, ESP=ESP: x // ESP),
                "ep": (r // ESP % EP, lambda x, ESP=ESP, Q=Q: (x % ESP, x // Q)),
                "block": (r % Q, lambda x, Q=Q: x // Q),
                "edp": (r // Q, lambda x, Q=Q: x % Q),
                "world": (r, lambda x: 0),
            }
            for axis, (position, common) in of.items():
                assert each.positions[axis] == position, (each, axis)
                assert each.members[axis] == [x for x in range(world) if common(x) == common(r)], (each, axis)
            assert each.mesh == ([r // Q, r // ESP % EP, r % ESP], (world // Q, EP, ESP))


def test_one_process_has_groups_of_one_rank() -> None:
    topology = MoETopology()
    assert all(getattr(topology, axis).size == 1 for axis in AXES)
    assert topology.mesh is None


@pytest.mark.parametrize("name", ["model_parallel", "expert_parallel", "expert_sharding"])
def test_a_size_is_at_least_1(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}_size is 0: .* Set it to 1 or more"):
        MoESizes(**{name: 0})


def test_sizes_must_fill_the_world() -> None:
    with pytest.raises(ValueError, match=r"model_parallel_size=4 does not divide the 6 ranks.*Choose a divisor"):
        MoESizes(4).check_world(6)
    with pytest.raises(ValueError, match=r"expert_parallel_size=2 x expert_sharding_size=2 = 4 does not divide the 6"):
        MoESizes(1, 2, 2).check_world(6)
    MoESizes(3, 2, 3).check_world(6)


def test_sizes_must_divide_the_experts() -> None:
    with pytest.raises(ValueError, match=r"6 experts, not divisible by expert_parallel_size=4: .* Change the number"):
        MoESizes(1, 4, 1).check_experts(6, 8)
    with pytest.raises(ValueError, match=r"hidden size 100, not divisible by expert_sharding_size=8: .* Change the"):
        MoESizes(1, 1, 8).check_experts(8, 100)


def test_a_layer_that_cannot_be_spread_is_named_and_left_as_it_was() -> None:
    model = torch.nn.Sequential(MoELayer(4, 8, 8), MoELayer(4, 8, 6))
    before = {name: id(each) for name, each in model.named_parameters()}
    with pytest.raises(ValueError, match=r"MoE layer '1' has 6 experts"):
        parallelize(model, MoETopology(MoESizes(1, 4, 1)))
    assert before == {name: id(each) for name, each in model.named_parameters()}


def test_a_schedule_goes_by_its_name_and_chunks() -> None:
    for name, schedule in SCHEDULES.items():
        assert schedule_named(name) is schedule
        assert schedule.label == name
    assert schedule_named("s1_hier/4") == SCHEDULES["s1_hier"].with_chunks(4)
    assert schedule_named("s1_hier/4").label == "s1_hier/4"
    assert schedule_named("paper/1").chunks == 1
    assert {name for name, each in SCHEDULES.items() if each.drops_by_slice} == {
        "s1",
        "s1_hier",
        "s1_packed",
        "s1_hier_packed",
    }


@pytest.mark.parametrize("label", ["s1_fused", "", "s1/x", "s1/-1", "s1/2/3", "S1"])
def test_an_unknown_schedule_is_refused_with_the_names(label: str) -> None:
    with pytest.raises(ValueError, match=r"There is no schedule .*choose one of paper, deepspeed, s1, s2, s2_saa"):
        schedule_named(label)


@pytest.mark.parametrize("name", ["paper", "deepspeed"])
def test_baselines_run_in_one_part(name: str) -> None:
    with pytest.raises(ValueError, match=f"chunks=2 with schedule '{name}'.*Set chunks to 1, or choose one of s1, s2"):
        schedule_named(f"{name}/2")
    with pytest.raises(ValueError, match="chunks is 0"):
        SCHEDULES["s1"].with_chunks(0)
