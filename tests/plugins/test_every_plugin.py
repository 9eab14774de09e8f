"""What every plugin owes its user, held for each row of the table on two real ranks."""

import pytest
import torch
from torch import Tensor

from tests.plugins.evidence import EPOCHS, Modes, State, Training, other_modes, stop_and_go_on, train
from tests.plugins.references import train_reference
from tests.plugins.table import EXACT, ROWS
from tests.plugins.tiny import BATCHES
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

WORLD_SIZE = 2
every_row = pytest.fixture(scope="module", params=ROWS)


@every_row
def row_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def training(row_name: str) -> list[Training]:
    return run_ranks(train, WORLD_SIZE, row_name)


@pytest.fixture(scope="module")
def state(row_name: str, tmp_path_factory: pytest.TempPathFactory) -> list[State]:
    return run_ranks(stop_and_go_on, WORLD_SIZE, row_name, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.fixture(scope="module")
def modes(row_name: str) -> list[Modes]:
    return run_ranks(other_modes, WORLD_SIZE, row_name)


def close(actual: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_it_trains(training: list[Training]) -> None:
    first, last = (sum(sum(rank.losses[part]) for rank in training) for part in (slice(BATCHES), slice(-BATCHES, None)))
    assert last < 0.7 * first
    assert all(rank.moved > 0.1 for rank in training)


def test_it_did_something(training: list[Training]) -> None:
    assert all(rank.activity > rank.activity_before for rank in training)


def test_the_ranks_stay_bit_identical(training: list[Training]) -> None:
    assert torch.equal(training[0].weights, training[1].weights)


def test_it_equals_its_oracles(row_name: str, training: list[Training]) -> None:
    for key, oracle in ROWS[row_name].oracles.items():
        expected = train_reference(
            oracle.reference, world_size=WORLD_SIZE, epochs=EPOCHS, make_module=ROWS[row_name].module
        )
        for rank in training:
            close(rank.in_oracles[key], expected)


def test_hooks_threads_and_ddp_are_gone_afterwards(training: list[Training]) -> None:
    for rank in training:
        assert rank.hooks_left == []
        assert rank.threads_left == []
        assert not rank.ddp_left


def test_resuming_equals_not_having_stopped(row_name: str, state: list[State]) -> None:
    for rank in state:
        assert rank.steps_resumed == BATCHES
        close(rank.resumed, rank.in_one_go, EXACT)


def test_two_fits_equal_one(state: list[State]) -> None:
    for rank in state:
        close(rank.in_two_fits, rank.in_one_go)


def test_accumulation_equals_a_big_batch(modes: list[Modes]) -> None:
    for rank in modes:
        close(rank.accumulated, rank.big_batch)


def test_bf16_mixed_trains(modes: list[Modes]) -> None:
    for rank in modes:
        assert rank.bf16_dtypes <= {torch.float32, torch.float64}
        assert sum(rank.bf16_losses[-BATCHES:]) < 0.7 * sum(rank.bf16_losses[:BATCHES])
    assert torch.equal(modes[0].bf16_weights, modes[1].bf16_weights)


def test_it_validates_and_predicts_alone(modes: list[Modes]) -> None:
    for rank in modes:
        assert rank.val_loss == rank.val_loss_plain
        assert torch.equal(rank.predicted, rank.predicted_plain)
