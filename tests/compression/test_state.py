"""A saved run goes on as if it had not stopped, whatever the number of ranks and the buckets."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from lightning_efficient.compression import ACPSGD, Compressor, HalfPrecision, PowerSGD, SignSGD, TopK
from tests.compression.harness import close, errors, prescribed, random_gradients, recorded_warnings, step, train
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

MAKERS: dict[str, Callable[..., Compressor]] = {
    "acp_sgd": partial(ACPSGD, 2),
    "acp_sgd with cholesky": partial(ACPSGD, 2, orthogonalization="cholesky"),
    "acp_sgd in its warm-up": partial(ACPSGD, 2, warmup_steps=8),
    "power_sgd": partial(PowerSGD, 2),
}
FIRST, THEN = 5, 6  # an odd number: the factors are out of their first phase

TARGETS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ranks": (2, {}),
    "2 ranks with other buckets": (2, {"bucket_cap_mb": 0.002, "gradient_as_bucket_view": True}),
    "4 ranks with other buckets": (4, {"bucket_cap_mb": 0.01}),
    "1 rank": (1, {}),
}
# Of all pairs of a start and a target: each of both, the same number of ranks, more and fewer.
SAMPLE = [
    (2, "2 ranks"),
    (2, "4 ranks with other buckets"),
    (4, "2 ranks with other buckets"),
    (4, "1 rank"),
]


def _through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _first_part(rank: int, world_size: int) -> dict[str, Any]:
    return {
        name: {
            "straight": train(rank, world_size, make, FIRST + THEN)["weights"],
            "start": train(rank, world_size, make, FIRST),
        }
        for name, make in MAKERS.items()
    }


def _second_part(rank: int, world_size: int, starts: dict[str, Any], ddp_kwargs: Any) -> dict[str, Any]:
    return {
        name: train(rank, world_size, make, THEN, ddp_kwargs, start=starts[name], first_step=FIRST)
        for name, make in MAKERS.items()
    }


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoints rank 0 wrote, through a file, and the final weights of the runs that did not stop."""
    parts = run_ranks(_first_part, request.param)[0]
    keep = ("weights", "optimizer", "compressor")
    starts = {name: _through_a_file({k: part["start"][k] for k in keep}) for name, part in parts.items()}
    return starts, {name: part["straight"] for name, part in parts.items()}


@pytest.mark.parametrize(
    ("saved", "target"),
    [
        pytest.param(
            start,
            target,
            id=f"from {start} ranks to {target}",
            marks=[] if (start, target) in SAMPLE else [pytest.mark.exhaustive],
        )
        for start in (2, 4)
        for target in TARGETS
    ],
    indirect=["saved"],
)
def test_a_resumed_run_equals_one_that_did_not_stop(saved: Any, target: str) -> None:
    ranks, ddp_kwargs = TARGETS[target]
    starts, straight = saved
    for results in run_ranks(_second_part, ranks, starts, ddp_kwargs):
        for name, result in results.items():
            close(result["weights"], straight[name], 1e-12)
            assert result["compressor"]["step"] == FIRST + THEN


# ---- what cannot be resumed is refused -------------------------------------------------------------------------------

SHAPES = {"a": (10, 14), "b": (14, 10)}


def _state(make: Callable[[], Compressor], shapes: Any = SHAPES, steps: int = 3) -> dict[str, Any]:
    ddp, compressor = prescribed(shapes, make)
    for t in range(steps):
        step(ddp, random_gradients(shapes, 0, t))
    return compressor.state_dict()


def _message(state: dict[str, Any], make: Callable[[], Compressor], shapes: Any = SHAPES) -> str:
    compressor = prescribed(shapes, make)[1]
    before = {n: dict(s) for n, s in compressor.state_dict()["parameters"].items()}
    try:
        compressor.load_state_dict(state)
    except RuntimeError as error:
        torch.testing.assert_close(compressor.state_dict()["parameters"], before, rtol=0, atol=0)
        return str(error)
    return "accepted"


def _refusals(rank: int, world_size: int) -> dict[str, str]:
    state = _state(partial(ACPSGD, 2))
    early = partial(ACPSGD, 2)()
    early.load_state_dict(_state(partial(ACPSGD, 2), {"other": (10, 14)}))
    try:
        prescribed(SHAPES, lambda: early)
        at_bind = "accepted"
    except RuntimeError as error:
        at_bind = str(error)
    return {
        "rank": _message(state, partial(ACPSGD, 3)),
        "method": _message(state, partial(PowerSGD, 2)),
        "names": _message(state, partial(ACPSGD, 2), {"a": (10, 14), "c": (14, 10)}),
        "shape": _message(state, partial(ACPSGD, 2), {"a": (10, 14), "b": (14, 11)}),
        "at bind": at_bind,
    }


@pytest.fixture(scope="module")
def refusals() -> dict[str, str]:
    return run_ranks(_refusals, 1)[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rank", ["rank=2", "rank=3", "Set the saved value"]),
        ("method", ["'acp_sgd'", "'power_sgd'", "cannot be converted"]),
        ("names", ["another model", "missing ['c']", "unexpected ['b']"]),
        ("shape", ["factors of b", "(2, 14)", "(2, 10)", "(2, 11)"]),
        ("at bind", ["another model", "missing ['a', 'b']", "unexpected ['other']"]),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(refusals: Any, change: str, words: list[str]) -> None:
    for word in words:
        assert word in refusals[change]


# ---- without errors --------------------------------------------------------------------------------------------------


def _without_errors(rank: int, world_size: int) -> dict[str, Any]:
    results = {}
    for name, make in {"acp_sgd": partial(ACPSGD, 2), "top_k": partial(TopK, 0.1)}.items():
        ddp, compressor = prescribed(SHAPES, make)
        for t in range(3):
            step(ddp, random_gradients(SHAPES, rank, t))
        state = compressor.state_dict(include_error=False)
        assert not any(key.startswith("error") for s in state["parameters"].values() for key in s)
        compressor = prescribed(SHAPES, make)[1]
        with recorded_warnings() as messages:
            compressor.load_state_dict(_through_a_file(state))
        results[name] = messages, errors(compressor.state_dict())
    return results


def test_a_state_without_errors_starts_them_from_zero_and_says_so_once() -> None:
    for results in run_ranks(_without_errors, 2):
        for messages, error in results.values():
            assert len(messages) == 1
            assert "error feedback starts from zero" in messages[0]
            assert set(error) == set(SHAPES)
            assert all(not e.any() for e in error.values())


# ---- the form of a state ---------------------------------------------------------------------------------------------

ALL: dict[str, Callable[[], Compressor]] = {
    "acp_sgd": partial(ACPSGD, 2),
    "power_sgd": partial(PowerSGD, 2),
    "top_k": partial(TopK, 0.1),
    "sign_sgd": SignSGD,
    "half": HalfPrecision,
}


def _states(rank: int, world_size: int) -> dict[str, Any]:
    return {name: _state(make) for name, make in ALL.items()}


def _leaves(value: Any) -> list[Any]:
    if type(value) is dict:
        return [leaf for k, v in value.items() for leaf in [k, *_leaves(v)]]
    if type(value) is list:
        return [leaf for v in value for leaf in _leaves(v)]
    return [value]


def test_states_are_plain_and_load_with_weights_only() -> None:
    for name, state in run_ranks(_states, 1)[0].items():
        assert {type(leaf) for leaf in _leaves(state)} <= {str, int, float, bool, torch.Tensor}, name
        loaded = _through_a_file(state)
        assert loaded.keys() == {"version", "method", "step", "settings", "parameters"}
        assert loaded["step"] == 3


def _a_copy(rank: int, world_size: int) -> bool:
    ddp, compressor = prescribed(SHAPES, partial(ACPSGD, 2))
    step(ddp, random_gradients(SHAPES, rank, 0))
    state = compressor.state_dict(sync=False)
    before = _through_a_file(state)
    step(ddp, random_gradients(SHAPES, rank, 1))
    torch.testing.assert_close(state["parameters"], before["parameters"], rtol=0, atol=0)
    return True


def test_a_state_is_a_copy_that_later_steps_do_not_change() -> None:
    assert all(run_ranks(_a_copy, 2))
