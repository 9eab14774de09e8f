"""A chosen from batches: another A, and in all else the training that would have been."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric
from typing_extensions import override

from tests.callbacks.lora_fa_toys import STEPS, Toy, batches, equal, fit, lora, tensors

both = pytest.mark.parametrize("init", ["eva", "gradient"])


class Fixed(Toy):
    """Without BatchNorm, so that eval mode and training mode agree at the first step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model[2] = nn.Dropout(0.2)
        self.transfers: list[str] = []
        self.seen = MeanMetric()

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.transfers.append("before")
        return batch

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.transfers.append("after")
        return batch

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.update(batch[0].mean())
        return super().training_step(batch, batch_idx)


class AtStart(Callback):
    """What training starts from."""

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.grads = [name for name, p in pl_module.named_parameters() if p.grad is not None]
            self.modes = {each.training for each in pl_module.modules()}
            self.metric_updates = pl_module.seen.update_count if hasattr(pl_module, "seen") else 0
            self.random = torch.get_rng_state()


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_the_training_that_follows_sees_the_same_batches_and_random_numbers(init: str, workers: int) -> None:
    plain, chosen, starts = Fixed(), Fixed(), (AtStart(), AtStart())
    several: dict[str, Any] = {"num_workers": workers, "persistent_workers": True} if workers else {}
    for module, callback, start in (
        (plain, lora(), starts[0]),
        (chosen, lora(init=init, calibration_batches=3), starts[1]),
    ):
        torch.manual_seed(0)
        own = torch.Generator().manual_seed(4)
        fit(module, callback, start, loader=batches(shuffle=True, generator=own, **several))

    assert chosen.first_entries[-STEPS:] == plain.first_entries
    assert torch.equal(starts[0].random, starts[1].random)
    assert chosen.losses[-STEPS] == plain.losses[0]  # B is zero: the first step is the base model's
    assert starts[1].grads == []
    assert starts[1].modes == {True}
    assert starts[1].metric_updates == 0
    assert len(chosen.losses) == STEPS + 2 * 3
    assert chosen.transfers == ["before", "after"] * (STEPS + 2 * 3)
    assert not any(torch.equal(each, tensors(plain)[name]) for name, each in tensors(chosen, "lora_A").items())
    for each in tensors(chosen, "lora_A").values():
        torch.testing.assert_close(each @ each.T, torch.eye(3), rtol=0, atol=1e-5)


@both
def test_nothing_is_logged(init: str, tmp_path: Path) -> None:
    fit(Toy(), lora(init=init, report_saved_bytes=False), logger=CSVLogger(tmp_path, name="", version=""))
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + STEPS


@both
def test_a_resumed_run_takes_a_from_the_checkpoint(init: str, tmp_path: Path) -> None:
    in_one_go, stopped, resumed = Toy(), Toy(), Toy()
    settings: dict[str, Any] = {"init": init, "calibration_batches": 2}
    fit(in_one_go, lora(**settings), loader=batches(4), max_epochs=2)
    fit(stopped, lora(**settings), loader=batches(4)).save_checkpoint(tmp_path / "it.ckpt")
    fit(resumed, lora(**settings), loader=batches(4), max_epochs=2, ckpt_path=tmp_path / "it.ckpt")
    assert len(resumed.losses) == 4
    assert equal(tensors(resumed), tensors(in_one_go))


def test_several_loaders_are_read_as_training_reads_them() -> None:
    class Two(Toy):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]  # batch_idx is optional
            return super().training_step([batch["a"][0], batch["b"][1]], 0)

    module = Two()
    fit(module, lora(init="gradient", calibration_batches=2), loader={"a": batches(), "b": batches()})
    assert len(module.losses) == STEPS + 4


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(batches().dataset)  # type: ignore[arg-type]


class ReadOnce(Stream):
    def __init__(self) -> None:
        self.rest = super().__iter__()

    @override
    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.rest)


def test_a_stream_is_read_again_and_one_that_cannot_be_is_refused() -> None:
    plain, chosen = Toy(), Toy()
    fit(plain, lora(), loader=DataLoader(Stream(), batch_size=8))
    fit(chosen, lora(init="eva", calibration_batches=2), loader=DataLoader(Stream(), batch_size=8))
    assert chosen.first_entries[-STEPS:] == plain.first_entries
    with pytest.raises(RuntimeError, match=r"\(ReadOnce\) can be read only once"):
        fit(Toy(), lora(init="eva"), loader=DataLoader(ReadOnce(), batch_size=8))


class Manual(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class NoLoss(Toy):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(RuntimeError, match="with manual optimization that would train"):
        fit(Manual(), lora(init="eva"))
    module = NoLoss()
    with pytest.raises(RuntimeError, match="needs a training_step that returns the loss"):
        fit(module, lora(init="gradient"))
    assert all(p.grad is None for p in module.parameters())
    assert module.training
    assert "log" not in vars(module)
