"""Whatever the model and the buckets: nothing is lost, and nothing but one collective per bucket is sent."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lightning_efficient.compression import ACPSGD, PowerSGD, TopK
from tests.compression.harness import close, errors, mean_gradients, prescribed, random_gradients, total
from tests.support.collectives import count_collectives
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASES_PER_START = 12
# Sums of up to six steps of gradients of size one, through products of up to a hundred terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-4}
COLLECTIVES = {"acp_sgd": 1, "power_sgd": 2, "top_k": 1}


@dataclass(frozen=True)
class Case:
    method: str
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    ddp_kwargs: dict[str, Any]
    steps: int


def _settings(method: str) -> st.SearchStrategy[dict[str, Any]]:
    atomic = st.sampled_from([None, True])
    if method == "top_k":
        return st.fixed_dictionaries({"density": st.floats(0.01, 1), "atomic": atomic})
    return st.fixed_dictionaries(
        {
            "rank": st.integers(1, 6),
            "min_compression_rate": st.sampled_from([0.0, 1.0, 2.0]),
            "orthogonalization": st.sampled_from(["qr", "cholesky"]),
            "warmup_steps": st.integers(0, 2),
            "matrix_view": st.sampled_from([None, {"3$": "batched"}]),
            "atomic": atomic,
        }
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    method = draw(st.sampled_from(sorted(COLLECTIVES)))
    shapes = draw(st.lists(st.lists(st.integers(1, 9), max_size=4).map(tuple), min_size=1, max_size=7))
    return Case(
        method,
        draw(_settings(method)),
        {f"p{i}_{len(shape)}": shape for i, shape in enumerate(shapes)},
        draw(st.sampled_from(sorted(TOLERANCE, key=str))),
        {
            "bucket_cap_mb": draw(st.sampled_from([1e-5, 1e-3, 25])),
            "gradient_as_bucket_view": draw(st.booleans()),
            "find_unused_parameters": draw(st.booleans()),
        },
        draw(st.integers(1, 6)),
    )


MAKERS = {"acp_sgd": ACPSGD, "power_sgd": PowerSGD, "top_k": TopK}


def _run(rank: int, world_size: int, drawn: list[Case]) -> list[dict[str, Any]]:
    results = []
    for case in drawn:
        make = partial(MAKERS[case.method], **case.settings)
        ddp, compressor = prescribed(case.shapes, make, case.dtype, **case.ddp_kwargs)
        emitted, collectives = [], 0
        for t in range(case.steps):
            own = random_gradients(case.shapes, rank, t, case.dtype)
            ddp.zero_grad()
            loss = ddp(own)
            with count_collectives() as seen:
                loss.backward()
            collectives += sum(c.op != "broadcast" for c in seen)
            emitted.append({name: p.grad.clone() for name, p in ddp.module.named_parameters()})
        stats = compressor.stats
        expected = stats.dense_buckets + COLLECTIVES[case.method] * (stats.buckets - stats.dense_buckets)
        if case.ddp_kwargs["find_unused_parameters"]:
            collectives -= case.steps  # DDP's own, of the map of used parameters
        results.append(
            {
                "emitted": total(emitted),
                "state": compressor.state_dict(),
                "collectives": collectives,
                "expected": expected,
            }
        )
    return results


@settings(
    max_examples=2,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # a smaller example costs a start of all ranks each: print, don't shrink
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    print_blob=False,
)
@given(drawn=st.lists(cases(), min_size=CASES_PER_START, max_size=CASES_PER_START))
@pytest.mark.parametrize("world_size", [2, 3])
def test_emitted_gradients_plus_mean_error_are_the_sum_of_mean_gradients(world_size: int, drawn: list[Case]) -> None:
    by_rank = run_ranks(_run, world_size, drawn)
    for i, case in enumerate(drawn):
        tolerance = TOLERANCE[case.dtype]
        owed = total([mean_gradients(case.shapes, world_size, t, case.dtype) for t in range(case.steps)])
        first = by_rank[0][i]
        paid = first["emitted"]
        for name, error in errors(first["state"]).items():
            paid[name] += error.view(paid[name].shape)
        close(paid, owed, tolerance)
        for results in by_rank:
            assert results[i]["collectives"] == results[i]["expected"], case
