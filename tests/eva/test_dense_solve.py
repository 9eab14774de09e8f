"""V is the solution of the damped Kronecker system: the closed form equals a dense solve."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_efficient.eva import precondition
from lightning_efficient.optimizers import Eva
from tests.eva.reference import Use, backward, kronecker_vectors, recorded

# The dense matrix has condition number (gamma + |a|^2 |g|^2) / gamma, below 1e5 here: 1e-16 becomes at most 1e-11.
TOLERANCE = 1e-10

LR = 0.01


def dense(G: Tensor, a: Tensor, g: Tensor | None, damping: float) -> Tensor:
    """Solve the system as it is written, without using that it has rank 1."""
    if g is None:
        F = torch.outer(a, a) + damping * torch.eye(len(a), dtype=a.dtype)
        return torch.linalg.solve(F, G.T).T
    F = torch.kron(torch.outer(g, g), torch.outer(a, a)) + damping * torch.eye(G.numel(), dtype=a.dtype)
    return torch.linalg.solve(F, G.flatten()).view_as(G)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the tolerance, relative to the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(1e-2, 10), st.integers(0, 2**20), st.booleans())
def test_precondition_equals_a_dense_solve(outputs: int, inputs: int, damping: float, seed: int, eva_f: bool) -> None:
    G, a, g = _random(seed, outputs, inputs), _random(seed + 1, inputs), _random(seed + 2, outputs)
    V = precondition(G, a, None if eva_f else g, damping=damping)
    close(V, dense(G, a, None if eva_f else g, damping))


@given(st.integers(1, 9), st.integers(1, 9), st.floats(1e-2, 10), st.integers(0, 2**20), st.booleans())
def test_relative_damping_is_a_multiple_of_the_curvature_and_leaves_the_scale(
    outputs: int, inputs: int, damping: float, seed: int, eva_f: bool
) -> None:
    G, a, g = _random(seed, outputs, inputs), _random(seed + 1, inputs), None if eva_f else _random(seed + 2, outputs)
    gamma = damping * (a @ a if g is None else (a @ a) * (g @ g)).item()
    close(precondition(G, a, g, damping=damping, damping_mode="relative"), gamma * dense(G, a, g, gamma))


# ---- through a step of the optimizer ---------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "without bias": (lambda: nn.Linear(6, 5, bias=False), (6,)),
    "1 x n": (lambda: nn.Linear(7, 1), (7,)),
    "1 x n without bias": (lambda: nn.Linear(7, 1, bias=False), (7,)),
    "n x 1": (lambda: nn.Linear(1, 7), (1,)),
    "1 x 1": (lambda: nn.Linear(1, 1), (1,)),
    "three dimensions": (lambda: nn.Linear(4, 3), (5, 4)),
    "conv": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 6)),
    "conv without bias": (lambda: nn.Conv2d(2, 4, (1, 3), stride=2, padding=1, bias=False), (2, 5, 6)),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 2, groups=2, dilation=2), (4, 5, 5)),
    "depthwise conv": (lambda: nn.Conv2d(3, 6, 3, groups=3), (3, 5, 5)),
    "grouped conv without bias": (lambda: nn.Conv2d(4, 4, 2, groups=4, bias=False), (4, 3, 3)),
}


def _gradient_step(layer: nn.Module, shape: tuple[int, ...], **settings: Any) -> tuple[Use, Tensor]:
    """One step without momentum or rescaling: the use of a copy of the layer, and the V that the optimizer applied."""
    model = nn.Sequential(layer).double()
    plain = copy.deepcopy(model)
    x = _random(1, 6, *shape)
    with recorded(plain) as uses:
        backward(plain(x).sin().sum() / len(x), uses)
    optimizer = Eva(model.parameters(), lr=LR, rescale="none", momentum=0, g_scale="expectation", **settings)
    optimizer.attach(model)
    (model(x).sin().sum() / len(x)).backward()
    before = _matrix([p.detach().clone() for p in model.parameters()])
    optimizer.step()
    return uses[0], (before - _matrix(list(model.parameters()))) / LR


def _matrix(params: list[Tensor]) -> Tensor:
    weight, *bias = (p.detach() for p in params)
    return torch.cat([weight.flatten(1), *(b[:, None] for b in bias)], dim=1)


@pytest.mark.parametrize("variant", ["eva", "eva_f"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_step_equals_a_dense_solve_for_each_group(layer: str, variant: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    # Weights after a step of 1e-2 keep 14 digits of V; with damping 0.1, V is of order 1.
    use, V = _gradient_step(make(), shape, variant=variant, damping=0.1)
    a, g = (torch.from_numpy(each) for each in kronecker_vectors([use], samples=None, g_scale="expectation"))
    grads = _matrix([p.grad for p in use.module.parameters() if p.grad is not None]).chunk(len(a))
    for k, (G, part) in enumerate(zip(grads, V.chunk(len(a)), strict=True)):
        a_k = a[k] if use.module.bias is None else torch.cat([a[k], torch.ones(1, dtype=a.dtype)])
        assert (a_k.norm() * g[k].norm()) > 1e-2  # the curvature matters
        close(part, dense(G, a_k, g[k] if variant == "eva" else None, 0.1))


def test_eva_s_of_four_axes_equals_a_dense_solve() -> None:
    torch.manual_seed(0)
    # Graft is off: V is gamma times the solution of the system with the flat outer product of the means.
    use, V = _gradient_step(nn.Conv2d(3, 4, (2, 3), bias=False), (3, 5, 6), variant="eva_s", damping=1e-3)
    G = use.module.weight.grad
    means = [G.mean(dim=[j for j in range(4) if j != i]) for i in range(4)]
    term = torch.einsum("i,j,k,l->ijkl", *means).flatten()
    F = torch.outer(term, term) + 1e-3 * torch.eye(G.numel(), dtype=G.dtype)
    close(V.flatten(), 1e-3 * torch.linalg.solve(F, G.flatten()))


@pytest.mark.parametrize("shape", [(5, 4), (1, 6), (6, 1), (3, 2, 4), (2, 3, 2, 2), (2, 3, 2, 2, 2)], ids=str)
def test_eva_s_of_any_order_removes_the_outer_product_of_the_means(shape: tuple[int, ...]) -> None:
    W = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    W.grad = G = _random(3, *shape) + 0.5
    term = torch.ones((), dtype=torch.float64)
    for axis in range(G.ndim):
        term = torch.tensordot(term, G.mean(dim=[j for j in range(G.ndim) if j != axis]), dims=0)
    expected = G - (G * term).sum() / (0.1 + (term * term).sum()) * term
    Eva([W], lr=1.0, variant="eva_s", damping=0.1, rescale="none", momentum=0).step()
    close(-W.detach(), expected)


def test_eva_s_grafts_each_tensor_to_the_norm_of_its_gradient() -> None:
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in [(4, 3), (2, 3, 2)]]
    for seed, p in enumerate(params):
        p.grad = 10**seed * (_random(seed, *p.shape) + 0.5)
    Eva(params, lr=1.0, variant="eva_s", damping=1e-3, momentum=0).step()
    for p in params:
        assert p.grad is not None
        torch.testing.assert_close(p.norm(), p.grad.norm(), rtol=1e-12, atol=0)
        assert torch.cosine_similarity(-p.flatten(), p.grad.flatten(), dim=0) < 0.99
