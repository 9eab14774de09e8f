"""The mask that follows from a seed: its statistics, and that backward always meets forward's."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa
from lightning_efficient.lora_fa.dropout import draw_seed, keep_mask, threshold
from lightning_efficient.lora_fa.projection import add_expanded, project
from tests.lora_fa.nets import adapted_block, block, fill_B, gradients, ids, llama, normal

CPU = torch.device("cpu")
SEEDS = range(6)


def mask(seed: int, rows: int = 512, columns: int = 384, p: float = 0.5) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return keep_mask(draw_seed(), (0, rows), columns, p, CPU)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.001, 0.05, 0.3, 0.5, 0.9])
def test_the_keep_rate_is_binomial(seed: int, p: float) -> None:
    kept = mask(seed, p=p)
    deviation = (float(kept.double().mean()) - (1 - p)) / math.sqrt(p * (1 - p) / kept.numel())

    assert abs(deviation) < 4.5  # in standard deviations; the seeds are fixed


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_and_columns_are_as_uneven_as_chance_makes_them(seed: int, dim: int) -> None:
    kept = mask(seed).double()
    counts = kept.sum(dim)
    chi2 = float(((counts - kept.shape[dim] / 2) ** 2).sum() / (kept.shape[dim] / 4))
    freedom = len(counts)

    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_and_distant_entries_are_uncorrelated(seed: int) -> None:
    signs = mask(seed).double() * 2 - 1
    for rows, columns in [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 32), (64, 0), (128, 128), (0, 256), (256, 0)]:
        a = signs[: len(signs) - rows, : signs.shape[1] - columns]
        product = a * signs[rows:, columns:]

        assert abs(float(product.sum())) < 5 * math.sqrt(product.numel()), (rows, columns)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("step", [1, 2, 64])
def test_four_corners_of_a_box_are_uncorrelated(seed: int, step: int) -> None:
    """A mask that is a sum of a row's and a column's bit would give 1 here: the mix has to break it."""
    signs = mask(seed).double() * 2 - 1
    corners = signs[:-step, :-step] * signs[step:, :-step] * signs[:-step, step:] * signs[step:, step:]

    assert abs(float(corners.sum())) < 5 * math.sqrt(corners.numel())


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_of_seeds_that_differ_in_one_bit_are_uncorrelated(seed: int) -> None:
    torch.manual_seed(seed)
    one = draw_seed()
    first = keep_mask(one, (0, 256), 256, 0.5, CPU).double() * 2 - 1
    for word in (0, 1):
        for bit in (0, 7, 30):
            other = one.clone()
            other[word] ^= 1 << bit
            second = keep_mask(other, (0, 256), 256, 0.5, CPU).double() * 2 - 1

            assert abs(float((first * second).sum())) < 5 * 256


@pytest.mark.parametrize(("p", "expected"), [(0.0, -(2**31)), (0.5, 0), (1 - 1e-12, 2**31 - 1)])
def test_the_threshold_is_an_int32(p: float, expected: int) -> None:
    assert threshold(p) == expected


@pytest.mark.parametrize("first_row", [0, 1, 33, 2**31 - 300])
def test_a_mask_does_not_depend_on_where_a_block_starts(first_row: int) -> None:
    torch.manual_seed(0)
    seed = draw_seed()
    whole = keep_mask(seed, (first_row, first_row + 256), 64, 0.4, CPU)
    parts = [keep_mask(seed, (first_row + a, first_row + a + 64), 64, 0.4, CPU) for a in range(0, 256, 64)]

    assert torch.equal(torch.cat(parts), whole)


def test_products_of_a_part_of_the_rows_are_parts_of_the_product() -> None:
    torch.manual_seed(0)
    seed, x, A, u = draw_seed(), normal(300, 1000), normal(5, 1000, seed=1), normal(300, 5, seed=2)
    whole, dx = project(x, A, seed, 0.4), normal(300, 1000, seed=3)
    expanded = dx.clone()
    add_expanded(expanded, u, A, seed, 0.4)
    for start, stop in ((0, 7), (7, 200), (200, 300)):
        part = dx[start:stop].clone()
        add_expanded(part, u[start:stop], A, seed, 0.4, start)

        torch.testing.assert_close(project(x[start:stop], A, seed, 0.4, start), whole[start:stop])
        torch.testing.assert_close(part, expanded[start:stop])


def test_two_modules_and_two_calls_drop_differently() -> None:
    base = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    apply_lora_fa(base, LoRAFAConfig(r=64, dropout=0.5, seed=1))
    x = torch.eye(64)
    with torch.no_grad():
        for layer in base:
            layer.base_layer.weight.zero_()
            layer.lora_A["default"].weight.copy_(torch.eye(64))
            layer.lora_B["default"].weight.copy_(torch.eye(64))
        torch.manual_seed(0)
        kept = [layer(torch.ones_like(x)) != 0 for layer in (base[0], base[1], base[0])]

    for i, j in ((0, 1), (0, 2), (1, 2)):
        agree = float((kept[i] == kept[j]).double().mean())
        assert abs(agree - 0.5) < 5 * 0.5 / 64


@pytest.mark.parametrize("mode", ["recompute", "lowrank", "saved"])
def test_another_consumer_of_randomness_changes_nothing(mode: Any) -> None:
    results = []
    for disturb in (False, True):
        model, x = adapted_block(dropout=0.4, dropout_mode=mode), normal(8, 12, dtype=torch.float32, grad=True)
        torch.manual_seed(5)
        loss = model(x).square().sum()
        if disturb:
            torch.manual_seed(99)
            torch.rand(1000)
        loss.backward()
        results.append([x.grad, *gradients(model).values()])

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("mode", ["recompute", "lowrank", "saved"])
def test_activation_checkpointing_repeats_the_masks(reentrant: bool | None, mode: Any) -> None:
    results = []
    for how in (None, reentrant):
        model, x = adapted_block(dropout=0.4, dropout_mode=mode), normal(8, 12, dtype=torch.float32, grad=True)
        torch.manual_seed(5)
        y = model(x) if how is None else checkpoint(model, x, use_reentrant=how)
        torch.rand(10)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *gradients(model).values()])

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_checkpointed_llama_gives_the_gradients_of_a_plain_one() -> None:
    results = []
    for checkpointing in (False, True):
        model = llama(activation_checkpointing=checkpointing)
        apply_lora_fa(model, LoRAFAConfig(r=4, dropout=0.3))
        fill_B(model)
        torch.manual_seed(5)
        model(ids()).square().mean().backward()
        results.append(list(gradients(model).values()))

    assert len(results[0]) == 14
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", ["recompute", "lowrank", "saved"])
def test_eval_drops_nothing_and_draws_nothing(mode: Any) -> None:
    dropping, plain = adapted_block(dropout=0.9, dropout_mode=mode).eval(), adapted_block()
    x = normal(4, 12, dtype=torch.float32)
    state = torch.get_rng_state()

    assert torch.equal(dropping(x), plain(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_put_on_a_model_in_eval_drops_nothing_in_any_forward() -> None:
    for backend, lean in itertools.product(("native", "peft"), (True, False)):
        model = block().eval()
        settings = {"target_modules": ["first"], "r": 4, "dropout": 0.9, "lean": lean, "backend": backend}
        apply_lora_fa(model, LoRAFAConfig(**settings))
        fill_B(model)
        x = normal(4, 12, dtype=torch.float32)

        assert torch.equal(model(x), model(x))
        assert not any(each.training for each in model.modules())


@pytest.mark.parametrize("mode", ["recompute", "lowrank", "saved"])
def test_dropout_keeps_the_mean(mode: Any) -> None:
    dropping, plain = adapted_block(dropout=0.3, dropout_mode=mode).first, adapted_block().first
    x = normal(1, 12, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        many = dropping(x.expand(20_000, 12))
        deviation = (many.mean(0) - plain(x)[0]) / (many.std(0) / math.sqrt(len(many)))

    assert float(deviation.abs().max()) < 4.5
