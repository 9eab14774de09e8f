"""What a user, a machine or another rank can do wrong ends in an error that says so, on every rank, soon."""

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient.compression import (
    ACPSGD,
    COMPRESSORS,
    Compressor,
    HalfPrecision,
    PowerSGD,
    TopK,
    check_replicas,
    register_compressor,
)
from lightning_efficient.compression.replicas import check_same_parameters
from tests.compression.harness import make_model, prescribed, random_gradients, step
from tests.support.ranks import rank_outcomes, run_ranks

pytestmark = pytest.mark.distributed

SHAPES = {"a": (10, 14), "b": (14, 10), "c": (12, 12)}


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ACPSGD(rank=0), r"rank must be >= 1, got 0"),
        (lambda: PowerSGD(rank=-2), r"rank must be >= 1, got -2"),
        (lambda: ACPSGD(warmup_steps=-1), r"warmup_steps is -1.*0 or more"),
        (lambda: ACPSGD(min_compression_rate=-0.5), r"min_compression_rate must be >= 0, got -0\.5"),
        (lambda: ACPSGD(wire_dtype="int8"), r"wire_dtype is 'int8'.*'bfloat16'"),  # type: ignore[arg-type]
        (lambda: ACPSGD(error_dtype="float16"), r"error_dtype is 'float16'.*'bfloat16'"),  # type: ignore[arg-type]
        (lambda: ACPSGD(orthogonalization="gs"), r"orthogonalization is 'gs'.*'qr'"),  # type: ignore[arg-type]
        (lambda: ACPSGD(matrix_view={"e": "columns"}), r"matrix_view\['e'\] is 'columns'.*'batched'"),
        (lambda: TopK(density=0), r"density is 0.*\(0, 1\]"),
        (lambda: TopK(density=1.5), r"density is 1\.5"),
        (lambda: HalfPrecision(dtype="float8"), r"dtype is 'float8'.*'bfloat16'"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(make: Callable[[], Compressor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_compressors_are_found_by_the_names_recipes_use() -> None:
    assert set(COMPRESSORS) == {"acp_sgd", "power_sgd", "top_k", "sign_sgd", "half"}
    for name, kind in COMPRESSORS.items():
        assert kind().method == name


def _bad_models(rank: int, world_size: int) -> list[str]:
    messages = []
    ddp = DistributedDataParallel(make_model())
    register_compressor(ddp, ACPSGD())
    skipping = DistributedDataParallel(make_model(), skip_all_reduce_unused_params=True)
    for model, compressor in ((ddp, ACPSGD()), (ddp, PowerSGD()), (skipping, ACPSGD())):
        try:
            register_compressor(model, compressor)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_second_hook_and_buckets_that_bypass_it_are_refused() -> None:
    for messages in run_ranks(_bad_models, 2):
        assert len(messages) == 3
        assert all("already has a communication hook" in m for m in messages[:2])
        assert "skip_all_reduce_unused_params" in messages[2]


# ---- replicas --------------------------------------------------------------------------------------------------------


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def _different_models(rank: int, world_size: int) -> dict[str, str]:
    def module(**shapes: tuple[int, ...]) -> list[tuple[str, Tensor]]:
        return [(name, torch.zeros(shape)) for name, shape in shapes.items()]

    odd = rank == 1
    renamed = nn.ModuleDict({"right" if odd else "left": nn.Linear(12, 12)})
    renamed.forward = lambda x: x  # type: ignore[method-assign]
    frozen = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    named = list(frozen.named_parameters())
    return {
        "same": _message(lambda: check_same_parameters(module(a=(2, 3), b=(4,)))),
        "shape": _message(lambda: check_same_parameters(module(a=(2, 3), b=(5,) if odd else (4,)))),
        "count": _message(lambda: check_same_parameters(module(a=(2, 3)) if odd else module(a=(2, 3), b=(4,)))),
        "order": _message(lambda: check_same_parameters(module(b=(4,), a=(4,)) if odd else module(a=(4,), b=(4,)))),
        "dtype": _message(lambda: check_same_parameters([("a", torch.zeros(2, dtype=torch.half if odd else None))])),
        "name": _message(lambda: register_compressor(DistributedDataParallel(renamed), ACPSGD())),
        "frozen": _message(lambda: ACPSGD().bind(named[odd * 2 :])),
    }


def test_parameters_that_differ_across_ranks_are_named_on_every_rank() -> None:
    one, other = run_ranks(_different_models, 2)
    assert one == other
    assert one.pop("same") == "accepted"
    for message in one.values():
        assert "the trainable parameters differ across ranks" in message
        assert "rank 1" in message
    assert "[b: float32 (4,)] where rank 1 has [b: float32 (5,)]" in one["shape"]
    assert "[b: float32 (4,)] where rank 1 has [nothing]" in one["count"]
    assert "[a: float32 (4,)] where rank 1 has [b: float32 (4,)]" in one["order"]
    assert "[a: float32 (2,)] where rank 1 has [a: float16 (2,)]" in one["dtype"]
    assert "[left.weight: float32 (12, 12)] where rank 1 has [right.weight: float32 (12, 12)]" in one["name"]


def _drift(rank: int, world_size: int) -> dict[str, str]:
    messages = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.complex64):
        same = torch.ones(3, 4, dtype=dtype)
        drifted = torch.ones(2, dtype=dtype)
        check_replicas([("same", same), ("drifted", drifted)], step=6)
        if rank == 1:
            drifted[1] += 0.5
        named = [("same", same), ("drifted", drifted), ("none", torch.zeros(0, dtype=dtype))]
        messages[str(dtype)] = _message(lambda n=named: check_replicas(n, step=7))
    signs = torch.tensor([0.0 if rank else -0.0])
    messages["one bit"] = _message(lambda: check_replicas([("sign", signs)], step=7))
    check_replicas([], step=7)
    return messages


def test_the_replica_check_names_the_parameter_that_drifted_and_how_far() -> None:
    one, other = run_ranks(_drift, 2)
    assert one == other
    assert "sign differs" in one.pop("one bit")
    for message in one.values():
        assert "drifted differs by up to 0.5" in message
        assert "step 7" in message
        assert "1 of 3" in message


# ---- faults while training -------------------------------------------------------------------------------------------


def _killed_in_backward(rank: int, world_size: int, make: Callable[[], Compressor]) -> None:
    ddp, _ = prescribed(SHAPES, make, bucket_cap_mb=0.0005)
    step(ddp, random_gradients(SHAPES, rank, 0))
    if rank == 1:
        calls = 0

        def die(grad: Tensor) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:  # in the middle: some buckets are on their way, others are not
                os.kill(os.getpid(), signal.SIGKILL)

        for p in ddp.module.parameters():
            p.register_hook(die)
    for t in range(1, 4):
        step(ddp, random_gradients(SHAPES, rank, t))


MAKERS: dict[str, Callable[..., Compressor]] = {
    "acp_sgd": partial(ACPSGD, 2),
    "acp_sgd atomic": partial(ACPSGD, 2, atomic=True),
    "power_sgd": partial(PowerSGD, 2),
    "top_k": partial(TopK, 0.1),
}


@pytest.mark.parametrize("method", MAKERS)
def test_when_a_rank_is_killed_in_backward_the_others_end_with_an_error_soon(method: str) -> None:
    outcomes = rank_outcomes(_killed_in_backward, 3, MAKERS[method], timeout=60)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.status == "raised", outcome
        assert "backward" in outcome.error
        assert outcome.seconds < 40, "at once, not when the group's timeout is over"


class _Broken(ACPSGD):
    """Fails in the callback when told to, as a kernel that runs out of memory would."""

    broken = False

    def _decode(self, job: Any, ok: Any) -> Tensor:
        if self.broken:
            raise FloatingPointError("the decoder broke")
        return super()._decode(job, ok)


class _BrokenPower(PowerSGD):
    broken = False

    def _decode(self, *args: Any) -> Tensor:
        if self.broken:
            raise FloatingPointError("the decoder broke")
        return super()._decode(*args)


def _breaks(rank: int, world_size: int, make: Callable[[], Compressor]) -> str:
    ddp, compressor = prescribed(SHAPES, make, bucket_cap_mb=0.0005)
    for t in range(2):
        step(ddp, random_gradients(SHAPES, rank, t))
    compressor.broken = True
    return _message(lambda: step(ddp, random_gradients(SHAPES, rank, 2)))


@pytest.mark.parametrize("atomic", [False, True], ids=["each bucket", "atomic"])
@pytest.mark.parametrize("kind", [_Broken, _BrokenPower], ids=["acp_sgd", "power_sgd"])
def test_an_error_in_a_callback_ends_the_backward_pass_instead_of_hanging(kind: Any, atomic: bool) -> None:
    for message in run_ranks(_breaks, 2, partial(kind, 2, atomic=atomic), timeout=40):
        assert "the decoder broke" in message
