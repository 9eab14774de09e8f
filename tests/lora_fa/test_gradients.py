"""The hand-written backward of one adapted linear is the derivative of its forward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, lora_fa_linear
from lightning_efficient.lora_fa.dropout import keep_mask
from lightning_efficient.lora_fa.frozen import Dense
from lightning_efficient.lora_fa.functional import Setting, adapted_linear
from tests.lora_fa.nets import normal

T, K, N, R = 5, 6, 4, 3
MODES = ("recompute", "lowrank", "saved")
SCALE = 1.7


def operands(rank: int = R, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    weight, A, B = normal(N, K, seed=1), normal(rank, K, seed=2), normal(N, rank, seed=3, grad=True)
    return weight, A, B, normal(N, seed=4) if bias else None


def lean(x: Tensor, B: Tensor, *, form: str, p: float = 0.0, mode: Any = "recompute", rank: int = R, bias: bool = True):
    """Either form of the function, with dropout's randomness the same in each call."""
    weight, A, _, b = operands(rank, bias=bias)
    torch.manual_seed(7)
    if form == "callables":
        return lora_fa_linear(x, lambda z: F.linear(z, weight, b), lambda: weight, A, B, SCALE, p, mode)
    return adapted_linear(x, A, B, Setting(SCALE, p, mode), Dense(weight, b))


@pytest.mark.parametrize("form", ["callables", "dense"])
@pytest.mark.parametrize(("p", "mode"), [(0.0, "recompute"), *((0.4, mode) for mode in MODES)])
@pytest.mark.parametrize("shape", [(T, K), (2, 3, K), (K,), (1, 1, 2, K)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(form: str, p: float, mode: str, shape: tuple[int, ...], bias: bool) -> None:
    x, B = normal(*shape, grad=True), operands()[2]

    assert torch.autograd.gradcheck(lambda x, B: lean(x, B, form=form, p=p, mode=mode, bias=bias), (x, B))


@pytest.mark.parametrize("rank", [1, min(K, N)])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_at_the_smallest_and_the_largest_rank(rank: int, p: float) -> None:
    x, B = normal(T, K, grad=True), operands(rank)[2]

    assert torch.autograd.gradcheck(lambda x, B: lean(x, B, form="dense", p=p, rank=rank), (x, B))


LAYOUTS = {
    "transposed": lambda: normal(K, T).t(),
    "strided": lambda: normal(T, 2 * K)[:, ::2],
    "permuted": lambda: normal(3, 2, K).transpose(0, 1),
    "expanded": lambda: normal(1, K).expand(T, K),
    "every second row": lambda: normal(2 * T, K)[::2],
    "columns of three dimensions": lambda: normal(2, K, 3).transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("p", "mode"), [(0.0, "recompute"), (0.4, "recompute"), (0.4, "lowrank")])
@pytest.mark.parametrize("form", ["callables", "dense"])
def test_memory_order_of_x_and_dy_changes_nothing(layout: str, p: float, mode: str, form: str) -> None:
    strided = LAYOUTS[layout]()
    results = []
    for x in (strided, strided.contiguous()):
        x, B = x.detach().requires_grad_(), operands()[2]
        y = lean(x, B, form=form, p=p, mode=mode)
        dy = normal(*reversed(y.shape), seed=9).permute(*reversed(range(y.ndim)))
        dy = dy if x is strided else dy.contiguous()
        results.append((y.detach(), *torch.autograd.grad(y, (x, B), dy)))

    for ours, plain in zip(*results, strict=True):
        # Products of other memory orders may sum in another order: some roundings of float64.
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, K), (2, 0, K)])
def test_no_tokens_give_a_zero_gradient(p: float, mode: str, shape: tuple[int, ...]) -> None:
    x, B = torch.zeros(*shape, dtype=torch.float64, requires_grad=True), operands()[2]

    y = lean(x, B, form="dense", p=p, mode=mode)
    y.sum().backward()

    assert y.shape == (*shape[:-1], N)
    assert torch.equal(B.grad, torch.zeros_like(B))
    assert x.grad.shape == shape


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_an_input_without_gradient_still_trains_B(p: float) -> None:
    x, B = normal(T, K), operands()[2]
    with_grad = x.clone().requires_grad_()

    (dB,) = torch.autograd.grad(lean(x, B, form="dense", p=p).square().sum(), B)
    _, expected = torch.autograd.grad(lean(with_grad, B, form="dense", p=p).square().sum(), (with_grad, B))

    assert torch.equal(dB, expected)


def test_a_frozen_B_passes_the_gradient_on() -> None:
    x, B = normal(T, K, grad=True), operands()[2].detach()
    weight, A, *_ = operands()

    (dx,) = torch.autograd.grad(lean(x, B, form="dense").sum(), x)

    torch.testing.assert_close(dx, (weight + SCALE * B @ A).sum(0).expand(T, K))


def test_neither_needing_a_gradient_records_nothing() -> None:
    y = lean(normal(T, K), operands()[2].detach(), form="dense")

    assert y.grad_fn is None


def test_a_second_derivative_is_refused() -> None:
    x, B = normal(T, K, grad=True), operands()[2]
    (dx,) = torch.autograd.grad(lean(x, B, form="dense").square().sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_two_backwards_through_one_graph_agree(mode: str) -> None:
    x, B = normal(T, K, grad=True), operands()[2]
    y = lean(x, B, form="dense", p=0.4, mode=mode)

    first = torch.autograd.grad(y.sum(), (x, B), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, B))

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_weight_changed_between_forward_and_backward_is_noticed() -> None:
    x, (weight, A, B, _) = normal(T, K, grad=True), operands()
    y = adapted_linear(x, A, B, Setting(SCALE), Dense(weight, None))
    weight.add_(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_recompute_equals_a_run_with_the_mask_bit_for_bit() -> None:
    p, (weight, A, B, bias) = 0.3, operands()
    x = normal(T, K, grad=True)
    torch.manual_seed(7)
    seed = torch.randint(-(2**31), 2**31, (2,)).to(torch.int32)
    mask = keep_mask(seed, (0, T), K, p, x.device)

    y = lean(x, B, form="dense", p=p)
    h = ((x.detach() * mask) @ A.t()) * (1 / (1 - p))
    expected = torch.addmm(F.linear(x.detach(), weight, bias), h, B.detach().t(), alpha=SCALE)
    dy = normal(T, N, seed=5)
    dx, dB = torch.autograd.grad(y, (x, B), dy)
    u = (dy @ B.detach()) * SCALE

    assert torch.equal(y, expected)
    assert torch.equal(dB, (dy.t() @ h) * SCALE)
    assert torch.equal(dx, dy @ weight + ((u * (1 / (1 - p))) @ A) * mask)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"A": normal(K, R)}, "do not fit"),
        ({"B": normal(R, N)}, "do not fit"),
        ({"x": normal(T, K + 1)}, "do not fit"),
        ({"p": 1.0}, r"p is 1.0.*\[0, 1\)"),
        ({"p": -0.1}, "p is -0.1"),
        ({"p": float("nan")}, "p is nan"),
        ({"mode": "dropout"}, "mode is 'dropout'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    weight, A, B, _ = operands()
    arguments = {"x": normal(T, K), "A": A, "B": B, "scale": 1.0, **change}

    with pytest.raises(ValueError, match=said):
        lora_fa_linear(base_fwd=lambda z: z @ weight.t(), weight_fn=lambda: weight, **arguments)


def test_a_base_may_return_any_memory_order() -> None:
    weight, A, B, _ = operands()
    x = normal(2, 3, K, grad=True)

    def base(z: Tensor) -> Tensor:
        return (weight @ z.transpose(1, 2)).transpose(1, 2)

    y = lora_fa_linear(x, base, lambda: weight, A, B, SCALE)

    torch.testing.assert_close(y, x @ (weight + SCALE * B @ A).t())


def test_the_meta_device_gives_shapes() -> None:
    """As Lightning's measure_flops runs a model."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6))
    apply_lora_fa(model, LoRAFAConfig(r=2))
    y = model(torch.empty(3, 8, device="meta", requires_grad=True))
    y.sum().backward()

    assert y.shape == (3, 6)
    assert model[0].lora_B["default"].weight.grad.shape == (6, 2)
