"""Loads become even by a bias for the choice alone, which all ranks move alike, whatever the schedule."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.models import MoELlamaLM
from lightning_efficient.moe import (
    FixedSchedule,
    MoELayer,
    MoESizes,
    MoETopology,
    aux_loss,
    balance,
    balance_loads,
    parallelize,
    schedule_named,
)
from lightning_efficient.moe.hf import unswap_state_dict
from lightning_efficient.strategies import FullyShardedStrategy
from tests.support.ranks import run_ranks
from tests.support.trainers import make_trainer

S, M, E, K = 24, 8, 8, 2
RATE = 0.01


def layer_of(**options: Any) -> MoELayer:
    torch.manual_seed(0)
    options = {"capacity_factor": None, "aux_loss_coef": 0.0, "balance_rate": RATE, **options}
    return MoELayer(M, 16, E, K, **options)


def tokens(seed: int, rows: int = S) -> Tensor:
    """Tokens with something in common, so that some experts are everyone's favourites."""
    return torch.randn(rows, M, generator=torch.Generator().manual_seed(seed)) + 1.0


def bias_of(layer: MoELayer) -> Tensor:
    assert layer.router.balance is not None
    return layer.router.balance.bias.clone()


def peak(layer: MoELayer) -> float:
    """Load of the busiest expert over the mean, on tokens that were not seen before."""
    layer.eval()(tokens(999, 2000))
    layer.train()
    assert layer.stats is not None
    counts = layer.router.counts(layer.stats.load)
    return float(counts.max() / counts.mean())


def test_skewed_loads_become_even_without_a_loss() -> None:
    layer = layer_of(balance_rate=0.003)
    before = peak(layer)
    for step in range(200):
        layer(tokens(step, 200))
        balance_loads(layer)
    assert before > 2.5
    assert peak(layer) < 1.25


def test_a_step_moves_each_bias_by_the_rate_against_its_load() -> None:
    layer = layer_of()
    counts = torch.zeros(E)
    for seed in range(2):  # both count, as with accumulated gradients
        layer(tokens(seed))
        assert layer.stats is not None
        counts += layer.router.counts(layer.stats.load)
    assert len({int(each) for each in counts}) > 2
    balance_loads(layer)
    assert torch.equal(bias_of(layer), RATE * (2 * S * K / E - counts).sign())
    balance_loads(layer)  # nothing new
    assert torch.equal(bias_of(layer), RATE * (2 * S * K / E - counts).sign())


def test_evaluation_and_another_run_in_a_checkpoint_change_nothing() -> None:
    plain, other = layer_of(), layer_of()
    for step in range(5):
        plain(tokens(step)).sum().backward()
        other.eval()(tokens(50 + step))
        checkpoint(other.train(), tokens(step), use_reentrant=False).sum().backward()
        balance_loads(plain)
        balance_loads(other)
    assert bias_of(plain).abs().max() >= 3 * RATE
    assert torch.equal(bias_of(plain), bias_of(other))


def test_a_step_moves_what_its_optimizer_trains_and_nothing_frozen() -> None:
    model = nn.ModuleList([layer_of(), layer_of(), layer_of()])
    model[2].requires_grad_(False)
    for layer in model:
        layer(tokens(0))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    balance_loads(model, optimizer)
    assert [bool(bias_of(layer).any()) for layer in model] == [True, False, False]  # type: ignore[arg-type]
    balance_loads(model)
    assert [bool(bias_of(layer).any()) for layer in model] == [True, True, False]  # type: ignore[arg-type]


def test_the_bias_chooses_and_does_not_weigh() -> None:
    layer = layer_of()
    layer.router.balance.bias[3] = 10.0  # type: ignore[union-attr]
    routing = layer.router(tokens(0))
    probs = torch.nn.functional.linear(tokens(0), layer.router.weight).softmax(1)
    assert (routing.expert_Sk[:, 0] == 3).all()
    chosen = probs.gather(1, routing.expert_Sk)
    torch.testing.assert_close(routing.weight_Sk, chosen / chosen.sum(1, keepdim=True))


def test_it_is_stored_and_stays_float32() -> None:
    layer = layer_of().to(torch.bfloat16)
    layer.router.balance.bias += 1.001  # type: ignore[union-attr]
    assert bias_of(layer.to("cpu", torch.bfloat16)).dtype == torch.float32
    other = layer_of().to(torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(bias_of(other), torch.full((E,), 1.001))
    assert other(tokens(0).bfloat16()).dtype == torch.bfloat16
    other.router.reset_parameters()
    assert not bias_of(other).any()


def test_without_a_rate_there_is_no_bias() -> None:
    layer = layer_of(balance_rate=0.0)
    assert layer.router.balance is None
    assert not any("balance" in name for name in layer.state_dict())
    layer(tokens(0))
    balance_loads(layer)
    balance_loads(nn.Linear(1, 1))


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_bad_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="balance_rate is"):
        layer_of(balance_rate=rate)


def test_a_loop_that_forgets_to_move_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "_FORGOTTEN", 5)
    layer = layer_of()
    for _ in range(4):
        layer(tokens(0, 2))
    with pytest.warns(UserWarning, match="Call lightning_efficient.moe.balance_loads"):
        layer(tokens(0, 2))


def test_transformers_has_no_such_model() -> None:
    with pytest.raises(ValueError, match="chosen without a bias"):
        unswap_state_dict(layer_of())


# ---- ranks ---------------------------------------------------------------------------------------------------------

SIZES = (MoESizes(2, 2, 2), MoESizes(1, 4, 1), MoESizes(4, 1, 2), MoESizes(2, 2, 1))
SCHEDULES = ("paper", "deepspeed", "s1", "s2", "s1_hier_packed/2")
STEPS = 6


def trained(layer: MoELayer, data_rank: int | None, data_ranks: int) -> list[list[float]]:
    """Biases after each step; `data_rank` None: of all tokens together."""
    found = []
    for step in range(STEPS):
        parts = tokens(step, S * data_ranks).double().chunk(data_ranks)
        layer(torch.cat(parts) if data_rank is None else parts[data_rank])
        balance_loads(layer)
        found.append(bias_of(layer).tolist())
    return found


def _biases(rank: int, world_size: int) -> dict[Any, list[list[float]]]:
    found = {}
    for sizes in SIZES:
        topology = MoETopology.create(sizes)
        for label in SCHEDULES:
            layer = layer_of().double()
            parallelize(layer, topology, scheduler=FixedSchedule(schedule_named(label)))
            found[sizes, label] = trained(layer, topology.dp.rank, topology.dp.size)
    return found


@pytest.mark.distributed
def test_ranks_move_it_as_one_process_does() -> None:
    of_ranks = run_ranks(_biases, 4, timeout=120)
    for sizes in SIZES:
        expected = trained(layer_of().double(), None, 4 // sizes.model_parallel)
        assert any(expected[-1])
        for label in SCHEDULES:
            assert [each[sizes, label] for each in of_ranks] == [expected] * 4, (sizes, label)


# ---- in a Trainer, without the strategy of its own -----------------------------------------------------------------


def test_the_language_model_moves_it_under_any_strategy() -> None:
    model = MoELlamaLM(num_layers=2, hidden_size=16, ffn_size=16, num_heads=2, balance_rate=RATE)
    rows = [torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    batches = [{"input_ids": each[:, :-1], "labels": each[:, 1:]} for each in rows]
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer: pl.Trainer = make_trainer(1, strategy="auto", accumulate_grad_batches=2, max_epochs=1, limit_val_batches=0)
    trainer.fit(model, loader, loader)
    for layer in (each for each in model.modules() if isinstance(each, MoELayer)):
        steps = (bias_of(layer) / RATE).round(decimals=3)  # two: each moves a bias up, down or not at all
        assert steps.any()
        assert set(steps.abs().tolist()) <= {0.0, 1.0, 2.0}


def test_a_forward_without_gradients_is_told_where_its_losses_should_train() -> None:
    model = nn.Sequential(layer_of(aux_loss_coef=0.01))
    y = checkpoint(model, tokens(0).requires_grad_(), use_reentrant=True)
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        (y.sum() + aux_loss(model)).backward()


def language_model() -> MoELlamaLM:
    torch.manual_seed(0)
    return MoELlamaLM(num_layers=2, hidden_size=16, ffn_size=16, num_heads=2, balance_rate=RATE, aux_loss_coef=0.0)


def rows_of(steps: int) -> Tensor:
    return torch.randint(256, (steps, 4, 17), generator=torch.Generator().manual_seed(0))


def fitted(world_size: int, strategy: Any, rank: int) -> list[list[float]]:
    model = language_model()
    mine = [each[rank::world_size] for each in rows_of(6)]
    batches = [{"input_ids": each[:, :-1], "labels": each[:, 1:]} for each in mine]
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    make_trainer(world_size, strategy=strategy, precision=32, max_epochs=1, limit_val_batches=0).fit(
        model, loader, loader
    )
    return [bias_of(layer).tolist() for layer in model.modules() if isinstance(layer, MoELayer)]


def _under_strategies(rank: int, world_size: int) -> list[list[list[float]]]:
    return [fitted(world_size, strategy, rank) for strategy in ("ddp", FullyShardedStrategy())]


@pytest.mark.distributed
def test_ranks_under_ddp_and_fsdp_have_the_bias_of_one_process() -> None:
    expected = fitted(1, "auto", 0)
    assert any(map(any, expected))
    for rank in run_ranks(_under_strategies, 2, timeout=120):
        assert rank == [expected, expected]
