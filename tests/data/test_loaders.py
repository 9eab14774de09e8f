"""The order of training items, its division among ranks, and evaluation that reads everything once."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_efficient.data._examples import LabelledTensors, TokenBlocks, seeded_generator
from lightning_efficient.data._loaders import EvalLoader, TrainLoader
from tests.data.recording import Recorder, short_stream, trainer
from tests.support.ranks import run_ranks


def rows(count: int) -> LabelledTensors:
    """A split whose rows are their own numbers."""
    return LabelledTensors(torch.arange(count), torch.arange(count))


def read(loader: Iterator[Any] | TrainLoader | EvalLoader) -> list[list[int]]:
    return [inputs.tolist() for inputs, _ in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    first = [read(loader) for loader in [TrainLoader(rows(20), batch_size=4, seed=3)] for _ in range(3)]
    torch.manual_seed(123)
    torch.rand(5)
    second = [read(TrainLoader(rows(20), batch_size=4, seed=3, first_epoch=lambda e=e: e)) for e in range(3)]
    assert first == second
    assert len({str(epoch) for epoch in first}) == 3


def test_neighbouring_seeds_share_no_epoch() -> None:
    orders = {
        str(read(TrainLoader(rows(20), batch_size=4, seed=seed, first_epoch=lambda e=epoch: e)))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_reading_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    read(TrainLoader(rows(20), batch_size=4, seed=3))
    short_stream().setup("fit")
    assert torch.equal(before, torch.get_rng_state())


@settings(deadline=None, max_examples=60)  # the machine may be busy
@given(items=st.integers(1, 60), batch_size=st.integers(1, 7), world_size=st.integers(1, 4), epoch=st.integers(0, 3))
def test_ranks_together_read_the_batches_of_one_process(
    items: int, batch_size: int, world_size: int, epoch: int
) -> None:
    if items < batch_size * world_size:
        return
    one = read(TrainLoader(rows(items), batch_size=batch_size * world_size, seed=1, first_epoch=lambda: epoch))
    ranks = [
        read(
            TrainLoader(
                rows(items), batch_size=batch_size, seed=1, rank=rank, world_size=world_size, first_epoch=lambda: epoch
            )
        )
        for rank in range(world_size)
    ]
    assert [flat(list(shares)) for shares in zip(*ranks, strict=True)] == one
    assert len(set(flat(one))) == len(flat(one)) == items - items % (batch_size * world_size)


@settings(deadline=None, max_examples=60)  # the machine may be busy
@given(items=st.integers(1, 60), batch_size=st.integers(1, 7), world_size=st.integers(1, 4))
def test_evaluation_reads_every_item_once_in_equally_many_batches(items: int, batch_size: int, world_size: int) -> None:
    if items < world_size:
        return
    loaders = [EvalLoader(rows(items), batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    ranks = [read(loader) for loader in loaders]
    assert sorted(flat([flat(batches) for batches in ranks])) == list(range(items))
    assert {len(batches) for batches in ranks} == {len(loader) for loader in loaders} == {len(ranks[0])}
    sizes = {len(batch) for batches in ranks for batch in batches}
    assert min(sizes) >= 1
    assert max(sizes) <= max(batch_size, 2)


@settings(deadline=None, max_examples=60)  # the machine may be busy
@given(before=st.integers(1, 4), after=st.integers(1, 4), steps=st.integers(0, 5))
def test_another_number_of_ranks_reads_the_rest_of_the_epoch(before: int, after: int, steps: int) -> None:
    items = 24
    loaders = [TrainLoader(rows(items), batch_size=1, seed=0, rank=r, world_size=before) for r in range(before)]
    seen = [row for loader in loaders for row in flat(read(islice(loader, steps)))]
    assert len(seen) == before * steps

    resumed = [TrainLoader(rows(items), batch_size=1, seed=0, rank=r, world_size=after) for r in range(after)]
    for loader in resumed:
        loader.load_state_dict(loaders[0].state_dict())
    rest = [row for loader in resumed for row in flat(read(loader))]
    if before * steps < items:
        assert len(set(seen + rest)) == len(seen + rest) > items - after


def test_making_an_iterator_reads_nothing() -> None:
    loader = TrainLoader(rows(20), batch_size=4, seed=3)
    iter(loader)
    assert loader.state_dict()["items_done"] == 0
    assert read(loader) == read(TrainLoader(rows(20), batch_size=4, seed=3))


@settings(deadline=None, max_examples=60)  # the machine may be busy
@given(length=st.integers(5, 80), block_size=st.integers(1, 4), seed=st.integers(0, 5))
def test_training_blocks_do_not_overlap_and_keep_their_number(length: int, block_size: int, seed: int) -> None:
    blocks = TokenBlocks(torch.arange(length), block_size)
    for epoch in range(5):
        starts = blocks.shuffled_items(seeded_generator(seed, epoch))
        assert len(starts) == blocks.num_items
        batch = blocks.batch(starts)
        assert torch.equal(batch["labels"], batch["input_ids"] + 1)  # the stream counts, so the next token is one more
        tokens = batch["input_ids"].flatten()
        assert len(tokens.unique()) == len(tokens)
        assert int(batch["labels"].max()) < length


def test_training_reads_every_token_within_a_few_epochs() -> None:
    blocks = TokenBlocks(torch.arange(100), 8)
    epochs = [blocks.batch(blocks.shuffled_items(seeded_generator(0, epoch)))["input_ids"] for epoch in range(30)]
    assert set(torch.cat(epochs).flatten().tolist()) == set(range(99))  # the last one is only ever a label


def test_too_few_items_for_one_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"smaller than one batch \(7 items for 2 x 4\).*Lower batch_size"):
        TrainLoader(rows(7), batch_size=4, seed=0, world_size=2)
    with pytest.raises(ValueError, match=r"1 items for 2 processes.*larger val_fraction"):
        EvalLoader(rows(1), batch_size=4, world_size=2)


def _fit_rank(rank: int, world_size: int, folder: str) -> tuple[list[list[list[int]]], Tensor, float]:
    data = short_stream(batch_size=1)
    model = Recorder(data.vocab_size)
    run = trainer(folder, devices=world_size, strategy="ddp", max_epochs=3, enable_checkpointing=False)
    run.fit(model, data)
    return model.seen, model.table.weight.detach(), float(run.callback_metrics["val_loss"])


@pytest.mark.distributed
def test_two_ranks_equal_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    data = short_stream(batch_size=2)
    alone = Recorder(data.vocab_size)
    run = trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    run.fit(alone, data)

    ranks = run_ranks(_fit_rank, 2, str(tmp_path))
    joined = [left + right for left, right in zip(ranks[0][0], ranks[1][0], strict=True)]
    assert joined == alone.seen
    for _, weight, val_loss in ranks:
        # The mean gradient is summed in another order: a few float32 roundings over 15 Adam steps of size 0.1.
        torch.testing.assert_close(weight, alone.table.weight.detach(), rtol=0, atol=1e-5)
        assert val_loss == pytest.approx(float(run.callback_metrics["val_loss"]), abs=1e-5)
