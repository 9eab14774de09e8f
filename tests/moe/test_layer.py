"""`MoELayer`: what it promises beside equivalence: edges, noise, what is dropped, and errors that all ranks raise."""

import copy
import math
import os
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.moe import (
    SCHEDULES,
    Capacity,
    FixedSchedule,
    MoELayer,
    MoESizes,
    MoETopology,
    Router,
    aux_loss,
    moe_layers,
    parallelize,
    schedule_named,
)
from lightning_efficient.moe.experts import local
from tests.moe._grid import Setting, compare, expected
from tests.support.collectives import count_collectives
from tests.support.ranks import rank_outcomes, run_ranks

EDGES = [
    Setting(2, "dropless", "swiglu", S=1),
    Setting(1, "position", "gelu", bias=True, S=1),
    Setting(3, "probs", "swiglu", S=3),
    # All rows go to the first rank of an EP group; the others compute nothing.
    Setting(2, "dropless", "swiglu", bias=True, S=6, skewed=True),
    Setting(1, "position", "swiglu", S=7, skewed=True),
    Setting(1, "even", "gelu", bias=True, S=5, skewed=True),
]
LABELS = ["paper", "deepspeed", "s1/2", "s2", "s2_saa/4", "s1_hier/3", "s2_hier_packed/2"]


@pytest.mark.distributed
def test_few_tokens_and_experts_without_any_equal_the_definition() -> None:
    """One token on four ranks, fewer than a rank each, all to one expert: zero gradients, not None; no NaN."""
    sizes = [MoESizes(4, 4, 1), MoESizes(4, 2, 2), MoESizes(2, 1, 4)]
    cases = [(each, setting, LABELS) for each in sizes for setting in EDGES]
    ranks = run_ranks(compare, 4, cases, expected(EDGES, 4, [2, 4]), timeout=150)
    for found in ranks:
        assert len(found) == len(sizes) * len(EDGES) * len(LABELS)
        for each in found:
            assert each.worst < 1e-9, (each.case, each.apart)


# ---- one process ---------------------------------------------------------------------------------------------------


def layer_of(**options: Any) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(4, 8, 8, **options).double()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [1, 3])
def test_the_order_of_tokens_does_not_matter_where_nothing_is_dropped(k: int) -> None:
    layer, x_SM = layer_of(top_k=k, capacity_factor=None), tokens(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x_SM[order]), layer(x_SM)[order], rtol=0, atol=1e-14)


def test_any_leading_dimensions_are_tokens() -> None:
    layer = layer_of(capacity_factor=None)
    x = tokens(2, 3, 5)
    assert torch.equal(layer(x).flatten(0, 2), layer(x.flatten(0, 2)))
    assert torch.equal(layer(x[0, 0, 0]), layer(x[0, 0, :1])[0])
    assert torch.equal(layer(x.transpose(0, 1)).transpose(0, 1), layer(x))


def test_a_token_that_found_no_slot_gets_zeros() -> None:
    layer = layer_of(top_k=1, capacity_factor=1.0, min_capacity=1)
    nn.init.zeros_(layer.router.weight)  # all to the first expert, which has one slot for 8 tokens
    y_SM = layer(tokens(8))
    assert y_SM[0].any()
    assert not y_SM[1:].any()
    assert layer.stats is not None
    assert (int(layer.stats.dropped), layer.stats.assignments) == (7, 8)


def test_wrong_size_of_tokens_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Tokens have size 5, and the layer was made for dim=4.*Change the layer's dim"
    ):
        layer_of()(torch.zeros(2, 5, dtype=torch.float64))


def test_auxiliary_losses_of_a_model_are_added_up() -> None:
    model = nn.Sequential(layer_of(), nn.Linear(4, 4).double(), layer_of(z_loss_coef=0.1))
    with pytest.raises(ValueError, match=r"No MoE layer of Sequential has run yet.*Call the model first"):
        aux_loss(model)
    model(tokens(5))
    each = [layer.aux_loss for _, layer in moe_layers(model)]
    assert [name for name, _ in moe_layers(model)] == ["0", "2"]
    torch.testing.assert_close(aux_loss(model), each[0] + each[1])  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"Linear has no MoE layer.*Remove the call, or add a MoELayer"):
        aux_loss(nn.Linear(2, 2))


def test_layers_that_did_not_run_since_backward_are_left_out() -> None:
    first, second = layer_of(), layer_of()
    model = nn.ModuleList([first, second])
    (second(first(tokens(5))).sum() + aux_loss(model)).backward()
    told = aux_loss(model)  # to be logged: of both, and without a graph
    torch.testing.assert_close(told, first.aux_loss + second.aux_loss)  # type: ignore[operator]
    assert not told.requires_grad
    # Now the second is dropped.
    (first(tokens(5)).sum() + (alone := aux_loss(model))).backward()
    torch.testing.assert_close(alone, first.aux_loss)  # type: ignore[arg-type]


def test_a_later_forward_is_not_taken_for_one_that_backward_has_used() -> None:
    layer = layer_of()
    earlier = layer(tokens(5)).sum() + aux_loss(layer)
    later = layer(tokens(6)).sum()
    earlier.backward()
    assert aux_loss(layer).requires_grad
    (later + aux_loss(layer)).backward()


class Block(nn.Module):
    """An operation that saves a tensor follows the layer: recomputation comes past its end."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = layer_of(jitter=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x).exp()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_graph_is_kept_after_backward(checkpointed: bool) -> None:
    model = nn.Sequential(Block(), Block())
    x = tokens(5).requires_grad_()
    for block in model:
        x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    (x.sum() + aux_loss(model)).backward()
    for _, layer in moe_layers(model):
        assert layer.aux_loss is not None
        assert layer.aux_loss.grad_fn is None


def test_a_layer_that_has_run_can_be_copied() -> None:
    layer, x = layer_of(), tokens(5)
    y = layer(x)
    other = copy.deepcopy(layer)
    assert other.aux_loss is None
    assert layer.aux_loss is not None
    assert torch.equal(other(x), y)


def kept_by(routings: list[tuple[Tensor, Tensor]], T: int) -> set[tuple[int, int]]:
    """(token, expert) of the assignments with a slot."""
    pairs, begin = set(), 0
    for experts, positions in routings:
        for s, row in enumerate((positions < T).tolist()):
            pairs.update((begin + s, int(experts[s, j])) for j, kept in enumerate(row) if kept)
        begin += len(experts)
    return pairs


@pytest.mark.parametrize(("factor", "least", "most"), [(1.0, 0.06, 0.12), (1.25, 0.003, 0.036), (2.0, 0.0, 0.0)])
def test_s1_drops_other_tokens_than_s2_by_the_shares_of_the_documentation(
    factor: float, least: float, most: float
) -> None:
    """S = 2048, E = 16, k = 2: assignments whose fate differs from that of the gate over the whole batch."""
    S, E, k = 2048, 16, 2
    torch.manual_seed(0)
    router, x_SM = Router(32, E, k, capacity=Capacity(factor, minimum=1)), torch.randn(S, 32)
    whole = router(x_SM)
    for slices in (2, 4, 8):
        parts = [router(part) for part in x_SM.chunk(slices)]
        assert all(each.capacity == math.ceil(k * factor * S / slices / E) for each in parts)
        mine = kept_by([(each.expert_Sk, each.position_Sk) for each in parts], parts[0].capacity or 0)
        other = kept_by([(whole.expert_Sk, whole.position_Sk)], whole.capacity or 0)
        assert least <= len(mine ^ other) / (S * k) <= most


# ---- noise ---------------------------------------------------------------------------------------------------------


def _jitter(rank: int, world: int) -> dict[str, Any]:
    topology = MoETopology.create(MoESizes(2, 2, 1))
    layer = layer_of(capacity_factor=None, jitter=0.5)
    parallelize(layer, topology)
    found: dict[str, Any] = {}
    for label in ("s1", "s2", "s1_hier/2", "s2_saa/2", "deepspeed"):
        layer.scheduler = FixedSchedule(schedule_named(label))
        torch.manual_seed(7)
        x = tokens(6).requires_grad_()
        y = layer(x)
        y.sum().backward()
        found[label] = (y.detach(), x.grad)
        layer.zero_grad()
        torch.manual_seed(7)
        again = tokens(6).requires_grad_()
        checkpointed = checkpoint(layer, again, use_reentrant=False)
        checkpointed.sum().backward()
        found[f"{label} checkpointed"] = (checkpointed.detach(), again.grad)
        layer.zero_grad()
        torch.manual_seed(7)
        found[f"{label} next"] = (layer(x), layer(x))
    layer.eval()
    found["quiet"] = layer(tokens(6)).detach()
    return found


@pytest.mark.distributed
def test_noise_is_one_on_an_mp_group_and_one_for_all_schedules_and_other_elsewhere() -> None:
    ranks = run_ranks(_jitter, 4, timeout=120)
    for found in ranks:
        for label in ("s1", "s2", "s1_hier/2", "s2_saa/2", "deepspeed"):
            for mine, other in zip(found[label], found["s2"], strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)  # nothing is dropped
            for mine, other in zip(found[label], found[f"{label} checkpointed"], strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
            first, second = found[f"{label} next"]
            assert not torch.allclose(first, second)
        assert not torch.allclose(found["s2"][0], found["quiet"])
    for label in ("s1", "s2"):
        outputs = [found[label][0] for found in ranks]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[2], outputs[3])
        assert not torch.allclose(outputs[0], outputs[2])  # same tokens, and another DP rank


def _jitter_with_paper(rank: int, world: int) -> str:
    layer = layer_of(jitter=0.1)
    parallelize(layer, MoETopology.create(MoESizes(1, 1, 2)), scheduler=FixedSchedule(SCHEDULES["paper"]))
    with pytest.raises(ValueError, match="jitter with schedule 'paper'") as caught:
        layer(tokens(4))
    layer.eval()(tokens(4))
    return str(caught.value)


@pytest.mark.distributed
def test_the_papers_baseline_refuses_noise_that_it_does_not_know() -> None:
    assert all("Set jitter to 0" in each for each in run_ranks(_jitter_with_paper, 2, timeout=120))


# ---- errors on all ranks -------------------------------------------------------------------------------------------


def _unequal(rank: int, world: int, what: str) -> tuple[str, list[str], float]:
    model = nn.Sequential(layer_of(), layer_of())
    parallelize(model, MoETopology.create(MoESizes(2, 2, 1)), verify_inputs=what != "counts")
    x = tokens(6)
    if what == "counts":
        x = x[: 5 if rank == 3 else 6]
    elif what == "NaN":
        x = x.clone().index_fill(0, torch.tensor([2]), math.nan) if rank == 1 else x
    elif rank == 1:
        x = x + 0.1
    with count_collectives() as seen, pytest.raises(ValueError, match="MoE layer '0'") as caught:
        model(x)
    dist.barrier()  # all are here: none waits within the layer
    return str(caught.value), [each.op for each in seen], float(x.sum())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("counts", r"MoE layer '0' got 5 tokens on one rank and 6 on another: .* set drop_last=True"),
        ("values", r"The tokens of MoE layer '0' differ across an MP group \(checksums by .* Feed the same batch"),
        ("NaN", r"The tokens of MoE layer '0' differ across an MP group \(checksums by .* Feed the same batch"),
    ],
)
def test_all_ranks_raise_the_same_error_before_a_row_is_sent(what: str, message: str) -> None:
    ranks = run_ranks(_unequal, 4, what, timeout=120)
    assert len({error for error, *_ in ranks}) == 1
    for error, issued, _ in ranks:
        assert re.match(message, error)
        assert set(issued) == {"all_reduce"}
        assert len(issued) <= 3


def _equal_tokens_pass(rank: int, world: int) -> int:
    layer = layer_of(capacity_factor=None)
    topology = MoETopology.create(MoESizes(2, 2, 1))
    parallelize(layer, topology, verify_inputs=True)
    return len(layer(tokens(6) * (1 + topology.dp.rank)))


@pytest.mark.distributed
def test_tokens_that_are_equal_on_an_mp_group_only_pass_the_check() -> None:
    assert run_ranks(_equal_tokens_pass, 4, timeout=120) == [6] * 4


def _spread_and_copied(rank: int, world: int) -> dict[str, Any]:
    topology = MoETopology.create(MoESizes(2, 2, 1))
    torch.manual_seed(rank)  # ranks that draw other weights get those of the first
    layer = MoELayer(4, 8, 8, bias=True)
    parallelize(layer, topology)
    expert = float(local(layer.experts.w_in.detach()).sum())
    y = layer(tokens(6).float())
    with torch.no_grad():
        copied = copy.deepcopy(layer)(tokens(6).float())
    with pytest.raises(ValueError, match=r"was spread over ranks by .* Build the module anew") as caught:
        parallelize(layer, MoETopology.create(MoESizes(1, 4, 1)))
    return {"expert": expert, "same": torch.equal(y, copied), "error": str(caught.value)}


@pytest.mark.distributed
def test_a_spread_layer_can_be_copied_and_not_be_spread_otherwise() -> None:
    ranks = run_ranks(_spread_and_copied, 4, timeout=120)
    assert all(each["same"] for each in ranks)
    assert ranks[0]["expert"] == ranks[2]["expert"] != ranks[1]["expert"]


def _die(rank: int, world: int, label: str) -> None:
    layer = layer_of(capacity_factor=None)
    parallelize(layer, MoETopology.create(MoESizes(2, 2, 2)), scheduler=FixedSchedule(schedule_named(label)))
    for step in range(100):
        if step == 3 and rank == 2:
            os._exit(7)
        (layer(tokens(6)).sum() + layer.aux_loss).backward()


@pytest.mark.distributed
@pytest.mark.parametrize("label", ["s1_hier/2", "s2_saa/2"])
def test_a_rank_that_dies_ends_the_others(label: str) -> None:
    outcomes = rank_outcomes(_die, 4, label, timeout=60)
    assert (outcomes[2].status, outcomes[2].exitcode) == ("died", 7)
    for each in outcomes[:2] + outcomes[3:]:
        assert each.status in ("raised", "died"), each
        assert each.seconds < 55
