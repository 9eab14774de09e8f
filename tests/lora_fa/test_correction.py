"""LoRA-FA v2's corrected gradient, and that orthonormal rows make it a matter of course."""

import pytest
import torch
from torch import Tensor

from lightning_efficient.lora_fa.frozen import Dense
from lightning_efficient.lora_fa.functional import Setting, adapted_linear
from lightning_efficient.lora_fa.init import orthonormal_rows
from tests.lora_fa.nets import normal

K, N, R, T, SCALE = 12, 9, 4, 30, 1.7


def gradients(A: Tensor, B: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of B, and the full weight's, of a regression."""
    x, weight = normal(T, K, seed=1), normal(N, K, seed=2)
    B = B.detach().requires_grad_()
    y = adapted_linear(x, A, B, Setting(SCALE), Dense(weight, None))
    loss = (y - target).square().mean()
    dy, g = torch.autograd.grad(loss, (y, B))
    return g, dy.t() @ x


def corrected(g: Tensor, A: Tensor) -> Tensor:
    return torch.linalg.solve(A @ A.t(), g.t()).t() / SCALE**2


def drawn(seed: int = 3) -> Tensor:
    return normal(R, K, seed=seed)


def test_the_corrected_step_is_the_projected_full_gradient() -> None:
    A, B = drawn(), normal(N, R, seed=4)
    g, G = gradients(A, B, normal(T, N, seed=5))
    projector = A.t() @ torch.linalg.solve(A @ A.t(), A)

    torch.testing.assert_close(g, SCALE * G @ A.t(), rtol=0, atol=1e-10)
    torch.testing.assert_close(SCALE * corrected(g, A) @ A, G @ projector, rtol=0, atol=1e-10)


def test_with_orthonormal_rows_the_raw_step_is_it_up_to_a_constant() -> None:
    A, B = orthonormal_rows(drawn()), normal(N, R, seed=4)
    g, G = gradients(A, B, normal(T, N, seed=5))

    torch.testing.assert_close(g @ A / SCALE, G @ A.t() @ A, rtol=0, atol=1e-10)


def trained(A: Tensor, *, correct: bool) -> Tensor:
    B = torch.zeros(N, R, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([B], lr=1e-2, eps=1e-14)
    for step in range(50):
        g, _ = gradients(A, B, normal(T, N, seed=5 + step % 3))
        B.grad = corrected(g, A) if correct else g
        optimizer.step()
    return B.detach()


@pytest.mark.parametrize("orthonormal", [True, False])
def test_adamw_corrects_itself_where_rows_are_orthonormal(orthonormal: bool) -> None:
    A = orthonormal_rows(drawn()) if orthonormal else drawn()
    raw, correct = trained(A, correct=False), trained(A, correct=True)
    difference = float((raw - correct).norm() / correct.norm())

    assert difference < 1e-6 if orthonormal else difference > 0.05


@pytest.mark.parametrize("seed", range(5))
def test_the_corrected_step_does_not_depend_on_the_factors(seed: int) -> None:
    """Under A -> M A, B -> B M^-1 the model and its corrected step of gradient descent stay the same."""
    A, B, target = drawn(), normal(N, R, seed=4), normal(T, N, seed=5)
    M = normal(R, R, seed=seed) + 3 * torch.eye(R, dtype=torch.float64)
    steps = []
    for down, up in ((A, B), (M @ A, B @ torch.linalg.inv(M))):
        g, _ = gradients(down, up, target)
        steps.append((up - 0.1 * corrected(g, down)) @ down)

    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-9)


def test_a_mean_over_clients_with_one_A_is_exact() -> None:
    A, clients = drawn(), [normal(N, R, seed=seed) for seed in range(5)]
    mean = torch.stack(clients).mean(0) @ A

    torch.testing.assert_close(mean, torch.stack([B @ A for B in clients]).mean(0), rtol=0, atol=1e-12)
