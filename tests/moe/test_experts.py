"""The experts: padded and ragged rows against plain loops; shards add up, and are alike however they are cut."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.moe import Experts, MoESizes, MoETopology
from lightning_efficient.moe.experts import Activation, ExpertWeights, local
from tests.moe._grid import own_part, splits
from tests.support.ranks import run_ranks

E, M, H = 4, 6, 8


def experts_of(activation: Activation, *, bias: bool) -> Experts:
    torch.manual_seed(0)
    experts = Experts(E, M, H, activation=activation, bias=bias).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def by_definition(experts: Experts, e: int, x_M: Tensor) -> Tensor:
    gate_H, *rest = torch.einsum("m,mgh->gh", x_M, experts.w_in[e]) + (0 if experts.b_in is None else experts.b_in[e])
    h_H = F.silu(gate_H) * rest[0] if rest else {"gelu": F.gelu, "relu": F.relu}[experts.activation](gate_H)
    return h_H @ experts.w_out[e] + (0 if experts.b_out is None else experts.b_out[e])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_padded_and_ragged_rows_are_computed_by_the_definition(activation: Activation, bias: bool) -> None:
    experts = experts_of(activation, bias=bias)
    weights = experts.weights(torch.float64)
    x_ERM = torch.randn(E, 3, M, dtype=torch.float64)
    expected = torch.stack([torch.stack([by_definition(experts, e, row) for row in x_ERM[e]]) for e in range(E)])
    torch.testing.assert_close(experts(x_ERM, weights), expected)
    counts = [3, 0, 1, 2]
    rows = torch.cat([x_ERM[e, :n] for e, n in enumerate(counts)])
    ragged = torch.cat([expected[e, :n] for e, n in enumerate(counts)])
    torch.testing.assert_close(experts(rows, weights, counts), ragged)


@pytest.mark.parametrize("counts", [[0, 5, 0, 0], [0, 0, 0, 0]])
def test_experts_without_a_row_get_a_gradient_of_zero_and_not_none(counts: list[int]) -> None:
    experts = experts_of("swiglu", bias=True)
    x_NM = torch.randn(sum(counts), M, dtype=torch.float64, requires_grad=True)
    experts(x_NM, experts.weights(torch.float64), counts).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        for e, n in enumerate(counts):
            assert bool(parameter.grad[e].any()) == (n > 0)


def test_weights_are_cast_to_the_rows_and_gradients_back() -> None:
    experts = Experts(E, M, H)
    weights = experts.weights(torch.bfloat16)
    y = experts(torch.randn(E, 3, M, dtype=torch.bfloat16), weights)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert experts.w_in.grad is not None
    assert experts.w_in.grad.dtype is torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"dim": 0}, "dim is 0"),
        ({"hidden": -1}, "hidden is -1"),
        ({"activation": "tanh"}, "no activation 'tanh': choose 'swiglu', 'gelu' or 'relu'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(**{"num_experts": 4, "dim": 4, "hidden": 4, **options})


def test_first_weights_are_those_of_linear_maps_and_differ_between_experts() -> None:
    torch.manual_seed(0)
    experts = Experts(8, 64, 32, bias=True)
    for weight, fan_in in ((experts.w_in, 64), (experts.w_out, 32)):
        bound = fan_in**-0.5
        assert float(weight.detach().abs().max()) <= bound
        # a uniform distribution's: 2 % is some 5 sigma of 8 * 64 * 32 draws or more
        assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
        flat = weight.detach().flatten(1)
        assert float((flat @ flat.T / flat.square().sum(1)).fill_diagonal_(0).abs().max()) < 0.2
    assert not experts.b_in.any()  # type: ignore[union-attr]
    assert not experts.b_out.any()  # type: ignore[union-attr]


def _shards(rank: int, world: int) -> list[dict[str, Any]]:
    found = []
    for sizes in splits(world):
        topology = MoETopology.create(sizes)
        torch.manual_seed(4)
        whole = Experts(E, M, H, bias=True)
        values = {name: each.detach().clone() for name, each in whole.named_parameters()}
        torch.manual_seed(4)
        spread = Experts(E, M, H, bias=True)
        spread.shard(topology)
        kept = {
            name: torch.equal(local(each), own_part(values[name], name, topology))
            for name, each in spread.named_parameters()
        }
        torch.manual_seed(4)
        spread.reset_parameters()
        drawn = {
            name: torch.equal(local(each), own_part(values[name], name, topology))
            for name, each in spread.named_parameters()
        }
        full = {name: torch.equal(each.full_tensor(), values[name]) for name, each in spread.named_parameters()}  # type: ignore[attr-defined]
        with torch.device("meta"):
            empty = Experts(E, M, H, bias=True)
        empty.shard(topology)
        empty.to_empty(device="cpu")
        torch.manual_seed(4)
        empty.reset_parameters()
        late = {
            name: torch.equal(local(each), own_part(values[name], name, topology))
            for name, each in empty.named_parameters()
        }
        found.append({"sizes": sizes, "kept": kept, "drawn": drawn, "full": full, "late": late})
    return found


@pytest.mark.distributed
def test_a_shard_is_the_same_however_and_whenever_the_experts_are_spread() -> None:
    for found in run_ranks(_shards, 4, timeout=120):
        assert len(found) == 18
        for each in found:
            for when in ("kept", "drawn", "full", "late"):
                assert each[when] == dict.fromkeys(("w_in", "w_out", "b_in", "b_out"), True), each


def test_partial_sums_of_shards_add_up() -> None:
    experts = experts_of("swiglu", bias=True)
    whole = experts.weights(torch.float64)
    x_ERM = torch.randn(E, 3, M, dtype=torch.float64)
    parts = []
    for esp in range(2):
        hidden = slice(esp * H // 2, (esp + 1) * H // 2)
        assert experts.b_in is not None
        assert whole.bias_out_EM is not None
        part = ExpertWeights(
            experts.w_in[..., hidden].flatten(2),
            experts.w_out[:, hidden],
            experts.b_in[..., hidden].flatten(1),
            whole.bias_out_EM if esp == 0 else torch.zeros_like(whole.bias_out_EM),
        )
        parts.append(experts(x_ERM, part))
    torch.testing.assert_close(parts[0] + parts[1], experts(x_ERM, whole))


def test_experts_that_cannot_be_spread_are_refused() -> None:
    with pytest.raises(ValueError, match="4 experts, not divisible by expert_parallel_size=3"):
        Experts(4, 4, 4).shard(MoETopology(MoESizes(1, 3, 1)))
