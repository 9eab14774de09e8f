"""Each gradient rule, broken on purpose: the comparison with the definition must see it, and only where it should."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.moe import Experts, GradientSync, MoESizes, MoETopology, collectives, grad_sync, pipeline
from lightning_efficient.moe.collectives import Collective
from lightning_efficient.moe.experts import local
from lightning_efficient.moe.layer import moe_layers
from lightning_efficient.moe.topology import Group
from tests.moe._grid import Case, Compared, Expected, Setting, compare, expected
from tests.support.ranks import run_ranks

EXACT = 1e-9


@dataclass(frozen=True, slots=True)
class Mutation:
    """A rule that is broken.

    Attributes:
        apply: breaks it, on this rank.
        case: in which it matters.
        wrong: the tensors that must differ from the definition; all others must not.
        precision: in which to run.
    """

    apply: Callable[[], AbstractContextManager[Any]]
    case: Case
    wrong: set[str]
    precision: Literal["float64", "bfloat16"] = "float64"


def with_backward(name: str, backward: collectives.Raw) -> AbstractContextManager[Any]:
    return patch.object(collectives, name, Collective(getattr(collectives, name).forward, backward))


def own_part_only(x: Tensor, group: Group, asynchronous: bool) -> tuple[Tensor, Any]:
    """Not an all-gather: what others hold counts as 0."""
    parts = [x if rank == group.rank else torch.zeros_like(x) for rank in range(group.size)]
    return torch.cat(parts), None


def losses_of_the_slice() -> AbstractContextManager[Any]:
    def alone(x: Tensor, group: Group, asynchronous: bool) -> tuple[Tensor, Any]:
        return x * group.size, None

    return patch.object(collectives, "sum_shares", Collective(alone, collectives.sum_shares.backward))


def synced_over(**axes: str) -> AbstractContextManager[Any]:
    """Gradients of `router` or `experts` summed over another group."""

    def groups(module: nn.Module, topology: MoETopology) -> Iterable[tuple[nn.Parameter, Group]]:
        for _, layer in moe_layers(module):
            for part, usual in ((layer.experts, "edp"), (layer.router, "world")):
                group = getattr(topology, axes.get(type(part).__name__.lower(), usual))
                yield from ((parameter, group) for parameter in part.parameters())

    return patch.object(grad_sync, "_groups", groups)


def experts_divided_by_edp() -> AbstractContextManager[Any]:
    finish = GradientSync.finish

    def wrong(self: GradientSync) -> None:
        finish(self)
        for bucket in self.buckets:
            for parameter in bucket.parameters if bucket.group.axis == "edp" else ():
                assert parameter.grad is not None
                local(parameter.grad).mul_(self.topology.dp.size / self.topology.edp.size)

    return patch.object(GradientSync, "finish", wrong)


def bias_on_every_shard() -> AbstractContextManager[Any]:
    shard = Experts.shard

    def wrong(self: Experts, topology: MoETopology) -> None:
        shard(self, topology)
        self._counts_output_bias = True

    return patch.object(Experts, "shard", wrong)


def whole_gradient_each() -> AbstractContextManager[Any]:
    return patch.object(pipeline, "_share_of_gradient", lambda weight, ranks: weight)


PLAIN = Setting(2, "even", "swiglu", S=8)
BIASED = Setting(2, "position", "gelu", bias=True, S=8)
WEIGHTS = {"d w_in", "d w_out"}
EVERYTHING = {"dx", "d router", *WEIGHTS}

MUTATIONS = {
    "merge sums gradients": Mutation(
        lambda: with_backward("merge", collectives._raw_reduce_scatter),
        (MoESizes(2, 2, 2), PLAIN, "s1"),
        EVERYTHING,
    ),
    "merge sums gradients, in bfloat16": Mutation(
        lambda: with_backward("merge", collectives._raw_reduce_scatter),
        (MoESizes(2, 2, 2), PLAIN, "s1"),
        EVERYTHING,
        "bfloat16",
    ),
    "merge of slots sums gradients": Mutation(
        lambda: with_backward("merge", collectives._raw_reduce_scatter),
        (MoESizes(2, 4, 1), PLAIN, "s2_saa/2"),
        {"dx", *WEIGHTS},
    ),
    "split keeps the own gradient": Mutation(
        lambda: with_backward("split", own_part_only), (MoESizes(2, 2, 2), PLAIN, "s1_hier/2"), {"dx"}
    ),
    "gather slices gradients": Mutation(
        lambda: with_backward("gather", collectives._raw_slice), (MoESizes(1, 2, 2), PLAIN, "s1_hier"), {"dx"}
    ),
    "shards of the baseline keep their gradient": Mutation(
        lambda: with_backward("replicated", collectives._raw_identity), (MoESizes(2, 2, 2), PLAIN, "deepspeed"), {"dx"}
    ),
    "sum of the paper's baseline is taken as replicated": Mutation(
        lambda: with_backward("all_reduce", collectives._raw_identity),
        (MoESizes(1, 2, 2), PLAIN, "paper"),
        {"dx", *WEIGHTS},
    ),
    "router by the dense rule": Mutation(
        lambda: synced_over(router="dp"), (MoESizes(2, 2, 2), PLAIN, "s1"), {"d router"}
    ),
    "router's whole gradients summed over MP": Mutation(
        whole_gradient_each, (MoESizes(2, 2, 2), PLAIN, "s2"), {"d router"}
    ),
    "duplicates of the paper's baseline counted": Mutation(
        whole_gradient_each, (MoESizes(2, 2, 2), PLAIN, "paper"), {"d router", *WEIGHTS}
    ),
    "experts divided by EDP": Mutation(experts_divided_by_edp, (MoESizes(1, 2, 1), PLAIN, "s1"), WEIGHTS),
    "experts summed over the dense group": Mutation(
        lambda: synced_over(experts="dp"), (MoESizes(1, 2, 2), PLAIN, "s1_hier"), WEIGHTS
    ),
    "output bias counted by each shard": Mutation(
        bias_on_every_shard, (MoESizes(1, 1, 4), BIASED, "s1"), {"y", "dx", "d router"}
    ),
    "losses of the own slice": Mutation(
        losses_of_the_slice, (MoESizes(2, 2, 1), PLAIN, "s1_hier"), {"aux", "balance", "z", "dx", "d router"}
    ),
}

TOLERANCE = {"float64": EXACT, "bfloat16": 4e-2}
"""Of the largest element; as in `test_equivalence.py`."""


def _broken_and_whole(rank: int, world: int, known: Expected) -> dict[tuple[str, bool], Compared]:
    found = {}
    for name, each in MUTATIONS.items():
        sizes, setting, label = each.case
        for broken in (False, True):
            with each.apply() if broken else nullcontext():
                (found[name, broken],) = compare(rank, world, [(sizes, setting, [label])], known, each.precision)
    return found


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, bool], dict[str, float]]:
    """By mutation, and whether it was applied: how far each tensor is from the definition, on the worst rank."""
    known = expected([PLAIN, BIASED], 4, [1, 2])
    ranks = run_ranks(_broken_and_whole, 4, known, timeout=120)
    return {
        case: {name: max(rank[case].relative[name] for rank in ranks) for name in compared.relative}
        for case, compared in ranks[0].items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_comparison_sees_a_broken_rule(mutation: str, found: dict[tuple[str, bool], dict[str, float]]) -> None:
    tolerance = TOLERANCE[MUTATIONS[mutation].precision]
    assert max(found[mutation, False].values()) < tolerance
    wrong = {name for name, apart in found[mutation, True].items() if apart > 2 * tolerance}
    assert wrong == MUTATIONS[mutation].wrong
