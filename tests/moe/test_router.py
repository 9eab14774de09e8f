"""The router: capacity, who keeps a slot, weights, losses and noise, each against its definition in plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_efficient.moe import Capacity, MoELayer, Router, Routing


@pytest.mark.parametrize(
    ("capacity", "tokens", "experts", "k", "slots"),
    [
        (Capacity(1.0, minimum=1), 64, 8, 2, 16),
        (Capacity(1.25, minimum=1), 64, 8, 1, 10),
        (Capacity(1.0, minimum=1), 65, 8, 1, 9),  # rounded up
        (Capacity(1.1, minimum=1), 10, 11, 1, 1),  # 1.1 * 10 / 11 is a little above 1 in floating point
        (Capacity(1.0, minimum=4), 16, 16, 1, 4),
        (Capacity(1.0, minimum=4), 3, 16, 1, 3),  # an expert gets a token once
        (Capacity(100.0), 8, 4, 2, 8),
        (Capacity(None), 64, 8, 2, None),
    ],
)
def test_capacity_is_the_share_of_the_assignments(
    capacity: Capacity, tokens: int, experts: int, k: int, slots: int | None
) -> None:
    assert capacity.slots(tokens, num_experts=experts, top_k=k) == slots


def test_evaluation_has_a_capacity_of_its_own() -> None:
    router = Router(4, 8, 2, capacity=Capacity(1.0, eval_factor=2.0, minimum=1))
    assert router.slots(64) == 16
    assert router.eval().slots(64) == 32
    assert Router(4, 8, 2, capacity=Capacity(1.0, minimum=1)).eval().slots(64) == 16


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_capacity_factor_must_be_positive_and_finite(factor: float) -> None:
    with pytest.raises(ValueError, match=r"^capacity_factor is .*Set it above 0, or to null"):
        Capacity(factor)
    with pytest.raises(ValueError, match=r"^eval_capacity_factor is"):
        Capacity(1.0, factor)


def test_capacity_needs_a_slot() -> None:
    with pytest.raises(ValueError, match=r"min_capacity is 0: .* Set it to 1 or more"):
        Capacity(minimum=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 9}, "top_k is 9, of 8 experts: a token goes to an expert once"),
        ({"drop_policy": "random"}, "no drop_policy 'random': choose 'position' or 'probs'"),
        ({"normalize": "yes"}, "no normalize 'yes': choose 'before_drop', 'after_drop' or 'never'"),
        ({"jitter": 1.0}, "jitter is 1.0"),
        ({"jitter": -0.1}, "jitter is -0.1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(**{"dim": 4, "num_experts": 8, "top_k": 2, **options})  # type: ignore[arg-type]


def route(
    S: int, E: int, k: int, *, seed: int = 0, factor: float | None = 1.0, **options: object
) -> tuple[Router, Tensor, Routing]:
    torch.manual_seed(seed)
    router = Router(3, E, k, capacity=Capacity(factor, minimum=1), **options).double()  # type: ignore[arg-type]
    x_SM = torch.randn(S, 3, dtype=torch.float64)
    return router, x_SM, router(x_SM)


def queues(probs: list[list[float]], k: int, policy: str) -> dict[int, list[tuple[int, int]]]:
    """The assignments (s, j) of each expert, those that keep a slot first, by the words of the documentation."""
    E = len(probs[0])
    best = [sorted(range(E), key=lambda e, row=row: -row[e])[:k] for row in probs]
    queue: dict[int, list[tuple[int, int]]] = {e: [] for e in range(E)}
    for j in range(k):
        for s in range(len(probs)):
            queue[best[s][j]].append((s, j))
    if policy == "probs":
        for e, waiting in queue.items():
            waiting.sort(key=lambda sj, e=e: -probs[sj[0]][e])
    return queue


@given(st.integers(1, 20), st.integers(1, 6), st.data(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_places_in_queues_are_those_of_plain_loops(S: int, E: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, E))
    for policy in ("position", "probs"):
        router, x_SM, routing = route(S, E, k, seed=seed, drop_policy=policy)
        probs = (x_SM @ router.weight.T).softmax(-1).tolist()
        for e, queue in queues(probs, k, policy).items():
            assert int(routing.counts_E[e]) == len(queue)
            for place, (s, j) in enumerate(queue):
                assert (int(routing.expert_Sk[s, j]), int(routing.position_Sk[s, j])) == (e, place)


def test_of_equal_probabilities_the_earlier_choice_and_token_keeps_the_slot() -> None:
    router = Router(2, 4, 2, capacity=Capacity(1.0, minimum=1), drop_policy="probs")
    torch.nn.init.zeros_(router.weight)
    routing = router(torch.ones(3, 2))
    assert routing.expert_Sk.tolist() == [[0, 1]] * 3
    assert routing.position_Sk.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_weights_are_divided_by_their_sum_before_the_drop() -> None:
    _, _, routing = route(16, 4, 2, normalize="before_drop")
    assert (routing.position_Sk >= routing.capacity).any()
    torch.testing.assert_close(routing.weight_Sk.sum(-1), torch.ones(16, dtype=torch.float64))


def test_weights_are_divided_by_the_sum_of_what_is_kept_after_the_drop() -> None:
    router, x_SM, routing = route(16, 4, 2, factor=0.5, normalize="after_drop")
    assert routing.capacity is not None
    kept_Sk = routing.position_Sk < routing.capacity
    chosen_Sk = (x_SM @ router.weight.T).softmax(-1).gather(1, routing.expert_Sk)
    for weight, kept, chosen in zip(routing.weight_Sk, kept_Sk, chosen_Sk, strict=True):
        total = chosen[kept].sum()
        torch.testing.assert_close(weight[kept], chosen[kept] / total if kept.any() else chosen[kept])
        assert not weight[~kept].any()
    assert {int(each) for each in kept_Sk.sum(-1)} == {0, 1, 2}  # all, one and none of the experts lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_lost_all_its_experts_has_a_gradient_of_zero(dtype: torch.dtype) -> None:
    router = Router(2, 2, 2, capacity=Capacity(0.5, minimum=1), normalize="after_drop").to(dtype)
    x_SM = torch.ones(8, 2, dtype=dtype, requires_grad=True)
    routing = router(x_SM)
    (routing.weight_Sk * (routing.position_Sk < routing.capacity)).sum().backward()
    assert x_SM.grad is not None
    assert torch.isfinite(x_SM.grad).all()
    assert torch.isfinite(router.weight.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "normalize"), [(1, "before_drop"), (1, "after_drop"), (2, "never")])
def test_plain_probabilities_are_the_weights_where_nothing_is_divided(k: int, normalize: str) -> None:
    router, x_SM, routing = route(16, 4, k, normalize=normalize)
    probs_SE = (x_SM @ router.weight.T).softmax(-1)
    torch.testing.assert_close(routing.weight_Sk, probs_SE.gather(1, routing.expert_Sk))


def test_one_expert_per_token_still_teaches_the_gate() -> None:
    router, _, routing = route(16, 4, 1)
    routing.weight_Sk.sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().max() > 1e-3


def test_gate_runs_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    router, x_SM = Router(64, 8, 2), torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router(x_SM)
    plain = router(x_SM)
    assert mixed.weight_Sk.dtype == mixed.load.dtype == torch.float32
    assert torch.equal(mixed.weight_Sk, plain.weight_Sk)
    narrow = Router(64, 8, 2).bfloat16()(x_SM.bfloat16())
    assert narrow.weight_Sk.dtype == narrow.load.dtype == torch.float32


def test_losses_are_those_of_plain_loops() -> None:
    router, x_SM, routing = route(12, 4, 2, factor=0.5)
    balance, z = router.losses(routing.load.detach(), 12)
    logits = (x_SM @ router.weight.T).tolist()
    expected, expected_z = 0.0, 0.0
    for e in range(4):
        mean = sum(math.exp(row[e]) / sum(map(math.exp, row)) for row in logits) / 12
        expected += 4 * mean * float((routing.expert_Sk == e).sum()) / (2 * 12)
    for row in logits:
        expected_z += math.log(sum(map(math.exp, row))) ** 2 / 12
    assert float(balance) == pytest.approx(expected, abs=1e-12)
    assert float(z) == pytest.approx(expected_z, abs=1e-12)


def test_balance_is_1_where_loads_are_even_and_e_where_all_go_to_one() -> None:
    router = Router(4, 4, 1).double()
    even = router(20 * torch.eye(4, dtype=torch.float64) @ torch.linalg.pinv(router.weight.detach()).T)
    assert float(router.losses(even.load.detach(), 4)[0]) == pytest.approx(1.0, abs=1e-6)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[50.0], [0.0], [0.0], [0.0]]).expand(4, 4))
    assert float(router.losses(router(torch.ones(6, 4, dtype=torch.float64)).load.detach(), 6)[0]) == pytest.approx(4.0)


def test_of_no_tokens_the_losses_are_zero() -> None:
    router = Router(4, 4, 2)
    balance, z = router.losses(router(torch.ones(0, 4)).load.detach(), 0)
    assert float(balance) == float(z) == 0


def test_noise_is_uniform_within_its_bounds_and_the_same_for_the_same_seed() -> None:
    router, ones = Router(4, 8, 2, jitter=0.1), torch.ones(1000, 4)
    noisy = router.noise(ones, 5)
    assert torch.equal(noisy, router.noise(ones, 5))
    assert not torch.equal(noisy, router.noise(ones, 6))
    assert 0.9 <= float(noisy.min()) < 0.91
    assert 1.09 < float(noisy.max()) <= 1.1
    assert float(noisy.mean()) == pytest.approx(1.0, abs=0.004)  # 4 sigma of 0.058 / sqrt(4000)


def test_noise_leaves_the_global_generator_and_the_evaluation_alone() -> None:
    torch.manual_seed(0)
    layer, x = MoELayer(4, 8, 8, jitter=0.2), torch.randn(16, 4)
    state = torch.get_rng_state()
    layer.router.noise(x, 5)
    assert torch.equal(state, torch.get_rng_state())
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(state, torch.get_rng_state())
    layer.train()
    assert not torch.equal(layer(x), layer(x))
