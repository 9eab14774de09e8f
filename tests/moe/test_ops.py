"""The gate and the moves of rows beside loops over tokens, in float64; their gradients; what was dropped, and ties."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from lightning_efficient.moe.ops import GateOutput, gate, invert, permute, unpermute

SIZES = st.tuples(st.integers(0, 9), st.integers(1, 20), st.integers(1, 4))
SEEDS = st.integers(0, 2**31)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype).requires_grad_(grad)


def slots(S: int, N: int, k: int, seed: int = 0) -> Tensor:
    """Distinct slots, or none: about a third of the assignments is dropped, in both ways to say so."""
    generator = rng(seed)
    free = torch.randperm(N, generator=generator).tolist()
    slot_Sk = torch.randint(0, 6, (S, k), generator=generator)
    for s in range(S):
        for j in range(k):
            kind = int(slot_Sk[s, j])
            slot_Sk[s, j] = -1 - s if kind == 0 else N + s if kind == 1 or not free else free.pop()
    return slot_Sk


def naive_gate(logits_SE: Tensor, k: int, bias_E: Tensor | None) -> list[Any]:
    """The probabilities, ids, places and counts by loops."""
    S, E = logits_SE.shape
    probs, ids = [], []
    for row in logits_SE.tolist():
        probs.append(softmax(row))
        score = row
        if bias_E is not None:
            score = [p + b for p, b in zip(probs[-1], bias_E.tolist(), strict=True)]
        ids.append(sorted(range(E), key=lambda e: (-score[e], e))[:k])
    counts, places = [0] * E, [[0] * k for _ in range(S)]
    for j in range(k):
        for s in range(S):
            places[s][j] = counts[ids[s][j]]
            counts[ids[s][j]] += 1
    return [probs, ids, places, counts]


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def as_rows(x: list[Any], S: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor(x, dtype=dtype).view(S, width)


@settings(deadline=None)
@given(st.integers(0, 12), st.integers(1, 20), st.data(), SEEDS)
def test_the_gate_is_a_loop_over_tokens(S: int, E: int, data: Any, seed: int) -> None:
    k = data.draw(st.integers(1, E))
    # Few values, so that ties are many; with a bias there are none, as rounding may part equal probabilities.
    logits = torch.randint(-2, 3, (S, E), generator=rng(seed), dtype=torch.float64)
    bias = data.draw(st.sampled_from([None, 0.3 * normal(E, seed=seed + 2)]))
    out = gate(logits, k, bias)
    probs, ids, places, counts = naive_gate(logits, k, bias)
    torch.testing.assert_close(out.probs_SE, as_rows(probs, S, E, torch.float64), rtol=1e-13, atol=0)
    assert torch.equal(out.expert_Sk, as_rows(ids, S, k, torch.int64))
    assert torch.equal(out.position_Sk, as_rows(places, S, k, torch.int64))
    assert out.counts_E.tolist() == counts
    assert torch.equal(out.chosen_Sk, out.probs_SE.gather(1, out.expert_Sk))


def test_second_choices_queue_behind_all_first_choices() -> None:
    logits = torch.tensor([[3.0, 2, 0], [2, 3, 0], [3, 2, 0]])
    out = gate(logits, 2)
    assert out.expert_Sk.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert out.position_Sk.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert out.counts_E.tolist() == [3, 3, 0]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("value", [0.0, -math.inf])
def test_of_equal_logits_the_lower_ids_are_chosen(k: int, value: float) -> None:
    logits = torch.full((40, 5), value)
    logits[:, 3] = 1
    assert gate(logits, k).expert_Sk.tolist() == [[3, 0, 1, 2, 4][:k]] * 40


@pytest.mark.parametrize("E", [8, 64])
def test_an_expert_is_chosen_once_whatever_the_logits_hold(E: int) -> None:
    logits = normal(50, E, dtype=torch.float32)
    logits[logits > 1.0], logits[logits < -1.0] = math.nan, math.inf
    expert = gate(logits, E).expert_Sk
    assert torch.equal(expert.sort(1).values, torch.arange(E).expand(50, E))


def test_a_bias_changes_the_choice_and_nothing_else() -> None:
    logits = normal(30, 6, grad=True)
    bias = normal(6, seed=1)
    plain, changed = gate(logits, 2), gate(logits, 2, bias)
    assert not torch.equal(plain.expert_Sk, changed.expert_Sk)
    assert torch.equal(plain.probs_SE, changed.probs_SE)
    (mine,) = torch.autograd.grad(changed.chosen_Sk.square().sum(), logits)
    (torchs,) = torch.autograd.grad(logits.softmax(1).gather(1, changed.expert_Sk).square().sum(), logits)
    torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["probs", "chosen", "both"])
@pytest.mark.parametrize("E", [5, 20])
def test_gradients_of_the_gate(which: tuple[int, ...], E: int) -> None:
    assert gradcheck(lambda logits: tuple(gate(logits, 3)[i] for i in which), normal(7, E, grad=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_with_in_float32(dtype: torch.dtype) -> None:
    logits = normal(20, 8, dtype=dtype, grad=True)
    out = gate(logits, 2)
    wide = gate(logits.detach().float(), 2)
    assert all(torch.equal(mine, expected) for mine, expected in zip(out, wide, strict=True))
    assert out.probs_SE.dtype == torch.float32
    out.probs_SE.square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize(
    ("shape", "k", "message"),
    [((4, 3), 4, "k is 4, with 3 experts"), ((4, 3), 0, "k is 0"), ((2, 4, 3), 1, r"shape \(2, 4, 3\)")],
)
def test_what_a_gate_cannot_choose_from_is_said(shape: tuple[int, ...], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(torch.zeros(shape), k)


@settings(deadline=None)
@given(SIZES, SEEDS)
def test_invert_says_which_assignment_is_in_each_slot(sizes: tuple[int, int, int], seed: int) -> None:
    S, N, k = sizes
    slot = slots(S, N, k, seed)
    expected = [-1] * N
    for s in range(S):
        for j in range(k):
            if 0 <= slot[s, j] < N:
                expected[int(slot[s, j])] = s * k + j
    assert invert(slot, N).tolist() == expected


@settings(deadline=None)
@given(SIZES, SEEDS)
def test_moves_are_loops_over_assignments(sizes: tuple[int, int, int], seed: int) -> None:
    S, N, k = sizes
    slot = slots(S, N, k, seed)
    source = invert(slot, N)
    x, h, weight = normal(S, 3, seed=1), normal(N, 3, seed=2), normal(S, k, seed=3)
    h[source < 0], weight[(slot < 0) | (slot >= N)] = math.nan, math.nan  # nobody may read these
    moved, y = torch.zeros(N, 3, dtype=torch.float64), torch.zeros(S, 3, dtype=torch.float64)
    dh, dx, dw = torch.zeros_like(moved), torch.zeros_like(y), torch.zeros(S, k, dtype=torch.float64)
    dy, dmoved = normal(S, 3, seed=4), normal(N, 3, seed=5)
    for s in range(S):
        for j in range(k):
            n = int(slot[s, j])
            if 0 <= n < N:
                moved[n] = x[s]
                dx[s] += dmoved[n]
                y[s] += weight[s, j] * h[n]
                dh[n] = weight[s, j] * dy[s]
                dw[s, j] = dy[s] @ h[n]

    x, h, weight = (each.requires_grad_() for each in (x, h, weight))
    ours = permute(x, slot, source)
    assert torch.equal(ours, moved)
    sums = unpermute(h, weight, slot, source)
    torch.testing.assert_close(sums, y, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(ours, x, dmoved)[0], dx, rtol=1e-12, atol=1e-14)
    for mine, expected in zip(torch.autograd.grad(sums, (h, weight), dy), (dh, dw), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gradients_of_a_whole_layer(k: int) -> None:
    T, E = 3, 4

    def layer(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        out = gate(logits, k)
        slot = torch.where(out.position_Sk < T, out.expert_Sk * T + out.position_Sk, E * T)
        assert k == 1 or bool((slot == E * T).any())
        source = invert(slot, E * T)
        return unpermute(permute(x, slot, source).sin(), out.chosen_Sk, slot, source), out.probs_SE

    assert gradcheck(layer, (normal(8, 5, grad=True), normal(8, E, seed=1, grad=True)))


@pytest.mark.parametrize("wanted", [0, 1], ids=["rows", "weights"])
def test_only_what_is_wanted_has_a_gradient(wanted: int) -> None:
    slot = slots(6, 10, 2)
    tensors = [normal(10, 3), normal(6, 2)]
    tensors[wanted].requires_grad_()
    unpermute(tensors[0], tensors[1], slot, invert(slot, 10)).sum().backward()
    assert [each.grad is not None for each in tensors] == [wanted == 0, wanted == 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    S, N, k, M = 12, 40, 3, 64
    slot = slots(S, N, k)
    source = invert(slot, N)
    h, weight = normal(N, M, dtype=dtype, grad=True), normal(S, k, seed=1, dtype=torch.float32, grad=True)
    dy = normal(S, M, seed=2, dtype=dtype)
    y = unpermute(h, weight, slot, source)
    exact_h, exact_weight = (each.detach().double().requires_grad_() for each in (h, weight))
    exact = unpermute(exact_h, exact_weight, slot, source)
    ulp = torch.finfo(dtype).eps / 2  # of one rounding; float32's are far smaller
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=1.01 * ulp, atol=1e-6)
    dh, dw = torch.autograd.grad(y, (h, weight), dy)
    exact_dh, exact_dw = torch.autograd.grad(exact, (exact_h, exact_weight), dy.double())
    assert (dh.dtype, dw.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(dh.double(), exact_dh, rtol=1.01 * ulp, atol=1e-6)
    torch.testing.assert_close(dw.double(), exact_dw, rtol=1e-5, atol=1e-5)  # float32 sums of 64 products

    x = normal(S, M, seed=3, dtype=dtype, grad=True)
    (dx,) = torch.autograd.grad(permute(x, slot, source), x, h.detach())
    exact_x = x.detach().double().requires_grad_()
    (exact_dx,) = torch.autograd.grad(permute(exact_x, slot, source), exact_x, h.detach().double())
    torch.testing.assert_close(dx.double(), exact_dx, rtol=1.01 * ulp, atol=1e-6)


def test_rows_are_cast_on_their_way_and_gradients_back() -> None:
    slot = slots(6, 10, 2)
    source = invert(slot, 10)
    x = normal(6, 3, dtype=torch.float32, grad=True)
    moved = permute(x, slot, source, dtype=torch.bfloat16)
    assert torch.equal(moved, permute(x.bfloat16(), slot, source))
    moved.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_rows_may_lie_apart_in_memory() -> None:
    slot = slots(6, 10, 2)
    source = invert(slot, 10)
    x, h, weight = normal(3, 6).t(), normal(3, 10, seed=1).t(), normal(2, 6, seed=2).t()
    assert torch.equal(permute(x, slot, source), permute(x.contiguous(), slot, source))
    near = unpermute(h.contiguous(), weight.contiguous(), slot.contiguous(), source)
    assert torch.equal(unpermute(h, weight, slot.t().contiguous().t(), source), near)


def test_the_gate_keeps_probabilities_and_ids_and_a_permutation_keeps_slots() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out: GateOutput = gate(normal(6, 4, grad=True), 2)
        assert [each.shape for each in kept] == [(6, 4), (6, 2)]
        assert torch.equal(kept[0], out.probs_SE)
        assert torch.equal(kept[1], out.expert_Sk)
        kept.clear()
        slot = slots(6, 10, 2)
        permute(normal(6, 3, grad=True), slot, invert(slot, 10))
        assert len(kept) == 1
        assert kept[0] is slot
