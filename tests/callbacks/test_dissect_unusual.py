"""`Dissect` on modules and loops that are not everyday ones: it measures what it can, and says what it cannot."""

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_efficient.callbacks import Dissect, dissect, dissect_steps
from lightning_efficient.dissect import DissectReport, Recorder, read_json
from lightning_efficient.dissect import memory as peak_memory
from tests.callbacks.dissect_toys import ROWS, SHORT, SIZE, Batches, Rivals, Toy, Validated, batches, dissected, fit
from tests.dissect.steps import rows
from tests.support.trainers import make_trainer

MIB = 2**20


# ---- loops that optimize by themselves -----------------------------------------------------------------------------


class Raw(Rivals):
    """Steps torch's own optimizers, of which the Trainer knows nothing; `Idle` steps none."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers(use_pl_optimizer=False):  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.judge(self.maker(batch)).mean())
            optimizer.step()


class Idle(Rivals):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.judge(self.maker(batch)).mean())


def test_steps_of_torchs_own_optimizers_are_counted(tmp_path: Path) -> None:
    module = Raw()
    report = dissected(tmp_path, module)
    assert report.throughput.step_s.count == 3
    assert report.throughput.micro_batches_per_step == 1
    assert report.host is not None
    assert rows(report.host)["<optimizer 1 SGD>"].optimizer_s > 0
    for each in module.optimizers(use_pl_optimizer=False):  # type: ignore[union-attr]
        assert not each._optimizer_step_post_hooks  # type: ignore[union-attr]


def test_a_loop_without_steps_is_given_up_and_the_fit_ends_if_that_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dissect_steps, "_MOST_BATCHES", 30)
    callback = Dissect(**SHORT, out=str(tmp_path), stop_after=True)
    with pytest.warns(UserWarning, match="in 30 batches of Idle, which optimizes by itself, no optimizer"):
        trainer = fit(Idle(), callback, Batches(1000), max_epochs=-1)
    assert callback.report is None
    assert trainer.fit_loop.total_batch_idx < 40


class Nets(pl.LightningModule):
    """A forward and a backward of each net in every batch, as for a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 4 * SIZE)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        for net, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(net(batch + 1).mean())
            optimizer.step()

    @override
    def configure_optimizers(self) -> Any:
        return [SGD(each.parameters(), lr=0.01) for each in (self.one, self.two)]


def test_each_backward_of_a_batch_has_its_saved_bytes(tmp_path: Path) -> None:
    report = dissected(tmp_path, Nets())
    assert report.host is not None
    kept = {name: row.saved_bytes for name, row in rows(report.host).items()}
    assert (kept["one"], kept["two"]) == (4 * ROWS * SIZE, 4 * ROWS * SIZE)  # their inputs
    assert report.memory.saved_bytes == 4 * ROWS * SIZE  # never both at once


# ---- modules that cannot be looked into ----------------------------------------------------------------------------


class Functional(Toy):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        slope = torch.func.grad(lambda x: self.first(x).square().sum())(batch)
        return super().training_step(batch, batch_idx) + slope.square().mean()


class Scripted(Toy):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.second = torch.jit.script(nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU()))  # type: ignore[assignment]


@torch.library.custom_op("le_tests::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


class Custom(Toy):
    @override
    def loss(self, batch: Any) -> Tensor:
        with torch.no_grad():
            product(batch, batch.T)
        return super().loss(batch)


def test_transforms_of_torch_func_run_and_a_note_says_what_they_hide(tmp_path: Path) -> None:
    plain, measured = Functional(), Functional()
    fit(plain)
    report = dissected(tmp_path, measured)
    assert measured.losses == plain.losses
    assert any("torch.func" in note for note in report.notes)
    assert report.memory.saved_bytes


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_runs_unwatched_and_a_note_names_it(tmp_path: Path) -> None:
    report = dissected(tmp_path, Scripted())
    assert report.host is not None
    assert not any(name.startswith("second") for name in rows(report.host))
    assert "first.0" in rows(report.host)
    assert "TorchScript modules take no hooks and have no row: second." in report.notes


def test_operators_without_a_formula_are_named(tmp_path: Path) -> None:
    report = dissected(tmp_path, Custom(), peak_flops=1e12)
    assert report.flops.mfu
    assert "not counted, for no formula is known: le_tests" in report.flops.note
    assert dissected(tmp_path, Toy(), peak_flops=1e12).flops.note == ""


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._fsdp_wrapped_module(x)
        return y


Wrapper.__name__ = "FullyShardedDataParallel"


class Wrapped(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Wrapper(self.first), Wrapper(self.second)  # type: ignore[assignment]


def test_saved_bytes_are_in_the_rows_of_wrapped_modules(tmp_path: Path) -> None:
    kept = []
    for module in (Toy(), Wrapped()):
        report = dissected(tmp_path, module)
        assert report.host is not None
        kept.append({name: row.saved_bytes for name, row in rows(report.host).items() if row.is_module})
    assert kept[1] == kept[0]
    assert sum(each or 0 for each in kept[0].values()) > 0


# ---- sizes that differ from step to step ---------------------------------------------------------------------------


def test_mfu_is_of_a_clean_step_even_if_another_was_counted(tmp_path: Path) -> None:
    # Of six batches an epoch four make a step, and the other two one more. The two clean steps are the one and the
    # other; counted is a small one.
    window = {"warmup": 0, "clean": 2, "dissect": 1, "memory": 1}
    options: dict[str, Any] = {"data": batches(6), "accumulate_grad_batches": 4, "max_epochs": 4, "peak_flops": 1e9}
    report = dissected(tmp_path, Toy(), **window, **options)
    assert report.throughput.micro_batches_per_step == 3
    possible = 1e9 * report.throughput.step_s.mean
    one = dissected(tmp_path, Toy(), peak_flops=1e9).flops.model_per_step
    assert report.flops.model_per_step == 2 * one  # type: ignore[operator]
    assert report.flops.mfu == pytest.approx(3 * one / possible)  # type: ignore[operator]
    assert "of a step 0.67 times the size of a clean one" in report.flops.note


class Hungry(Validated):
    """Validation takes far more memory than training."""

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.ones(300 * MIB // 4)


def test_memory_of_validation_is_not_in_the_peak_of_steps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"val": batches(1), "val_check_interval": 3, "clean": 6, "data": batches(30)}
    quiet = dissected(tmp_path, Validated(), **options).memory.peak_bytes
    hungry = dissected(tmp_path, Hungry(), **options).memory.peak_bytes
    assert quiet is not None
    assert hungry is not None
    assert hungry < quiet + 150 * MIB


# ---- the end of it -------------------------------------------------------------------------------------------------


class StopsAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_a_fit_that_stops_early_reports_what_was_complete(tmp_path: Path) -> None:
    callback = Dissect(**SHORT, out=str(tmp_path))
    with pytest.warns(UserWarning, match="the report is of those that were complete"):
        fit(Toy(), [callback, StopsAt(5)])
    report = callback.report
    assert report is not None
    assert report.throughput.step_s.count == 3
    assert report.memory.peak_bytes
    assert "The fit ended after 1 of 2 dissected steps." in report.notes
    assert any("the fit ended before the step that counts them" in note for note in report.notes)
    assert read_json(DissectReport, tmp_path / "dissect.json") == report


def test_a_fit_that_stops_before_the_clean_steps_are_done_reports_nothing(tmp_path: Path) -> None:
    callback = Dissect(**SHORT, out=str(tmp_path))
    with pytest.warns(UserWarning, match="there is no report"):
        fit(Toy(), [callback, StopsAt(3)])
    assert callback.report is None


def _nan(*args: Any) -> Tensor:
    return torch.tensor(math.nan, requires_grad=True)


def test_a_loss_that_is_no_number_makes_valid_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "loss", _nan)
    report = dissected(tmp_path)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads((tmp_path / "dissect.json").read_text(), parse_constant=refuse)["loss"] == "nan"
    assert math.isnan(read_json(DissectReport, tmp_path / "dissect.json").loss or 0.0)
    assert report.loss is not None


def test_why_there_is_no_peak_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "_CLEAR", tmp_path)  # a folder: it can be seen and not written
    report = dissected(tmp_path / "out")
    assert report.memory.peak_bytes is None
    assert "cannot be reset" in report.memory.note


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_that_take_the_report_with_them_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dissect, "rank_zero_warn", (tmp_path / "warned").write_text)  # in a process of its own
    callback = Dissect(**SHORT, out=str(tmp_path))
    trainer = make_trainer(2, strategy="ddp_fork", callbacks=[callback], max_epochs=1, logger=False)
    trainer.fit(Toy(), DataLoader(torch.randn(160, SIZE), batch_size=ROWS))
    assert callback.report is None
    assert "Read dissect.json, or choose strategy='ddp'" in (tmp_path / "warned").read_text()
    assert read_json(DissectReport, tmp_path / "dissect.json").machine.world_size == 2


def test_hooks_of_a_subclass_are_no_row(tmp_path: Path) -> None:
    class Mine(Dissect):
        pass

    class DissectsNothing(Callback):
        @override
        def on_train_batch_start(self, *args: Any) -> None:
            sum(range(1000))

    callback = Mine(**SHORT, out=str(tmp_path))
    fit(Toy(), [DissectsNothing(), callback])
    assert callback.report is not None
    assert callback.report.host is not None
    # The class of the one lies in a function, and so does that of the other: Lightning names them by the place.
    others = [name for name in rows(callback.report.host) if name.startswith("<callback")]
    assert len(others) == 1


class Outer:
    """As DeepSpeed's: no torch optimizer, and around one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


def test_an_optimizer_around_torchs_has_the_row_of_the_inner_one() -> None:
    model = nn.Linear(4, 4)
    outer: Any = Outer(SGD(model.parameters(), lr=0.1))
    recorder = Recorder(model, [outer, object()])  # type: ignore[list-item]
    with recorder, recorder.step():
        F.mse_loss(model(torch.ones(2, 4)), torch.zeros(2, 4)).backward()
        outer.step()
    assert rows(recorder.result().host)["<optimizer SGD>"].optimizer_s > 0
