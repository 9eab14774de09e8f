"""Gradients of every shape, layout and dtype that DDP may hand over."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.compression import ACPSGD, Compressor, PowerSGD, register_compressor
from tests.compression.harness import (
    close,
    equal,
    errors,
    gradients,
    mean_gradients,
    prescribed,
    random_gradients,
    recorded_warnings,
    step,
    total,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _all_reduced(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def _conserved(shapes: dict[str, Any], rank: int, make: Any, steps: int = 4, **ddp_kwargs: Any) -> dict[str, Any]:
    """Check the conservation identity for float64 gradients; returns the compressor's state."""
    ddp, compressor = prescribed(shapes, make, **ddp_kwargs)
    paid = total([step(ddp, random_gradients(shapes, rank, t)) for t in range(steps)])
    owed = total([mean_gradients(shapes, dist.get_world_size(), t) for t in range(steps)])
    state = compressor.state_dict()
    for name, error in errors(state).items():
        paid[name] += error.view(paid[name].shape)
    close(paid, owed, 1e-11)
    return state


# Each of these runs on every rank; a failed check fails the test with the rank's traceback.


def zero_gradients_stay_zero_and_leave_usable_factors(rank: int, method: Callable[..., Compressor]) -> None:
    for r in (1, 4):
        ddp, compressor = prescribed({"w": (12, 10)}, partial(method, r))
        zero = torch.zeros(12, 10, dtype=torch.float64)
        for _ in range(3):
            equal(step(ddp, {"w": zero})["w"], zero)
        emitted = [step(ddp, {"w": _matrix(12, 10, seed=rank)})["w"] for _ in range(80)]
        owed = 80 * _all_reduced(_matrix(12, 10, seed=rank))
        close(torch.stack(emitted).sum(0) + errors(compressor.state_dict())["w"], owed, 1e-10)
        assert (torch.stack(emitted).sum(0) - owed).norm() < 0.5 * owed.norm(), "it must learn again"


def one_row_one_column_0d_1d_and_nd_tensors_are_conserved(rank: int, method: Callable[..., Compressor]) -> None:
    shapes = {"row": (1, 9), "column": (9, 1), "scalar": (), "vector": (7,), "conv2d": (8, 3, 3, 3), "one": (1,)}
    shapes |= {"conv3d": (6, 2, 3, 2, 2), "linear": (12, 9), "empty": (0, 4)}
    for rate in (0.0, 2.0):
        state = _conserved(shapes, rank, partial(method, 2, min_compression_rate=rate))
        assert {"conv2d", "conv3d", "linear"} <= set(state["parameters"])
        assert not {"scalar", "vector", "one", "empty"} & set(state["parameters"])
    # A rank-one matrix at full rank: sent whole.
    ddp, compressor = prescribed({"row": (1, 9), "column": (9, 1)}, partial(method, 1, min_compression_rate=0))
    for t in range(3):
        own = random_gradients({"row": (1, 9), "column": (9, 1)}, rank, t)
        step(ddp, own)
    assert errors(compressor.state_dict(sync=False))["column"].norm() < 10


def uncompressed_tensors_are_averaged_exactly(rank: int, method: Callable[..., Compressor]) -> None:
    shapes = {"scalar": (), "vector": (7,), "small": (2, 3), "big": (30, 30)}
    ddp, _ = prescribed(shapes, partial(method, 2))
    for t in range(3):
        emitted = step(ddp, random_gradients(shapes, rank, t))
        mean = mean_gradients(shapes, 2, t)
        for name in ("scalar", "vector", "small"):
            equal(emitted[name], mean[name])


def batched_experts_equal_each_expert_alone(rank: int, method: Callable[..., Compressor]) -> None:
    experts = {"experts": (3, 10, 14)}
    ddp, compressor = prescribed(experts, partial(method, 2, matrix_view={r"expert": "batched"}, seed=1))
    state = compressor.state_dict()
    assert state["parameters"]["experts"]["Q"].shape == (3, 2, 14)
    alone = {f"e{i}": (10, 14) for i in range(3)}
    ddp_alone, compressor_alone = prescribed(alone, partial(method, 2))
    start = compressor_alone.state_dict()
    for i in range(3):
        start["parameters"][f"e{i}"]["Q"] = state["parameters"]["experts"]["Q"][i].clone()
    compressor_alone.load_state_dict(start)
    for t in range(4):
        own = random_gradients(experts, rank, t)["experts"]
        together = step(ddp, {"experts": own})["experts"]
        each = step(ddp_alone, {f"e{i}": own[i] for i in range(3)})
        close(together, torch.stack([each[f"e{i}"] for i in range(3)]), 1e-13)
    _conserved(experts, rank, partial(method, 2, matrix_view={r"expert": "batched"}, orthogonalization="cholesky"))


def excluded_parameters_are_sent_uncompressed(rank: int, method: Callable[..., Compressor]) -> None:
    shapes = {"embed_tokens": (20, 20), "head": (20, 20)}
    ddp, compressor = prescribed(shapes, partial(method, 2, exclude=["*embed*"]))
    emitted = step(ddp, random_gradients(shapes, rank, 0))
    equal(emitted["embed_tokens"], mean_gradients(shapes, 2, 0)["embed_tokens"])
    assert set(compressor.state_dict()["parameters"]) == {"head"}


def nothing_worth_compressing_is_said(rank: int, method: Callable[..., Compressor]) -> None:
    with recorded_warnings() as messages:
        ddp, _ = prescribed({"small": (3, 4), "vector": (9,)}, partial(method, 2))
    (message,) = messages
    assert "compresses nothing" in message
    assert "small" in message
    assert "(3, 4)" in message
    equal(step(ddp, random_gradients({"small": (3, 4)}, rank, 0) | {"vector": torch.ones(9)})["vector"][0].item(), 1.0)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 10, dtype=torch.float64)
        self.frozen = nn.Linear(10, 10, dtype=torch.float64).requires_grad_(False)
        self.head = nn.Linear(10, 12, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.frozen(self.embedding(tokens))), tokens)


def tied_weights_count_once_and_frozen_ones_not_at_all(rank: int, method: Callable[..., Compressor]) -> None:
    model = _Tied()
    ddp = DistributedDataParallel(model)
    compressor = register_compressor(ddp, method(2))
    assert set(compressor.state_dict()["parameters"]) == {"embedding.weight"}
    paid, owed = [], []
    for t in range(4):
        tokens = torch.arange(t, t + 4) + rank
        owed.append(torch.autograd.grad(model(tokens), model.embedding.weight)[0])
        ddp.zero_grad()
        ddp(tokens).backward()
        paid.append(gradients(model)["embedding.weight"])
    left = errors(compressor.state_dict())["embedding.weight"]
    close(torch.stack(paid).sum(0) + left, _all_reduced(torch.stack(owed).sum(0)), 1e-12)
    assert model.frozen.weight.grad is None


class _Strided(nn.Module):
    """Parameters whose memory order is not that of their dimensions."""

    def __init__(self) -> None:
        super().__init__()
        channels_last = torch.zeros(8, 4, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
        self.conv = nn.Parameter(channels_last)
        self.transposed = nn.Parameter(torch.zeros(14, 10, dtype=torch.float64).t())
        self.sliced = nn.Parameter(torch.zeros(10, 30, dtype=torch.float64)[:, :14])
        self.pointwise = nn.Parameter(
            torch.zeros(16, 12, 1, 1, dtype=torch.float64).to(memory_format=torch.channels_last)
        )

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum(((getattr(self, n) * g).sum() for n, g in gradients.items()), start=torch.zeros(()))


def permuted_memory_is_compressed_and_conserved(rank: int, method: Callable[..., Compressor]) -> None:
    shapes = {"conv": (8, 4, 3, 3), "transposed": (10, 14), "sliced": (10, 14), "pointwise": (16, 12, 1, 1)}
    for view in (False, True):
        ddp = DistributedDataParallel(_Strided(), gradient_as_bucket_view=view)
        compressor = register_compressor(ddp, method(2))
        assert set(compressor.state_dict()["parameters"]) == set(shapes)
        before = {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
        for t in range(5):
            emitted = step(ddp, random_gradients(shapes, rank, t))
            for name, mean in mean_gradients(shapes, 2, t).items():
                before[name] += mean - emitted[name]
        for name, state in compressor.state_dict()["parameters"].items():
            # The error lies in memory order: the flat values, undone by the saved order, are what is still owed.
            in_memory_order = before[name].permute(state["order"]).reshape(state["error"].shape)
            close(state["error"], in_memory_order, 1e-12)
        # A matrix of rank 2 that is constant is paid in full every two steps, so the matrix view is the real one.
        low_rank = {"transposed": _matrix(10, 2) @ _matrix(2, 14, seed=1)}
        low_rank["conv"] = (_matrix(8, 2) @ _matrix(2, 36, seed=1)).view(8, 4, 3, 3)
        low_rank["pointwise"] = (_matrix(16, 2) @ _matrix(2, 12, seed=1)).view(16, 12, 1, 1)
        ddp = DistributedDataParallel(_Strided(), gradient_as_bucket_view=view, find_unused_parameters=True)
        compressor = register_compressor(ddp, method(2))
        for _ in range(2):
            step(ddp, low_rank)
        for name in low_rank:
            assert errors(compressor.state_dict())[name].norm() < 1e-12, name


def complex_parameters_are_sent_uncompressed_with_a_warning(rank: int, method: Callable[..., Compressor]) -> None:
    shapes = {"complex": (12, 12)}
    own = torch.complex(_matrix(12, 12, seed=rank), _matrix(12, 12, seed=rank + 10))
    model = nn.Module()
    model.register_parameter("complex", nn.Parameter(torch.zeros(shapes["complex"], dtype=torch.complex128)))
    model.register_parameter("real", nn.Parameter(torch.zeros(12, 12, dtype=torch.float64)))
    model.forward = lambda: (model.complex * own.conj()).sum().real + model.real.sum()  # type: ignore[method-assign]
    ddp = DistributedDataParallel(model)
    compressor = register_compressor(ddp, method(2))
    with recorded_warnings() as messages:
        for _ in range(3):
            ddp.zero_grad()
            ddp().backward()
    assert model.complex.grad is not None
    close(torch.view_as_real(model.complex.grad), _all_reduced(torch.view_as_real(own)), 1e-15)
    assert any("complex" in m and "uncompressed" in m for m in messages)
    assert "complex" not in compressor.state_dict()["parameters"]


class _SparseEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 16, sparse=True, dtype=torch.float64)
        self.linear = nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.embedding(tokens)).square().sum()


def sparse_gradients_fall_back_to_what_plain_ddp_does(rank: int, method: Callable[..., Compressor]) -> None:
    plain, compressed = DistributedDataParallel(_SparseEmbedding()), DistributedDataParallel(_SparseEmbedding())
    for atomic in (None, True):
        compressed = DistributedDataParallel(_SparseEmbedding())
        with recorded_warnings() as messages:
            compressor = register_compressor(compressed, method(2, atomic=atomic))
            for t in range(3):
                tokens = torch.tensor([t, t + 3 * rank, 7])
                for ddp in (plain, compressed):
                    ddp.zero_grad()
                    ddp(tokens).backward()
                one, other = (ddp.module.embedding.weight.grad for ddp in (plain, compressed))
                assert other.is_sparse
                close(other.to_dense(), one.to_dense(), 1e-14)
        assert any("sparse" in m for m in messages)
        assert compressor.stats.dense_buckets == 3
        # Three rows of 16 float64 values and their positions; the dense payload of this bucket is the same.
        assert 3 * 3 * (16 + 1) * 8 <= compressor.stats.bytes_sent <= compressor.stats.bytes_dense
        assert not errors(compressor.state_dict())["linear.weight"].eq(0).all()


def half_precision_parameters_keep_factors_and_errors_in_float32(rank: int, method: Callable[..., Compressor]) -> None:
    shapes = {"w": (16, 20), "bias": (16,)}
    for dtype, precision in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        ddp, compressor = prescribed(shapes, partial(method, 2), dtype)
        paid = total([step(ddp, random_gradients(shapes, rank, t, dtype)) for t in range(6)])
        owed = total([mean_gradients(shapes, 2, t, dtype) for t in range(6)])
        error = errors(compressor.state_dict())["w"]
        assert error.dtype == torch.float32
        # Each of six emitted gradients (of size below 8) is rounded to the parameter's dtype.
        close(paid["w"] + error.double(), owed["w"], 6 * 8 * precision)
        close(paid["bias"], owed["bias"], 6 * 4 * precision)


def a_narrow_wire_is_absorbed_by_error_feedback(rank: int, method: Callable[..., Compressor]) -> None:
    shapes = {"w": (16, 20)}
    for wire, precision in (("bfloat16", 2**-8), ("float16", 2**-11)):
        ddp, compressor = prescribed(shapes, partial(method, 4, wire_dtype=wire), torch.float32)
        paid, owed = torch.zeros(16, 20, dtype=torch.float64), torch.zeros(16, 20, dtype=torch.float64)
        own = {"w": _matrix(16, 20, seed=rank, dtype=torch.float32)}
        mean = _all_reduced(own["w"].double())
        gaps = []
        for _ in range(60):
            paid += step(ddp, own)["w"].double()
            owed += mean
            error = errors(compressor.state_dict())["w"].double()
            gaps.append(((paid + error - owed).norm() / mean.norm()).item())
        assert compressor.stats.bytes_sent < 0.55 * 60 * 4 * 4 * 18 * (1 if method is ACPSGD else 2) + 60 * 8
        # Each rank's own rounding is in its error; only that of the sum is not. It grows like noise, not like a bias.
        assert gaps[-1] < 60**0.5 * 10 * precision, (wire, gaps[-1])
        # The gradient itself is never paid exactly, but what is missing stays bounded.
        assert (paid - owed).norm() < 20 * mean.norm()


def bfloat16_errors_stay_close_to_exact_ones(rank: int, method: Callable[..., Compressor]) -> None:
    shapes = {"w": (16, 20)}
    ddp, compressor = prescribed(shapes, partial(method, 4, error_dtype="bfloat16"), torch.float32)
    own = {"w": _matrix(16, 20, seed=rank, dtype=torch.float32)}
    mean = _all_reduced(own["w"].double())
    paid = torch.stack([step(ddp, own)["w"].double() for _ in range(60)]).sum(0)
    local = compressor.state_dict(sync=False)["parameters"]["w"]["error"]
    assert local.dtype == torch.bfloat16
    left = errors(compressor.state_dict())["w"].double()
    # 60 roundings of an error of norm below 10 |g| to 8 bits.
    assert (paid + left - 60 * mean).norm() < 60 * 10 * 2**-9 * mean.norm()


CLAIMS = [
    zero_gradients_stay_zero_and_leave_usable_factors,
    one_row_one_column_0d_1d_and_nd_tensors_are_conserved,
    uncompressed_tensors_are_averaged_exactly,
    batched_experts_equal_each_expert_alone,
    excluded_parameters_are_sent_uncompressed,
    nothing_worth_compressing_is_said,
    tied_weights_count_once_and_frozen_ones_not_at_all,
    permuted_memory_is_compressed_and_conserved,
    complex_parameters_are_sent_uncompressed_with_a_warning,
    sparse_gradients_fall_back_to_what_plain_ddp_does,
    half_precision_parameters_keep_factors_and_errors_in_float32,
    a_narrow_wire_is_absorbed_by_error_feedback,
    bfloat16_errors_stay_close_to_exact_ones,
]


def _claim(rank: int, world_size: int, claim: Callable[..., None]) -> None:
    for method in (ACPSGD, PowerSGD):
        claim(rank, method)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_over_two_ranks(claim: Callable[..., None]) -> None:
    run_ranks(_claim, 2, claim)
