"""`Dissect` measures a training without changing it, in any setting of the Trainer."""

import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_efficient.callbacks import Dissect
from lightning_efficient.dissect import DissectReport, FlopCount, Window, read_json, saved_bytes
from tests.callbacks.dissect_toys import (
    NEEDED,
    ROWS,
    SHORT,
    SIZE,
    Batches,
    Rivals,
    Toy,
    Validated,
    batches,
    dissected,
    fit,
    hooks_left,
)
from tests.dissect.steps import rows
from tests.support.trainers import logged_lines, make_trainer

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "checkpointed": ({"checkpointed": True}, {}),
    "two batches a step": ({}, {"accumulate_grad_batches": 2, "data": batches(40)}),
    "gradient clipping": ({}, {"gradient_clip_val": 0.1}),
}


def state(module: nn.Module) -> list[Tensor]:
    return [each.detach().clone() for each in module.parameters()]


@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_the_same_bit_for_bit_with_it(name: str, tmp_path: Path) -> None:
    toy, trainer = SETTINGS[name]
    plain, measured = Toy(**toy), Toy(**toy)
    callback = Dissect(**SHORT, out=str(tmp_path))
    fit(plain, **trainer)
    after_plain = torch.rand(1)
    fit(measured, callback, **trainer)

    assert callback.report is not None
    assert measured.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(state(measured), state(plain), strict=True))
    assert torch.equal(torch.rand(1), after_plain)  # it drew no random number either
    assert hooks_left(measured) == []


def test_the_report_adds_up_and_is_written(tmp_path: Path) -> None:
    report = dissected(tmp_path)
    host = report.host
    assert host is not None
    assert sum(row.total_s for row in host.rows) == pytest.approx(host.step_s, rel=1e-9)
    cut = rows(host)
    assert {"first.0", "second.3", "<training_step>", "<optimizer Adam>", "<data>", "<loop>"} <= set(cut)
    assert cut["first.0"].calls == 1
    assert cut["first.0"].forward_s > 0
    assert cut["first.0"].backward_s > 0
    assert cut["<optimizer Adam>"].optimizer_s > 0
    assert cut["<data>"].data_s > 0
    assert report.window == Window(1, 3, 2, 1)
    assert report.throughput.step_s.count == 3
    assert report.throughput.samples_per_s is not None
    assert report.loss is not None
    assert report.ranks[0].step_s == host.step_s
    assert report.straggler is None
    assert report.notes == ()
    assert read_json(DissectReport, tmp_path / "dissect.json") == report
    assert "<html" in (tmp_path / "dissect.html").read_text()


def test_it_is_printed_once_and_only_if_wanted(tmp_path: Path) -> None:
    with logged_lines() as lines:
        dissected(tmp_path)
    assert not any("over 3 clean steps" in line for line in lines)
    with logged_lines() as lines:
        dissected(tmp_path, print_report=True)
    assert sum("over 3 clean steps" in line for line in lines) == 1


def test_files_go_to_the_loggers_folder_and_numbers_to_the_logger(tmp_path: Path) -> None:
    callback = Dissect(**SHORT)
    trainer = fit(Toy(), callback, logger=CSVLogger(tmp_path, name="", version=0))
    folder = Path(str(trainer.log_dir))
    assert read_json(DissectReport, folder / "dissect.json") == callback.report
    with (folder / "metrics.csv").open() as lines:
        logged = [row for row in csv.DictReader(lines) if row.get("dissect/step_ms")]
    assert len(logged) == 1
    assert callback.report is not None
    assert float(logged[0]["dissect/step_ms"]) == pytest.approx(1e3 * callback.report.throughput.step_s.p50)
    assert float(logged[0]["dissect/optimizer_ms"]) > 0
    assert {key for key in logged[0] if key.startswith("dissect/")} == set(callback.stats)


class FailsAt(Callback):
    """Breaks forward, backward or the optimizer of a step."""

    def __init__(self, where: str, step: int) -> None:
        self.where, self.step = where, step

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step and self.where == "forward":
            self.handle = pl_module.first[0].register_forward_hook(self.fail)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        if trainer.global_step == self.step and self.where == "backward":
            loss.register_hook(self.fail)

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step and self.where == "optimizer":
            self.fail()

    def fail(self, *args: Any) -> None:
        if self.where == "forward":
            self.handle.remove()
        raise RuntimeError("planted")


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize("step", [0, 2, 5, 6], ids=["warmup", "clean", "dissect", "memory"])
def test_nothing_is_left_after_a_failure(where: str, step: int, tmp_path: Path) -> None:
    module, profiler = Toy(), SimpleProfiler(dirpath=str(tmp_path), filename="simple")
    callback = Dissect(**SHORT, out=str(tmp_path))
    with pytest.raises(RuntimeError, match="planted"):
        fit(module, [callback, FailsAt(where, step)], profiler=profiler)
    assert callback.report is None
    assert hooks_left(module) == []
    # And it measures the next fit as if nothing had been.
    trainer = fit(module, callback, profiler=profiler)
    assert callback.report is not None
    assert trainer.profiler is profiler  # type: ignore[attr-defined]
    with FlopCount(module) as count:
        module.loss(torch.ones(ROWS, SIZE)).backward()
    assert callback.report.flops.model_per_step == count.model_flops


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_validation_may_lie_in_the_middle(every: int, tmp_path: Path) -> None:
    callback = Dissect(warmup=1, clean=2, dissect=2, memory=1, out=str(tmp_path), print_report=False)
    settings = {"val": batches(2), "val_check_interval": every}
    if every == 1:
        # No step is ever whole in the clean window.
        with pytest.warns(UserWarning, match=r"saw too few steps \(warmup=1, clean=2, dissect=2, memory=1\)"):
            fit(Validated(), callback, **settings)
        assert callback.report is None
        return
    plain, measured = Validated(), Validated()
    fit(plain, **settings)
    fit(measured, callback, **settings)
    assert measured.losses == plain.losses
    assert callback.report is not None
    host = callback.report.host
    assert host is not None
    assert callback.report.throughput.step_s.count == 2
    assert rows(host)["first.0"].calls == 1
    assert sum(row.total_s for row in host.rows) == pytest.approx(host.step_s, rel=1e-9)


def test_validation_between_the_batches_of_a_step_spoils_that_step_only(tmp_path: Path) -> None:
    report = dissected(
        tmp_path,
        Validated(),
        data=batches(60),
        val=batches(2),
        val_check_interval=5,
        accumulate_grad_batches=2,
        clean=2,
    )
    assert report.throughput.micro_batches_per_step == 2
    assert report.host is not None
    assert rows(report.host)["first.0"].calls == 2


def test_a_fit_that_is_too_short_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"has 20 optimizer steps, and Dissect needs 28 \(warmup=5, "):
        fit(Toy(), Dissect(out=str(tmp_path)))
    with pytest.raises(MisconfigurationException, match=r"has 3 optimizer steps, and Dissect needs 7"):
        fit(Toy(), Dissect(**SHORT, out=str(tmp_path)), max_steps=3)


def test_exactly_enough_steps_are_enough(tmp_path: Path) -> None:
    assert dissected(tmp_path, max_steps=NEEDED).window == Window(1, 3, 2, 1)
    assert dissected(tmp_path, max_steps=NEEDED, memory=0).flops.model_per_step is None
    assert dissected(tmp_path, max_steps=5, dissect=0).host is None
    with pytest.raises(MisconfigurationException, match="has 6 optimizer steps, and Dissect needs 7"):
        dissected(tmp_path, max_steps=NEEDED - 1)


def test_data_of_unknown_length_is_measured_and_a_warning_says_if_it_ended_early(tmp_path: Path) -> None:
    report = dissected(tmp_path, data=Batches(20))
    assert report.host is not None
    assert rows(report.host)["<data>"].data_s > 0
    with pytest.warns(UserWarning, match="saw too few steps"):
        fit(Toy(), Dissect(**SHORT, out=str(tmp_path)), Batches(4))


def test_two_fits_give_two_reports(tmp_path: Path) -> None:
    callback, module = Dissect(**SHORT, out=str(tmp_path)), Toy()
    trainer = fit(module, callback)
    first = callback.report
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches(20))
    assert first is not None
    assert callback.report is not None
    assert callback.report != first


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resuming_measures_anew_and_the_checkpoint_holds_nothing_of_it(tmp_path: Path) -> None:
    callback = Dissect(**SHORT, out=str(tmp_path))
    saver = ModelCheckpoint(
        tmp_path / "new", filename="{step}", every_n_train_steps=5, save_top_k=-1, enable_version_counter=False
    )
    fit(Toy(), [callback, saver], enable_checkpointing=True, max_steps=NEEDED)
    state = torch.load(tmp_path / "new" / "step=5.ckpt", weights_only=True)
    assert not any("Dissect" in key for key in state["callbacks"])

    again = Dissect(**SHORT, out=str(tmp_path))
    make_trainer(1, precision=32, callbacks=[again, saver], max_epochs=1, enable_checkpointing=True).fit(
        Toy(), batches(20), ckpt_path=str(tmp_path / "new" / "step=5.ckpt")
    )
    assert again.report is not None
    # Too few are left after it: 5 of 11 are done.
    short = make_trainer(1, precision=32, callbacks=[again, saver], max_steps=11, enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match="has 6 optimizer steps"):
        short.fit(Toy(), batches(20), ckpt_path=str(tmp_path / "new" / "step=5.ckpt"))


def test_two_optimizers_of_a_module_that_steps_itself_have_a_row_each(tmp_path: Path) -> None:
    report = dissected(tmp_path, Rivals(), data=batches(NEEDED))
    assert report.host is not None
    cut = rows(report.host)
    assert {name for name in cut if name.startswith("<optimizer")} == {"<optimizer 0 SGD>", "<optimizer 1 SGD>"}
    assert cut["maker"].calls == 2
    assert cut["judge"].backward_s > 0
    assert report.throughput.step_s.count == 3
    # A second fit goes on: batches are counted, not the two steps of each.
    callback, module = Dissect(**SHORT, out=str(tmp_path)), Rivals()
    trainer = fit(module, callback, batches(NEEDED))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches(NEEDED))
    assert callback.report is not None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_may_return_no_loss(tmp_path: Path) -> None:
    class Skips(Toy):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)

    report = dissected(tmp_path, Skips())
    assert report.host is not None
    assert sum(row.total_s for row in report.host.rows) == pytest.approx(report.host.step_s, rel=1e-9)


def test_a_loss_that_is_not_finite_is_in_the_report(tmp_path: Path) -> None:
    class Diverges(Toy):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss: Tensor = super().training_step(batch, batch_idx) * math.nan
            return loss

    report = dissected(tmp_path, Diverges())
    assert report.loss is not None
    assert math.isnan(report.loss)
    read = read_json(DissectReport, tmp_path / "dissect.json")
    assert read.loss is not None
    assert math.isnan(read.loss)


def test_it_gets_on_with_the_trainers_own_profiler(tmp_path: Path) -> None:
    profiler = SimpleProfiler(dirpath=str(tmp_path), filename="simple")
    callback = Dissect(**SHORT, out=str(tmp_path))
    trainer = fit(Toy(), callback, profiler=profiler)
    assert trainer.profiler is profiler  # type: ignore[attr-defined]
    assert callback.report is not None
    # Each of the twenty batches is in it, those that were dissected too.
    assert len(profiler.recorded_durations["run_training_batch"]) == 20
    assert len(profiler.recorded_durations["[Strategy]SingleDeviceStrategy.training_step"]) == 20
    assert profiler.current_actions == {}


def test_torchs_profiler_in_the_trainer_is_refused(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(dirpath=str(tmp_path), filename="torch")
    with pytest.raises(MisconfigurationException, match=r"PyTorchProfiler and Dissect both record.*dissect=0"):
        fit(Toy(), Dissect(**SHORT, out=str(tmp_path)), profiler=profiler)
    profiler.profiler = None  # it had begun, and would fail where it is collected


def test_a_fast_dev_run_measures_nothing(tmp_path: Path) -> None:
    callback = Dissect(out=str(tmp_path))
    with logged_lines() as lines:
        fit(Toy(), callback, fast_dev_run=True)
    assert "Dissect measures nothing in a fast_dev_run." in lines
    assert callback.report is None
    assert callback.stats == {}
    assert not (tmp_path / "dissect.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"clean": 0}, r"cannot measure with warmup=5, clean=0.*1 or more"),
        ({"warmup": -1}, "warmup=-1"),
        ({"dissect": -1}, "dissect=-1"),
        ({"memory": 2}, "memory 0 or 1"),
        ({"peak_flops": 0.0}, r"peak_flops is 0\.0.*Give FLOP/s"),
        ({"peak_flops": math.nan}, "peak_flops is nan"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Dissect(**arguments)


class Slow(Toy):
    """Rests in each of its steps, and not at all in others."""

    rest_s = 0.03

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.rest_s)
        return super().training_step(batch, batch_idx)


def test_the_clean_steps_take_as_long_as_they_do(tmp_path: Path) -> None:
    report = dissected(tmp_path, Slow(), clean=5, peak_flops=1e9)
    took = report.throughput
    assert 0.03 <= took.step_s.p50 < 0.06
    assert took.samples_per_s == pytest.approx(ROWS / took.step_s.mean, rel=1e-6)
    assert took.wait_s.p50 < 0.02
    assert report.flops.model_per_step is not None
    assert report.flops.mfu == pytest.approx(report.flops.model_per_step / (took.step_s.mean * 1e9))
    assert report.host is not None
    assert rows(report.host)["<training_step>"].forward_s >= 0.03


def test_waiting_for_data_is_the_datas(tmp_path: Path) -> None:
    class Late(Batches):
        @override
        def __iter__(self) -> Iterator[Tensor]:
            for batch in super().__iter__():
                time.sleep(0.03)
                yield batch

    report = dissected(tmp_path, data=Late(20))
    assert report.host is not None
    cut = rows(report.host)
    assert cut["<data>"].data_s >= 0.03
    assert report.host.step_s - cut["<data>"].data_s < 0.03
    assert 0.03 <= report.throughput.wait_s.p50 < 0.06


def test_tokens_are_counted_as_asked(tmp_path: Path) -> None:
    plain = dissected(tmp_path).throughput
    assert plain.tokens_per_s is None
    assert plain.padded_tokens_per_s is None
    counted = dissected(tmp_path, tokens_fn=lambda batch: 5 * len(batch)).throughput
    assert counted.tokens_per_s == pytest.approx(5 * ROWS / counted.step_s.mean, rel=1e-6)


def test_memory_that_is_taken_and_given_back_in_a_step_is_in_the_peak(tmp_path: Path) -> None:
    class Hungry(Toy):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            torch.ones(200 * 2**18).add_(1)  # 200 MiB
            return super().training_step(batch, batch_idx)

    plain, hungry = dissected(tmp_path).memory, dissected(tmp_path, Hungry()).memory
    if plain.peak_bytes is None or hungry.peak_bytes is None:
        pytest.skip(plain.note or "this kernel does not reset the peak of resident memory")
    assert 150 * 2**20 < hungry.peak_bytes - plain.peak_bytes < 300 * 2**20


def test_flops_and_saved_bytes_are_those_counted_outside(tmp_path: Path) -> None:
    module = Toy()
    report = dissected(tmp_path, module)
    batch = torch.ones(ROWS, SIZE)
    kept = saved_bytes(lambda: module.loss(batch), module=module)
    with FlopCount(module) as count:
        module.loss(batch).backward()
    assert report.memory.saved_bytes == kept.total
    assert report.flops.model_per_step == count.model_flops
    assert report.flops.hardware_per_step == count.hardware_flops
    assert report.host is not None
    assert sum(row.saved_bytes or 0 for row in report.host.rows) == kept.total
    assert rows(report.host)["first.3"].flops == count.by_module()["first.3"].total
    parameters = sum(each.numel() for each in module.parameters())
    assert report.memory.parameter_bytes == 4 * parameters
    assert report.memory.gradient_bytes == 4 * parameters
    # Adam: two of the size of each parameter, and a count.
    assert report.memory.optimizer_bytes == 2 * 4 * parameters + 4 * len(list(module.parameters()))


def test_checkpointing_is_seen_by_module(tmp_path: Path) -> None:
    plain, repeated = dissected(tmp_path), dissected(tmp_path, Toy(checkpointed=True))
    assert plain.host is not None
    assert repeated.host is not None
    assert not any(row.recompute_s for row in plain.host.rows)
    again = {row.name for row in repeated.host.rows if row.recompute_s}
    assert {"first", "first.0", "first.2", "second", "second.0"} <= again
    assert all(name.startswith(("first", "second")) for name in again)
    assert repeated.flops.hardware_per_step is not None
    assert repeated.flops.model_per_step == plain.flops.model_per_step
    assert repeated.flops.hardware_per_step > repeated.flops.model_per_step  # type: ignore[operator]
    assert repeated.memory.saved_bytes < plain.memory.saved_bytes  # type: ignore[operator]


def test_a_linear_layer_keeps_its_input_and_with_lora_fa_its_projection(tmp_path: Path) -> None:
    from lightning_efficient.callbacks import LoRAFA

    a, b, n, r = 32, 16, 6, 4

    class Layer(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.linear = nn.Linear(a, a), nn.Linear(a, b)

        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.linear(self.before(batch)).sum()

        @override
        def configure_optimizers(self) -> Any:
            return SGD([each for each in self.parameters() if each.requires_grad], lr=1e-3)

    data = DataLoader(torch.randn(20 * n, a), batch_size=n)  # type: ignore[arg-type,var-annotated]
    full = dissected(tmp_path, Layer(), data=data).host
    assert full is not None
    assert rows(full)["linear"].saved_bytes == 4 * n * a
    adapted = Dissect(**SHORT, out=str(tmp_path))
    fit(Layer(), [LoRAFA(r=r, target_modules=["linear"], model_attr=None), adapted], data)
    assert adapted.report is not None
    assert adapted.report.host is not None
    kept = [row.saved_bytes or 0 for row in adapted.report.host.rows if row.name.startswith("linear")]
    assert sum(kept) == 4 * n * r


def test_the_model_compiled_by_the_user_is_measured_and_a_note_says_what_is_not(tmp_path: Path) -> None:
    torch.compiler.reset()
    module = Toy()
    module.first.compile(backend="aot_eager")
    report = dissected(tmp_path, module)
    assert report.host is not None
    cut = rows(report.host)
    assert cut["first"].forward_s > 0
    assert cut["first"].backward_s > 0
    assert "first.0" not in cut
    assert report.flops.model_per_step is None
    assert any("compiled" in note for note in report.notes)
    assert "Compiled modules are one row each: first." in report.notes


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile itself
def test_a_lightning_module_compiled_as_a_whole_says_so(tmp_path: Path) -> None:
    torch.compiler.reset()
    callback = Dissect(**SHORT, out=str(tmp_path))

    class Plain(Toy):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

    fit(torch.compile(Plain(), backend="aot_eager"), callback)  # type: ignore[arg-type]
    assert callback.report is not None
    assert any("the whole model" in note for note in callback.report.notes)
