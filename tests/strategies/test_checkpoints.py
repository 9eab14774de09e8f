"""What the compressor carries survives a Trainer checkpoint, on other ranks and buckets too; what does not, says so."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor
from typing_extensions import override

from lightning_efficient.compression import ACPSGD, Compressor, PowerSGD
from tests.compression.harness import recorded_warnings
from tests.plugins.tiny import BATCHES, TinyData, TinyModule, flat_weights
from tests.strategies.training import EPOCHS, SMALL_BUCKETS_MB, At, compressor_of, errors, fit, message_of
from tests.support.collectives import count_collectives
from tests.support.ranks import run_ranks
from tests.support.trainers import make_trainer

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-12
"""Float64 sums in another order over six steps give 1e-16; a lost error buffer 1e-2, as shown below."""

METHODS: dict[str, type[ACPSGD] | type[PowerSGD]] = {"acp_sgd": ACPSGD, "power_sgd": PowerSGD}


def compressor(method: str, rank: int = 2) -> Compressor:
    return METHODS[method](rank=rank)


def save(world_size: int, method: str, path: Path, **kwargs: Any) -> None:
    """Write a checkpoint after the first epoch, in the middle of fit."""
    saver = ModelCheckpoint(dirpath=path.parent, filename=path.stem)
    fit(world_size, compressor(method), callbacks=[saver], enable_checkpointing=True, max_epochs=1, **kwargs)


def resume(world_size: int, method: str, path: Path, **kwargs: Any) -> Tensor:
    module, trainer = fit(world_size, compressor(method), ckpt_path=str(path), **kwargs)
    assert compressor_of(trainer).stats.steps == BATCHES
    assert compressor_of(trainer).step == EPOCHS * BATCHES
    return flat_weights(module)


def _save(rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    """Checkpoints of both methods, and the weights of runs that do not stop."""
    for method in METHODS:
        save(world_size, method, Path(folder) / f"{method}.ckpt")
    return {method: flat_weights(fit(world_size, compressor(method))[0]) for method in METHODS}


def _resume(rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    small = {"bucket_cap_mb": SMALL_BUCKETS_MB}
    results = {}
    for method in METHODS:
        path = Path(folder) / f"{method}.ckpt"
        results[method] = resume(world_size, method, path)
        results[f"{method}, small buckets"] = resume(world_size, method, path, ddp=small)
    return results


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[str, dict[str, Tensor]]]:
    """Where 2 and 4 ranks left their checkpoints, and where they would have ended."""
    folders = {world_size: str(tmp_path_factory.mktemp(f"saved-by-{world_size}")) for world_size in (2, 4)}
    return {world_size: (folder, run_ranks(_save, world_size, folder)[0]) for world_size, folder in folders.items()}


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 4), (4, 2), (2, 1)])
def test_resuming_equals_not_having_stopped(
    stopped: dict[int, tuple[str, dict[str, Tensor]]], before: int, after: int
) -> None:
    folder, uninterrupted = stopped[before]
    for results in run_ranks(_resume, after, folder):
        for key, weights in results.items():
            expected = uninterrupted[key.split(",")[0]]
            torch.testing.assert_close(weights, expected, rtol=0, atol=TOLERANCE, msg=lambda m, key=key: f"{key}: {m}")


def test_the_state_is_plain_tensors_keyed_by_parameter(stopped: dict[int, tuple[str, dict[str, Tensor]]]) -> None:
    checkpoint = torch.load(Path(stopped[2][0]) / "acp_sgd.ckpt", weights_only=True)
    state = checkpoint["gradient_compression"]
    assert state["method"] == "acp_sgd"
    assert state["step"] == BATCHES
    assert state["parameters"].keys() == {"net.0.weight", "net.2.weight", "net.4.weight"}
    assert all(each["error"].any() for each in state["parameters"].values())


class Errors(Callback):
    """Keeps this rank's error buffers and the compressor's step as they are when training begins."""

    norm: float
    step: int

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.norm = sum(float(error.norm()) for error in errors(trainer).values())
        self.step = compressor_of(trainer).step


@dataclass(frozen=True)
class Incomplete:
    warnings: list[str]
    error_norm: float
    weights: Tensor


def _resume_without_state(rank: int, world_size: int, folder: str) -> dict[str, Incomplete]:
    plain = make_trainer(world_size, strategy="ddp", max_epochs=1)
    plain.fit(TinyModule().double(), TinyData())
    plain.save_checkpoint(f"{folder}/plain.ckpt")
    save(world_size, "acp_sgd", Path(folder) / "no_error.ckpt", ddp={"save_error": False})
    results = {}
    for name in ("plain", "no_error"):
        at_start = Errors()
        with recorded_warnings() as warned:
            module, _ = fit(world_size, ACPSGD(rank=2), ckpt_path=f"{folder}/{name}.ckpt", callbacks=[at_start])
        about_us = [text for text in warned if "error" in text]
        results[name] = Incomplete(about_us, at_start.norm, flat_weights(module))
    return results


def test_a_checkpoint_without_errors_starts_from_zero_with_one_warning(
    tmp_path: Path, stopped: dict[int, tuple[str, dict[str, Tensor]]]
) -> None:
    first, second = run_ranks(_resume_without_state, 2, str(tmp_path))
    for name, text in (("plain", "no gradient compression state"), ("no_error", "no error buffers")):
        assert [first[name].error_norm, second[name].error_norm] == [0.0, 0.0]
        assert len(first[name].warnings) == 1
        assert text in first[name].warnings[0]
    # The error buffers matter: without them this run ends elsewhere.
    assert (first["no_error"].weights - stopped[2][1]["acp_sgd"]).abs().max() > 1e-3


class OtherNames(TinyModule):
    """The same loss from parameters of other names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = self.net
        del self.net

    @override
    def loss(self, batch: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The weights are converted; only the compressor's state is left as it was.
        checkpoint["state_dict"] = {k.replace("net.", "body."): v for k, v in checkpoint["state_dict"].items()}


def _mismatches(rank: int, world_size: int, path: str) -> dict[str, str]:
    return {
        "rank": message_of(world_size, ACPSGD(rank=3), ckpt_path=path),
        "method": message_of(world_size, PowerSGD(rank=2), ckpt_path=path),
        "model": message_of(world_size, ACPSGD(rank=2), ckpt_path=path, module=OtherNames().double()),
    }


def test_a_state_that_does_not_fit_is_refused(stopped: dict[int, tuple[str, dict[str, Tensor]]]) -> None:
    path = str(Path(stopped[2][0]) / "acp_sgd.ckpt")
    for messages in run_ranks(_mismatches, 2, path):
        assert "RuntimeError: the checkpoint was written with rank=2, the run has rank=3" in messages["rank"]
        assert "'acp_sgd', the run uses 'power_sgd'" in messages["method"]
        assert "missing ['body.0.weight', 'body.2.weight', 'body.4.weight']" in messages["model"]
        assert "unexpected ['net.0.weight', 'net.2.weight', 'net.4.weight']" in messages["model"]


class BrokenError(Exception):
    pass


def _fail(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    raise BrokenError


class CountedSave(OnExceptionCheckpoint):
    """Counts what saving after an exception sends."""

    ops: list[str]

    @override
    def on_exception(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        with count_collectives() as seen:
            super().on_exception(trainer)
        self.ops = [each.op for each in seen]


def _save_after_exception(rank: int, world_size: int, folder: str) -> tuple[list[str], list[str], float]:
    saver = CountedSave(folder)
    with recorded_warnings() as warned, pytest.raises(BrokenError):
        fit(world_size, callbacks=[At([4], _fail), saver], enable_checkpointing=True)
    at_start = Errors()
    fit(world_size, ckpt_path=saver.ckpt_path, callbacks=[at_start])
    return saver.ops, warned, at_start.norm


def test_saving_after_an_exception_starts_no_collective_of_ours(tmp_path: Path) -> None:
    (ops, warned, error_norm), _ = run_ranks(_save_after_exception, 2, str(tmp_path))
    assert set(ops) <= {"barrier"}  # Lightning's own
    assert any("saving after an exception" in text for text in warned)
    assert error_norm == 0.0


class Wider(TinyModule):
    """Does not load the weights of a `TinyModule`."""

    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Linear(2, 2)


class WithRate(TinyModule):
    """The tuner looks for the attribute that it tunes."""

    lr = 0.5


def _other_moments(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    # After fit, by hand, instead of in the middle by a callback.
    uninterrupted = flat_weights(fit(world_size)[0])
    _, trainer = fit(world_size, max_epochs=1)
    trainer.save_checkpoint(f"{folder}/after_fit.ckpt")
    after_fit = resume(world_size, "acp_sgd", Path(folder) / "after_fit.ckpt")
    # The tuner's trial steps inside a fit.
    at_start = Errors()
    tuner = LearningRateFinder(num_training_steps=5)
    fit(world_size, module=WithRate().double(), callbacks=[tuner, at_start], default_root_dir=folder)
    # A resume that failed before DDP existed.
    trainer = fit(world_size, max_epochs=1)[1]
    with pytest.raises(RuntimeError, match=r"Error.s. in loading state_dict"):
        trainer.fit(Wider(), TinyData(), ckpt_path=f"{folder}/after_fit.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(TinyModule().double(), TinyData())
    return {
        "after fit": float((after_fit - uninterrupted).abs().max()),
        "tuner": (at_start.norm, at_start.step),
        "after failure": compressor_of(trainer).step,
    }


def test_other_moments_of_saving_and_loading(tmp_path: Path) -> None:
    for seen in run_ranks(_other_moments, 2, str(tmp_path)):
        assert seen["after fit"] < TOLERANCE
        assert seen["tuner"] == (0.0, 0)
        assert seen["after failure"] == BATCHES
