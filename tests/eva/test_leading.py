"""The leading-direction step against its equations, written out with V formed."""

import math

import pytest
import torch
from torch import Tensor

from lightning_efficient.eva.leading import RMS, leading_step, start_directions
from tests.eva.reference_leading import plain_step

MU, LR, DAMPING = 0.8, 0.03, 1e-3
SETTINGS = {"lr": LR, "momentum": MU, "damping": DAMPING}


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(rows: int, D: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    W, M = gaussian(rows, D, seed=1), torch.zeros(rows, D, dtype=torch.float64)
    return W, M, start_directions(D, rank, seed=rows, like=W)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (6, 6)])
def test_a_step_equals_its_equations(shape: tuple[int, int], rank: int) -> None:
    W, M, q = start(*shape, rank)
    W_, M_, Q_ = W.clone(), M.clone(), q.T.clone()
    for step in range(8):
        G = gaussian(*shape, seed=10 + step)
        q, _ = leading_step(W, M, G, q, **SETTINGS)
        W_, M_, Q_, _ = plain_step(W_, M_, G, Q_, **SETTINGS)
        torch.testing.assert_close(M, M_, rtol=0, atol=1e-14)
        # The signs of orthonormal columns are free; P and Q change them together, and the update does not see it.
        torch.testing.assert_close(W, W_, rtol=0, atol=1e-12)
        torch.testing.assert_close((q @ Q_).abs().diagonal(), torch.ones(rank, dtype=q.dtype), rtol=0, atol=1e-9)


def test_rank_one_is_a_damped_inverse_of_rank_one_curvature() -> None:
    W, M, q = start(7, 12, 1)
    G, before = gaussian(7, 12, seed=3), W.clone()
    *_, V = plain_step(W, M, G, q.T, **SETTINGS)
    U = (1 - MU) * G * (1 + MU)
    A = torch.diag(math.sqrt(12) / U.norm(dim=1)) @ U
    p = torch.nn.functional.normalize(A @ q[0], dim=0)
    s = (A.T @ p).norm()
    t = ((7 * 12 - s**2) / 6).sqrt()
    F = torch.eye(7, dtype=torch.float64) + (s - t) / t * torch.outer(p, p)

    leading_step(W, M, G, q, **SETTINGS)

    torch.testing.assert_close(torch.linalg.solve(F, A), V, rtol=0, atol=1e-12)
    direction = torch.nn.functional.normalize((before - W).flatten(), dim=0)
    torch.testing.assert_close(direction, torch.nn.functional.normalize(V.flatten(), dim=0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_update_has_a_fixed_root_mean_square(rank: int) -> None:
    W, M, q = start(9, 14, rank)
    for step in range(5):
        before = W.clone()
        q, _ = leading_step(W, M, gaussian(9, 14, seed=step), q, **SETTINGS)
        assert (W - before).square().mean().sqrt().item() == pytest.approx(RMS * LR, rel=1e-12)


def test_on_a_steady_gradient_it_finds_the_leading_directions_and_levels_them() -> None:
    G = gaussian(8, 20, seed=5) + 4 * torch.outer(gaussian(8, seed=6), gaussian(20, seed=7))
    A = torch.diag(math.sqrt(20) / G.norm(dim=1)) @ G
    left, values, right = torch.linalg.svd(A, full_matrices=False)
    W, M, q = start(8, 20, 1)
    for _ in range(60):
        before = W.clone()
        q, rho = leading_step(W, M, G, q, **SETTINGS)
    rest = values[1:].square().mean().sqrt()

    assert (q[0] @ right[0]).abs().item() == pytest.approx(1, abs=1e-12)
    assert rho.item() == pytest.approx(1 - (rest / values[0]).item(), rel=1e-10)
    update = before - W
    share = (left[:, 0] @ update @ right[0]).abs() / (left[:, 1] @ update @ right[1]).abs()
    assert share.item() == pytest.approx((rest / values[1]).item(), rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_zeros_stay_zeros(rank: int) -> None:
    W, M, q = start(5, 6, rank)
    before = W.clone()
    q, _ = leading_step(W, M, torch.zeros(5, 6, dtype=torch.float64), q, **SETTINGS)
    assert torch.equal(W, before)
    G = gaussian(5, 6, seed=2)
    G[3] = 0
    q, _ = leading_step(W, M, G, q, **SETTINGS)
    assert torch.equal(W[3], before[3])
    assert W.isfinite().all()
    assert not torch.equal(W[0], before[0])


def test_a_gradient_of_rank_one_still_gives_a_step_along_it() -> None:
    W, M, q = start(5, 6, 1)
    left, right, before = gaussian(5, seed=1), gaussian(6, seed=2), W.clone()
    leading_step(W, M, torch.outer(left, right), q, **SETTINGS)
    update = before - W
    expected = RMS * LR * torch.outer(left.sign(), torch.nn.functional.normalize(right, dim=0)) * math.sqrt(6)
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=0)


def test_directions_start_orthonormal_and_the_same_for_every_type() -> None:
    q = start_directions(9, 4, seed=3, like=torch.empty(0, dtype=torch.float64))
    torch.testing.assert_close(q @ q.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(q.float(), start_directions(9, 4, seed=3, like=torch.empty(0)))


def test_a_step_without_a_gradient_loses_no_direction_and_says_that_nothing_was_taken() -> None:
    W, M, q = start(5, 6, 1)
    after, rho = leading_step(W, M, torch.zeros(5, 6, dtype=torch.float64), q, **SETTINGS)
    assert torch.equal(after, q)
    assert rho == 0
    after, rho = leading_step(W, M, gaussian(5, 6, seed=1), after, **SETTINGS)
    assert after.norm().item() == pytest.approx(1)
    assert rho > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_narrow_weights_are_rounded_once(dtype: torch.dtype, rank: int) -> None:
    """On a gradient of low rank, where the leading directions are all there is, with a row of zeros."""
    G = torch.outer(gaussian(24, seed=1), gaussian(32, seed=2))
    G[3] = 0
    W = gaussian(24, 32, seed=3).to(dtype)
    M, q = torch.zeros_like(W), start_directions(32, rank, seed=1, like=torch.empty(0))
    exact, before = W.float(), W.float()
    settings = {**SETTINGS, "momentum": 0.0}  # which would be rounded too
    leading_step(W, M, G.to(dtype), q, **settings)
    leading_step(exact, torch.zeros(24, 32), G.to(dtype).float(), q, **settings)
    assert torch.equal(W[3].float(), before[3])
    # The update is rounded, and then the weight, which is below 4: half a unit in the last place.
    assert exact.abs().max() < 4
    assert (W.float() - exact).abs().max() <= 1.1 * torch.finfo(dtype).eps * 2
