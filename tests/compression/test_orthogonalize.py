"""Whatever the factors look like, the result is an orthonormal basis of them."""

import pytest
import torch
from torch import Tensor

from lightning_efficient.compression.orthogonalize import Orthogonalization, orthogonalize

METHODS: list[Orthogonalization] = ["qr", "cholesky"]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}  # a few eps times the rank


def _gaussian(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def _dependent(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 1, :] = 3 * x[..., 0, :]
    return x


def _badly_scaled(x: Tensor) -> Tensor:
    return x * torch.logspace(0, -10, x.shape[-2], dtype=x.dtype)[:, None]


def _nearly_dependent(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 1, :] = x[..., 0, :] + 1e-5 * x[..., 1, :]
    return x


INPUTS = {
    "full rank": lambda x: x,
    "dependent rows": _dependent,
    "nearly dependent rows": _nearly_dependent,
    "zero": torch.zeros_like,
    "one row zero": lambda x: x * (torch.arange(x.shape[-2]) != 0)[:, None],
    "badly scaled rows": _badly_scaled,
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e30,
    "denormal": lambda x: x * torch.finfo(x.dtype).tiny * 1e-2,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(4, 60), (1, 9), (5, 5), (32, 70), (3, 4, 30)], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_the_rows_of_the_result_are_orthonormal(
    method: Orthogonalization, dtype: torch.dtype, shape: tuple[int, ...], kind: str
) -> None:
    if shape[0] == 1 and "dependent" in kind:
        pytest.skip("one row has no other to depend on")
    q = orthogonalize(INPUTS[kind](_gaussian(*shape, dtype=dtype)), method)
    assert q.dtype == dtype
    assert q.shape == shape
    eye = torch.eye(shape[-2], dtype=dtype).expand(*shape[:-2], -1, -1)
    torch.testing.assert_close(q @ q.mT, eye, rtol=0, atol=TOLERANCE[dtype] * shape[-2] ** 0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["full rank", "badly scaled rows", "nearly dependent rows", "tiny"])
def test_the_result_spans_the_rows_of_the_input(method: Orthogonalization, kind: str) -> None:
    x = INPUTS[kind](_gaussian(4, 60, dtype=torch.float64))
    q = orthogonalize(x, method)
    torch.testing.assert_close(x @ q.mT @ q, x, rtol=1e-9, atol=x.abs().max().item() * 1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_dependent_rows_still_span_the_row_space(method: Orthogonalization) -> None:
    x = _dependent(_gaussian(4, 60, dtype=torch.float64))
    q = orthogonalize(x, method)
    torch.testing.assert_close(x @ q.mT @ q, x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_each_matrix_alone(method: Orthogonalization) -> None:
    x = _gaussian(3, 4, 30, dtype=torch.float64)
    torch.testing.assert_close(
        orthogonalize(x, method), torch.stack([orthogonalize(m, method) for m in x]), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_the_input_does_not_matter(method: Orthogonalization) -> None:
    # Sums instead of means, and loss scales, go in: a power of two must not even change a bit.
    x = _gaussian(4, 60, dtype=torch.float32)
    assert torch.equal(orthogonalize(x * 2.0**14, method), orthogonalize(x, method))


def test_cholesky_agrees_with_qr_up_to_signs_and_leaves_its_input_alone() -> None:
    x = _gaussian(4, 60, dtype=torch.float64)
    before = x.clone()
    by_qr, by_cholesky = orthogonalize(x, "qr"), orthogonalize(x, "cholesky")
    torch.testing.assert_close(by_cholesky.abs(), by_qr.abs(), rtol=0, atol=1e-13)
    assert torch.equal(x, before)


def test_an_unknown_method_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'gram_schmidt'.*qr.*cholesky"):
        orthogonalize(torch.ones(1, 2), "gram_schmidt")  # type: ignore[arg-type]
