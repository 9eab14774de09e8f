"""Parameters that a step does not use keep their state; those used now and then still get what they are owed."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.compression import ACPSGD, PowerSGD, TopK
from tests.compression.harness import close, equal, errors, prescribed, random_gradients, step
from tests.compression.reference import initial_basis
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

SHAPES = {"a": (10, 14), "b": (14, 10), "raw": (5,)}
MAKERS = {"acp_sgd": partial(ACPSGD, 2), "power_sgd": partial(PowerSGD, 2), "top_k": partial(TopK, 0.2)}


def _patterns(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for method, make in MAKERS.items():
        ddp, compressor = prescribed(SHAPES, make, find_unused_parameters=True)
        emitted = [step(ddp, random_gradients(SHAPES, rank, t)) for t in range(3)]
        own = [random_gradients(SHAPES, rank, t) for t in range(3)]
        before = compressor.state_dict(sync=False)["parameters"]

        without_b = {n: g for n, g in random_gradients(SHAPES, rank, 3).items() if n != "b"}
        emitted.append(step(ddp, without_b))  # b unused on every rank
        own.append(without_b)
        after = compressor.state_dict(sync=False)["parameters"]

        on_rank_0 = {n: g for n, g in random_gradients(SHAPES, rank, 4).items() if n != "b" or rank == 0}
        emitted.append(step(ddp, on_rank_0))  # b used on rank 0 only
        own.append(on_rank_0)
        emitted.append(step(ddp, random_gradients(SHAPES, rank, 5)))
        own.append(random_gradients(SHAPES, rank, 5))
        results[method] = {
            "before": before,
            "after": after,
            "emitted": emitted,
            "own": own,
            "mean_error": errors(compressor.state_dict()),
        }
    return results


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return run_ranks(_patterns, 2)


@pytest.mark.parametrize("method", MAKERS)
def test_a_parameter_unused_on_every_rank_gets_no_gradient_and_keeps_its_state(runs: Any, method: str) -> None:
    for results in runs:
        result = results[method]
        assert set(result["emitted"][3]) == {"a", "raw"}
        equal(result["after"]["b"], result["before"]["b"])
        key = next(key for key in result["after"]["a"] if key.startswith("error"))
        assert not torch.equal(result["after"]["a"][key], result["before"]["a"][key])


@pytest.mark.parametrize("method", MAKERS)
def test_nothing_is_lost_when_a_parameter_is_used_on_some_ranks_or_none(runs: Any, method: str) -> None:
    for name, shape in SHAPES.items():
        zero = torch.zeros(shape, dtype=torch.float64)
        owed = sum((g.get(name, zero) for results in runs for g in results[method]["own"]), start=zero) / 2
        for results in runs:
            paid = sum((g.get(name, zero) for g in results[method]["emitted"]), start=zero)
            error = results[method]["mean_error"].get(name)
            close(paid if error is None else paid + error.view(shape), owed, 1e-12)


# ---- alternating parameters: a GAN's two nets, a freeze schedule -----------------------------------------------------

ALTERNATING = {"generator": (8, 8), "critic": (8, 8)}
STEPS = 300


def _constant(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(8, 8, generator=generator, dtype=torch.float64)


def _alternate(rank: int, world_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ddp, _ = prescribed(ALTERNATING, partial(ACPSGD, rank=1), find_unused_parameters=True)
    paid = {name: torch.zeros(8, 8, dtype=torch.float64) for name in ALTERNATING}
    owed = {name: torch.zeros(8, 8, dtype=torch.float64) for name in ALTERNATING}
    names = list(ALTERNATING)
    for t in range(STEPS):
        name = names[t % 2]
        own = {name: _constant(name)}
        paid[name] += step(ddp, own)[name]
        owed[name] += own[name]
    return paid, owed


def _relative_error_with_one_parity_for_all() -> float:
    """What a parameter used in every second backward suffers from a global turn: it stays in one subspace."""
    basis, gradient = initial_basis("generator", 8, 1), _constant("generator")
    error = torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(STEPS // 2):
        a = gradient + error
        error = a - a @ basis @ basis.T
    return (error.norm() / (gradient * STEPS / 2).norm()).item()


def test_parameters_used_in_every_second_backward_get_all_they_are_owed() -> None:
    assert _relative_error_with_one_parity_for_all() > 0.5, "this setting must tell the two apart"
    for paid, owed in run_ranks(_alternate, 2):
        for name in ALTERNATING:
            # A bounded error over 150 uses.
            assert (paid[name] - owed[name]).norm() < 0.1 * owed[name].norm()
