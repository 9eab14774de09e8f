"""The gated block, the norm and the activations equal plain autograd."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.lora_fa import gated_mlp, saved_bytes
from lightning_efficient.lora_fa.activation import recomputed, relu
from lightning_efficient.lora_fa.frozen import Dense
from lightning_efficient.lora_fa.functional import Setting, adapted_linear
from lightning_efficient.lora_fa.gated_mlp import GATES, Operand, adapted_gated_mlp
from lightning_efficient.lora_fa.norm import rms_norm
from tests.lora_fa.nets import normal

T, D, WIDE, R = 5, 4, 6, 2
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda e: F.gelu(e, approximate="tanh"),
}


def three(p: float = 0.0, mode: Any = "recompute", *, dtype: torch.dtype = torch.float64) -> list[Operand]:
    operands = []
    for seed, (outputs, inputs) in enumerate([(WIDE, D), (WIDE, D), (D, WIDE)]):
        base = Dense(normal(outputs, inputs, seed=seed, dtype=dtype), normal(outputs, seed=seed + 10, dtype=dtype))
        A = normal(R, inputs, seed=seed + 20, dtype=dtype)
        B = normal(outputs, R, seed=seed + 30, dtype=dtype, grad=True)
        operands.append(Operand(A, B, Setting(1.5 + seed, p, mode), base))
    return operands


def one_by_one(x: Tensor, operands: list[Operand], activation: str) -> Tensor:
    gate, up, down = ((lambda z, o=each: adapted_linear(z, *o)) for each in operands)
    return down(PLAIN[activation](gate(x)) * up(x))


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize(("p", "mode"), [(0.0, "recompute"), (0.4, "recompute"), (0.4, "lowrank"), (0.4, "saved")])
@pytest.mark.parametrize("shape", [(T, D), (2, 3, D)])
def test_the_gated_block_passes_gradcheck(activation: str, p: float, mode: str, shape: tuple[int, ...]) -> None:
    x, operands = normal(*shape, seed=3, grad=True), three(p, mode)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(5)
        return adapted_gated_mlp(x, *operands, activation)

    assert torch.autograd.gradcheck(run, (x, *(each.B_NR for each in operands)))


def few_rows(like: Tensor, *_: int) -> Iterator[tuple[int, int]]:
    for start in range(0, len(like), 7):
        yield start, min(start + 7, len(like))


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("mode", ["recompute", "lowrank", "saved"])
def test_the_gated_block_equals_its_linears_one_by_one(
    activation: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several blocks of rows, with the seeds that the linears draw."""
    monkeypatch.setattr(gated_mlp, "row_blocks", few_rows)
    results = []
    for function in (one_by_one, lambda x, operands, kind: adapted_gated_mlp(x, *operands, kind)):
        x, operands = normal(3, 20, D, grad=True), three(0.3, mode)
        torch.manual_seed(11)
        y = function(x, operands, activation)
        results.append((y, *torch.autograd.grad(y, (x, *(each.B_NR for each in operands)), normal(*y.shape, seed=8))))

    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)


def test_the_gated_block_repeats_its_backward_and_refuses_a_second_derivative() -> None:
    x, operands = normal(T, D, grad=True), three(0.3)
    leaves = (x, *(each.B_NR for each in operands))
    y = adapted_gated_mlp(x, *operands, "silu")

    first = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second[0].sum().backward()


@pytest.mark.parametrize("wanted", range(4))
def test_the_gated_block_gives_each_gradient_alone(wanted: int) -> None:
    x, operands = normal(T, D, grad=True), three()
    leaves = [x, *(each.B_NR for each in operands)]
    expected = torch.autograd.grad(one_by_one(x, operands, "silu").sum(), leaves)[wanted]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index == wanted)

    (alone,) = torch.autograd.grad(adapted_gated_mlp(x, *operands, "silu").sum(), leaves[wanted])

    torch.testing.assert_close(alone, expected)


def test_the_gated_block_takes_no_tokens() -> None:
    x, operands = torch.zeros(0, D, dtype=torch.float64, requires_grad=True), three()
    adapted_gated_mlp(x, *operands, "silu").sum().backward()

    assert x.grad.shape == (0, D)
    assert all(torch.equal(each.B_NR.grad, torch.zeros_like(each.B_NR)) for each in operands)


def test_bfloat16_gradients_do_not_lose_accuracy_with_the_number_of_blocks() -> None:
    """Sums over blocks of rows: rounding each partial sum to bfloat16 would cost several per cent."""
    rows = 1 << 19
    x = normal(rows, D).abs().float()
    dy = normal(rows, D, seed=2).abs().float()
    exact, ours, plain = ({}, {}, {})
    for kept, function, wide in (
        (exact, one_by_one, True),
        (ours, lambda x, o, kind: adapted_gated_mlp(x, *o, kind), False),
        (plain, one_by_one, False),
    ):
        operands = three(dtype=torch.float64 if wide else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
            y = function(x.double() if wide else x, operands, "silu")
        grads = torch.autograd.grad(y, [each.B_NR for each in operands], dy.to(y.dtype))
        kept.update(enumerate(grads))
    error = {
        name: max(float((got[i].double() - exact[i]).norm() / exact[i].norm()) for i in exact)
        for name, got in (("ours", ours), ("plain", plain))
    }

    # A block's sum is rounded before it is added, which adds a little; a sum in bfloat16 would be 4.4 times plain's.
    assert error["ours"] <= 1.25 * error["plain"], error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(T, D), (2, 3, D), (0, D)])
def test_the_norm_equals_plain_autograd(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gain, results = normal(D, seed=1, dtype=dtype), []

    def plain(x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    for function in (plain, rms_norm):
        x = normal(*shape, dtype=dtype, grad=True)
        y = function(x, gain, 1e-6)
        results.append((y.detach(), torch.autograd.grad(y, x, normal(*shape, seed=4, dtype=dtype))[0]))

    assert torch.equal(results[0][0], results[1][0])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(results[1][1], results[0][1], rtol=tolerance, atol=tolerance)


def test_the_norm_passes_gradcheck_in_any_memory_order() -> None:
    gain, x = normal(D, seed=1), normal(3, D, 2).transpose(1, 2).requires_grad_()

    assert torch.autograd.gradcheck(lambda x: rms_norm(x, gain, 1e-6), (x,))
    (dx,) = torch.autograd.grad(rms_norm(x, gain, 1e-6).exp().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.79788456 * (x + 0.044715 * torch.pow(x, 3.0))))


@pytest.mark.parametrize("shape", [(T, D), (2, 3, D), (D,), (0, D), (70_000, D)])
@pytest.mark.parametrize("kind", ["new_gelu", "relu"])
def test_an_activation_equals_plain_autograd(kind: str, shape: tuple[int, ...]) -> None:
    lean, plain = {
        "new_gelu": (lambda x: recomputed(x, new_gelu), new_gelu),
        "relu": (relu, torch.relu),
    }[kind]
    results = []
    for function in (lean, plain):
        x = normal(*shape, grad=True)
        y = function(x)
        results.append((y.detach(), torch.autograd.grad(y, x, normal(*shape, seed=4))[0]))

    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("function", [relu, lambda x: recomputed(x, new_gelu)])
def test_activations_pass_gradcheck_in_any_memory_order(function: Callable[[Tensor], Tensor]) -> None:
    for x in (normal(D, T).t(), normal(2, D, 3).transpose(1, 2), normal(T, 2 * D)[:, ::2]):
        assert torch.autograd.gradcheck(function, (x.detach().requires_grad_(),))


def test_a_recomputed_activation_runs_under_the_autocast_of_its_forward() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return x.sin()

    x = normal(T, D, dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = recomputed(x, function)
    y.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        recomputed(x.float(), function)

    assert seen[:2] == [torch.bfloat16, torch.bfloat16]


def test_relu_keeps_one_byte_per_entry() -> None:
    x = normal(T, D, grad=True)

    assert saved_bytes(lambda: relu(x)).total == T * D
