"""A run that stops and resumes reads the same batches, and ends with the same weights, as one that does not stop."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.data.recording import Recorder, short_stream, trainer
from tests.support.ranks import run_ranks

# The resumed run saves nothing, so it has no use for the state of the first run's ModelCheckpoint.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

EPOCHS, BATCHES, GLOBAL_BATCH = 3, 5, 2


def fit(folder: Path, *, ckpt_path: str | None = None, world_size: int = 1, **kwargs: Any) -> tuple[Recorder, Any]:
    data = short_stream(batch_size=GLOBAL_BATCH // world_size, num_items=BATCHES * GLOBAL_BATCH)
    model = Recorder(data.vocab_size)
    if world_size > 1:
        kwargs |= {"devices": world_size, "strategy": "ddp"}
    run = trainer(folder, **kwargs)
    run.fit(model, data, ckpt_path=ckpt_path)
    return model, run


@dataclass(frozen=True)
class Stop:
    """How a run ends, how it goes on, which callback saves it (none: the test does, at the end), after which step."""

    step: int
    until: dict[str, Any]
    then_until: dict[str, Any] = field(default_factory=lambda: {"max_epochs": EPOCHS})
    saver: dict[str, Any] | None = None


TWO_EPOCHS = {"max_epochs": 2}
STOPS = {
    "max_steps inside an epoch": Stop(7, {"max_steps": 7}, {"max_steps": EPOCHS * BATCHES}),
    "max_steps at the end of an epoch": Stop(5, {"max_steps": 5}, {"max_steps": EPOCHS * BATCHES}),
    "max_steps at the end of an epoch, then max_epochs": Stop(5, {"max_steps": 5}),
    "max_epochs": Stop(5, {"max_epochs": 1}),
    "callback inside an epoch": Stop(3, TWO_EPOCHS, saver={"every_n_train_steps": 3, "save_top_k": -1}),
    "callback at the last batch": Stop(5, TWO_EPOCHS, saver={"every_n_train_steps": 5, "save_top_k": -1}),
    "callback after validation": Stop(10, TWO_EPOCHS, saver={"save_on_train_epoch_end": False}),
    "callback after the epoch": Stop(10, TWO_EPOCHS, saver={"save_on_train_epoch_end": True}),
    "callback after validation inside an epoch": Stop(
        2, TWO_EPOCHS | {"val_check_interval": 2}, saver={"save_on_train_epoch_end": False, "save_top_k": -1}
    ),
}


def check_resume(folder: Path, stop: Stop, *, world_size: int = 1, **common: Any) -> None:
    uninterrupted, _ = fit(folder, world_size=world_size, max_epochs=EPOCHS, enable_checkpointing=False, **common)

    path = folder / f"step={stop.step}.ckpt"
    if stop.saver is None:
        first, run = fit(folder, world_size=world_size, enable_checkpointing=False, **stop.until, **common)
        run.save_checkpoint(path)
    else:
        saver = ModelCheckpoint(dirpath=folder, filename="{step}", **stop.saver)
        first, _ = fit(folder, world_size=world_size, callbacks=[saver], **stop.until, **common)
    assert torch.load(path, weights_only=True)["global_step"] == stop.step

    resumed, _ = fit(
        folder, ckpt_path=str(path), world_size=world_size, enable_checkpointing=False, **stop.then_until, **common
    )
    assert first.seen[: stop.step] + resumed.seen == uninterrupted.seen
    assert torch.equal(resumed.table.weight, uninterrupted.table.weight)


@pytest.mark.parametrize("name", STOPS)
def test_resume_equals_no_stop(tmp_path: Path, name: str) -> None:
    check_resume(tmp_path, STOPS[name])


@pytest.mark.parametrize("limit", [3, 0.6])
def test_resume_at_the_end_of_a_limited_epoch(tmp_path: Path, limit: float) -> None:
    check_resume(tmp_path, Stop(3, {"max_epochs": 1}), limit_train_batches=limit)
    check_resume(tmp_path, Stop(3, {"max_steps": 3}, {"max_steps": EPOCHS * 3}), limit_train_batches=limit)


def test_resume_with_gradient_accumulation(tmp_path: Path) -> None:
    # Steps of 2, 2 and 1 batches: the checkpoint after step 4 lies inside the second epoch, behind batch 7.
    uninterrupted, _ = fit(tmp_path, max_epochs=2, enable_checkpointing=False, accumulate_grad_batches=2)
    first, run = fit(tmp_path, max_steps=4, enable_checkpointing=False, accumulate_grad_batches=2)
    run.save_checkpoint(tmp_path / "4.ckpt")
    resumed, _ = fit(
        tmp_path,
        ckpt_path=str(tmp_path / "4.ckpt"),
        max_steps=6,
        enable_checkpointing=False,
        accumulate_grad_batches=2,
    )
    assert len(first.seen) == 7
    assert first.seen + resumed.seen == uninterrupted.seen


def test_fitting_on_continues_with_the_next_epoch(tmp_path: Path) -> None:
    uninterrupted, _ = fit(tmp_path, max_epochs=2, enable_checkpointing=False)
    model, run = fit(tmp_path, max_epochs=1, enable_checkpointing=False)
    run.fit_loop.max_epochs = 2
    run.fit(model, short_stream(num_items=BATCHES * GLOBAL_BATCH))
    assert model.seen == uninterrupted.seen


def test_overfit_batches_repeats_the_same_batches(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, max_epochs=3, overfit_batches=2, enable_checkpointing=False)
    assert model.seen == 3 * model.seen[:2]


def _two_ranks_resume(rank: int, world_size: int, folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stop in (STOPS["max_steps inside an epoch"], STOPS["callback inside an epoch"]):
            check_resume(Path(folder) / str(stop.step), stop, world_size=world_size)


@pytest.mark.distributed
def test_two_ranks_resume_equals_no_stop(tmp_path: Path) -> None:
    run_ranks(_two_ranks_resume, 2, str(tmp_path))


def test_resuming_on_other_data_is_refused(tmp_path: Path) -> None:
    _, run = fit(tmp_path, max_steps=3, enable_checkpointing=False)
    run.save_checkpoint(tmp_path / "3.ckpt")
    other = short_stream(num_items=12)
    with pytest.raises(
        ValueError, match=r"num_items=10 in the training data, here it is 12.*Resume with the same data"
    ):
        trainer(tmp_path, max_steps=6, enable_checkpointing=False).fit(
            Recorder(other.vocab_size), other, ckpt_path=str(tmp_path / "3.ckpt")
        )
