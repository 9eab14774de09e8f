"""AttachOptimizer: who gets the module and for how long, what is logged, and what it warns about."""

import csv
import signal
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_efficient.callbacks import AttachOptimizer
from lightning_efficient.models import AutoEncoder
from lightning_efficient.optimizers import Eva
from tests.compression.harness import recorded_warnings
from tests.support.trainers import logged_lines, make_trainer

STEPS, ROWS, FEATURES = 6, 16, 5
SEEN: dict[str, Any] = {"kv_samples": None, "g_scale": "expectation", "rescale": "clip"}
EVA_F: dict[str, Any] = {"variant": "eva_f", "lr": 0.02, **SEEN}
EVA: dict[str, Any] = {"variant": "eva", "lr": 0.02, **SEEN}


class Net(pl.LightningModule):
    """Two layers in float64, the same at every start.

    Args:
        optimizer: Called with the module.
        fault: Called in each step.
    """

    def __init__(
        self, optimizer: Callable[["Net"], Optimizer], *, fault: Callable[["Net"], None] = lambda net: None
    ) -> None:
        super().__init__()
        self.make_optimizer, self.fault = optimizer, fault
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, 3)).double()

    def loss(self, batch: list[Tensor]) -> Tensor:
        weight = self.net[0].weight
        return F.mse_loss(self.net(batch[0].to(weight.dtype)), batch[1].to(weight.dtype))

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.fault(self)
        with torch.autocast("cpu", enabled=False):  # exact, whatever precision plugin there is
            return self.loss(batch)

    @override
    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self)


def eva(**kwargs: Any) -> Callable[[Net], Optimizer]:
    return lambda net: Eva(net.parameters(), **{**EVA_F, **kwargs})


def data(steps: int = STEPS) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(steps * ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x[:, :3].square()), batch_size=ROWS)


def fit(net: pl.LightningModule, *callbacks: Callback, **kwargs: Any) -> pl.Trainer:
    ckpt_path, loader = kwargs.pop("ckpt_path", None), kwargs.pop("loader", None) or data()
    trainer = make_trainer(1, callbacks=list(callbacks), **{"max_epochs": 1, **kwargs})
    trainer.fit(net, loader, ckpt_path=ckpt_path)
    return trainer


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def by_hand(optimizer: Optimizer, net: Net, *, batches: Iterable[list[Tensor]] | None = None) -> Tensor:
    """The weights after a plain loop."""
    for batch in batches or data():
        optimizer.zero_grad()
        net.loss(batch).backward()
        optimizer.step()
    return weights(net)


def plain(**kwargs: Any) -> Tensor:
    """The weights after the same optimizer in a plain loop."""
    net = Net(eva())
    return by_hand(Eva(net.parameters(), **{**EVA_F, **kwargs}).attach(net), net)


def hooked(module: nn.Module) -> list[str]:
    return [name for name, each in module.named_modules() if each._forward_hooks]


class Watch(Callback):
    """What the optimizers say after each step."""

    def __init__(self) -> None:
        self.attached: list[list[bool]] = []
        self.reports: list[dict[str, Any]] = []
        self.nu: list[float] = []
        self.loss_scales: list[Any] = []

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.attached.append([each.attached for each in trainer.optimizers if isinstance(each, Eva)])
        (first, *_others) = trainer.optimizers
        assert isinstance(first, Eva)
        self.reports.append(first.kv_report())
        self.nu.append(float("nan") if first.nu is None else float(first.nu))
        self.loss_scales.append(first.loss_scale)

    def rho(self, step: int) -> list[float]:
        return [each.rho for each in self.reports[step - 1].values() if each.rho is not None]


# ---- who is attached, and for how long ----------------------------------------------------------------------------


def test_the_optimizer_is_attached_at_fit_start_and_trains_as_in_a_plain_loop() -> None:
    net, watch = Net(eva()), Watch()

    trainer = fit(net, AttachOptimizer(), watch)

    assert watch.attached == [[True]] * STEPS
    assert torch.equal(weights(net), plain())
    assert trainer.optimizers[0].stats.counted_steps == STEPS  # type: ignore[attr-defined]


def test_without_the_callback_the_first_step_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="add AttachOptimizer to Trainer"):
        fit(Net(eva()))


def test_it_is_detached_after_fit() -> None:
    net = Net(eva())

    trainer = fit(net, AttachOptimizer())

    assert hooked(net) == []
    assert not trainer.optimizers[0].attached  # type: ignore[attr-defined]


class UserError(Exception):
    pass


def test_it_is_detached_after_an_exception() -> None:
    def fail(net: Net) -> None:
        assert hooked(net) == ["net.0", "net.2"]
        raise UserError

    net = Net(eva(), fault=fail)
    with pytest.raises(UserError):
        fit(net, AttachOptimizer())

    assert hooked(net) == []


def test_it_is_detached_after_ctrl_c() -> None:
    def interrupt(net: Net) -> None:
        raise KeyboardInterrupt

    net, handler = Net(eva(), fault=interrupt), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(net, AttachOptimizer())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning has switched it off

    assert hooked(net) == []


def test_it_is_detached_after_a_stop_on_request() -> None:
    def stop(net: Net) -> None:
        net.trainer.should_stop = True

    net = Net(eva(), fault=stop)
    trainer = fit(net, AttachOptimizer())

    assert trainer.global_step == 1
    assert hooked(net) == []


def test_a_second_fit_attaches_the_new_optimizer() -> None:
    net, callback = Net(eva()), AttachOptimizer(log_every_n_steps=2)
    trainer = fit(net, callback)
    first = trainer.optimizers[0]

    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, data())

    assert trainer.optimizers[0] is not first
    assert trainer.optimizers[0].stats.counted_steps == STEPS  # type: ignore[attr-defined]
    assert hooked(net) == []
    net = Net(eva())
    for _ in range(2):
        expected = by_hand(Eva(net.parameters(), **EVA_F).attach(net), net)
    assert torch.equal(weights(trainer.lightning_module), expected)


def test_skipped_layers_follow_the_fallback_rule() -> None:
    net, watch = Net(eva()), Watch()

    fit(net, AttachOptimizer(skip=["net.2"]), watch)

    assert watch.reports[-1]["net.2.weight"].skipped == "skip has 'net.2'"
    assert watch.reports[-1]["net.0"].rho > 0
    by_user = Net(eva())
    assert torch.equal(weights(net), by_hand(Eva(by_user.parameters(), **EVA_F).attach(by_user, ["net.2"]), by_user))


def test_a_pattern_that_matches_nothing_stops_the_fit() -> None:
    net = Net(eva())

    with pytest.raises(ValueError, match=r"skip has '\*lm_head': no module has such a name"):
        fit(net, AttachOptimizer(skip=["*lm_head"]))

    assert hooked(net) == []


def test_an_optimizer_that_the_user_has_attached_keeps_what_the_user_said() -> None:
    watch = Watch()
    net = Net(lambda net: Eva(net.parameters(), **EVA_F).attach(net, skip=["net.2"]))

    with pytest.warns(
        UserWarning, match=r"AttachOptimizer\(skip=\['net.0'\]\) has no effect: the optimizer was attached"
    ):
        fit(net, AttachOptimizer(skip=["net.0"]), watch)

    assert watch.reports[-1]["net.2.weight"].skipped
    assert watch.reports[-1]["net.0"].rho > 0
    assert hooked(net) == []


class TwoOptimizers(Net):
    """One for each layer, stepped in turns."""

    def __init__(self, second: Callable[..., Optimizer]) -> None:
        super().__init__(eva())
        self.automatic_optimization = False
        self.second = second

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    @override
    def configure_optimizers(self) -> Any:
        return [Eva(self.net[0].parameters(), **EVA_F), self.second(self.net[2].parameters())]


def test_each_of_several_optimizers_is_attached_and_logged(tmp_path: Path) -> None:
    net, watch = TwoOptimizers(lambda params: Eva(params, **EVA)), Watch()

    fit(net, AttachOptimizer(log_every_n_steps=4), watch, logger=CSVLogger(tmp_path, name="", version=""))

    assert watch.attached == [[True, True]] * STEPS
    assert hooked(net) == []
    # Two steps a batch; the entry of each optimizer is a line of its own.
    rows = read(tmp_path)
    assert [int(row["step"]) for row in rows if "eva/rho" in row] == [4, 8, 12]
    assert [int(row["step"]) for row in rows if "eva1/rho" in row] == [4, 8, 12]
    by_user = TwoOptimizers(SGD)
    optimizers = [
        Eva(by_user.net[0].parameters(), **EVA_F).attach(by_user),
        Eva(by_user.net[2].parameters(), **EVA).attach(by_user),
    ]
    for batch in data():
        for optimizer in optimizers:
            optimizer.zero_grad()
            by_user.loss(batch).backward()
            optimizer.step()
    assert torch.equal(weights(net), weights(by_user))


def test_another_optimizer_beside_it_is_left_alone() -> None:
    watch = Watch()

    with recorded_warnings() as messages:
        fit(TwoOptimizers(lambda params: SGD(params, lr=0.1)), AttachOptimizer(), watch)

    assert watch.attached == [[True]] * STEPS
    assert [message for message in messages if "AttachOptimizer" in message] == []


@pytest.mark.parametrize("required", [True, False])
def test_where_nothing_is_attachable_it_warns_if_it_was_asked_for(required: bool) -> None:
    with recorded_warnings() as messages:
        fit(Net(lambda net: SGD(net.parameters(), lr=0.1)), AttachOptimizer(required=required))

    found = [message for message in messages if "found no optimizer to attach" in message]
    assert len(found) == required


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"skip": "*lm_head"}, r"skip is the string '\*lm_head'.*Write \['\*lm_head'\]"),
        ({"log_every_n_steps": 0}, "log_every_n_steps is 0"),
        ({"warn_inert_below": -0.1}, "warn_inert_below is -0.1"),
        ({"warn_inert_below": 1.5}, "warn_inert_below is 1.5"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AttachOptimizer(**arguments)


# ---- what it logs -------------------------------------------------------------------------------------------------


def read(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def logged(folder: Path, *, every: int, **kwargs: Any) -> tuple[list[dict[str, float]], Watch, AttachOptimizer]:
    callback, watch = AttachOptimizer(log_every_n_steps=every), Watch()
    logger = CSVLogger(folder, name="", version="")
    fit(Net(eva(kl_clip=1e-4)), callback, watch, logger=logger, **kwargs)
    return read(folder), watch, callback


def test_it_logs_what_the_optimizer_did_at_its_own_pace(tmp_path: Path) -> None:
    rows, watch, callback = logged(tmp_path, every=3)

    assert [int(row["step"]) for row in rows] == [3, 6]
    for row in rows:
        step = int(row["step"])
        assert row["eva/rho"] == pytest.approx(statistics.median(watch.rho(step)), rel=1e-9)
        assert row["eva/rho_max"] == pytest.approx(max(watch.rho(step)), rel=1e-9)
        assert row["eva/nu"] == pytest.approx(watch.nu[step - 1], rel=1e-9)
        assert row["eva/clipped"] == pytest.approx(sum(nu < 1 for nu in watch.nu[step - 3 : step]) / 3)
        assert row["eva/skipped_kv"] == 0
    assert any(row["eva/clipped"] > 0 for row in rows)
    assert callback.stats == {k: pytest.approx(v) for k, v in rows[-1].items() if k != "step"}


def test_accumulated_batches_are_no_steps(tmp_path: Path) -> None:
    rows, _, _ = logged(tmp_path, every=1, accumulate_grad_batches=2)

    assert [int(row["step"]) for row in rows] == [1, 2, 3]


def test_the_share_of_clipped_steps_is_of_this_fit() -> None:
    def make(net: Net) -> Optimizer:
        if not kept:
            kept.append(Eva(net.parameters(), **EVA_F, kl_clip=1e-6))
        return kept[0]

    kept: list[Optimizer] = []
    net, callback = Net(make), AttachOptimizer(log_every_n_steps=STEPS)
    fit(net, callback)
    assert callback.stats["eva/clipped"] == 1

    kept[0].param_groups[0]["lr"] = 1e-9
    fit(net, callback)

    assert callback.stats["eva/clipped"] == 0


def test_dropped_vectors_are_counted() -> None:
    x, y = data().dataset.tensors  # type: ignore[attr-defined]
    x = x.clone()
    x[ROWS * 2, 0] = torch.inf

    class Survives(Net):
        @override
        def on_after_backward(self) -> None:
            for p in self.parameters():
                p.grad.nan_to_num_(0.0, 0.0, 0.0)  # type: ignore[union-attr]

    callback = AttachOptimizer(log_every_n_steps=STEPS)
    fit(Survives(eva()), callback, loader=DataLoader(TensorDataset(x, y), batch_size=ROWS))

    assert callback.stats["eva/skipped_kv"] == 1


def test_the_closing_line_says_what_was_done() -> None:
    with logged_lines() as lines:
        fit(Net(eva()), AttachOptimizer())

    (line,) = [line for line in lines if line.startswith("Eva: ")]
    assert f"{STEPS} steps preconditioned 2 layers, median rho 0." in line
    assert f"{STEPS} vector updates (0 dropped)" in line


# ---- what it warns about ------------------------------------------------------------------------------------------


def warned(model: pl.LightningModule, *inputs: Tensor, epochs: int = 1, **kwargs: Any) -> list[str]:
    """What was said about Eva."""
    loader = DataLoader(TensorDataset(*inputs), batch_size=ROWS)
    callback = AttachOptimizer(log_every_n_steps=2, **kwargs)
    with recorded_warnings() as messages:
        fit(model, callback, loader=loader, max_epochs=epochs, precision="32-true")
    return [message for message in messages if "Eva" in message]


def autoencoder(**kwargs: Any) -> AutoEncoder:
    return AutoEncoder(16, 4, hidden=[16, 8], optimizer=lambda params: Eva(params, **kwargs))


def images() -> Tensor:
    return torch.rand(STEPS * ROWS, 16, generator=torch.Generator().manual_seed(2))


def test_the_published_defaults_are_told_to_be_inert_once() -> None:
    (message,) = warned(autoencoder(), images(), images(), epochs=3)

    assert "curvature term is numerically inert" in message
    assert "variant='eva_f'" in message


def test_what_works_is_not_warned_about() -> None:
    assert warned(autoencoder(**EVA_F), images(), images(), epochs=3) == []


def test_a_threshold_of_zero_never_warns() -> None:
    assert warned(autoencoder(), images(), images(), warn_inert_below=0.0) == []


class BehindBatchNorm(pl.LightningModule):
    def __init__(self, norm: Callable[[int], nn.Module], **kwargs: Any) -> None:
        super().__init__()
        self.kwargs = kwargs
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), norm(4), nn.Linear(16, 4)

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images = batch[0].view(-1, 1, 4, 4)
        return F.mse_loss(self.head(self.norm(self.conv(images)).relu().flatten(1)), batch[0][:, :4])

    @override
    def configure_optimizers(self) -> Optimizer:
        return Eva(self.parameters(), **self.kwargs)


def test_layers_in_front_of_batch_norm_are_named() -> None:
    (message,) = warned(BehindBatchNorm(nn.BatchNorm2d, **EVA), images(), warn_inert_below=0.0)

    assert "output gradients of conv cancel out over the batch" in message


@pytest.mark.parametrize(
    "model",
    [
        lambda: BehindBatchNorm(lambda channels: nn.GroupNorm(2, channels), **EVA),
        lambda: BehindBatchNorm(nn.BatchNorm2d, **{**EVA, "kv_samples": ROWS // 2}),
        lambda: BehindBatchNorm(nn.BatchNorm2d, **EVA_F),
    ],
    ids=["another norm", "a part of the batch", "Eva-f"],
)
def test_other_layers_are_not(model: Callable[[], pl.LightningModule]) -> None:
    assert warned(model(), images(), warn_inert_below=0.0) == []


# ---- with the rest of Lightning -----------------------------------------------------------------------------------


def scaled(scale: float | None) -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("scale", [65536.0, None])
def test_the_scale_of_the_loss_changes_nothing(scale: float | None) -> None:
    net, watch = Net(eva(**EVA)), Watch()

    fit(net, AttachOptimizer(), watch, precision=None, plugins=[scaled(scale)])

    assert all(each is not None for each in watch.loss_scales)
    # Powers of two: exact.
    assert torch.equal(weights(net), plain(**EVA))


def test_a_step_that_the_scaler_skips_leaves_no_trace() -> None:
    class Overflows(Net):
        @override
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx == 2 else 1)

    net = Overflows(eva(**EVA))
    trainer = fit(net, AttachOptimizer(), precision=None, plugins=[scaled(65536.0)])

    by_user = Net(eva())
    optimizer = Eva(by_user.parameters(), **EVA).attach(by_user)
    batches = list(data())
    assert torch.equal(weights(net), by_hand(optimizer, by_user, batches=[*batches[:2], *batches[3:]]))
    assert trainer.optimizers[0].stats.skipped_kv == 0  # type: ignore[attr-defined]


def test_the_scale_of_one_fit_is_forgotten_in_the_next() -> None:
    """An optimizer that is kept for a second fit, without a scaler."""
    kept: list[Optimizer] = []

    def make(net: Net) -> Optimizer:
        if not kept:
            kept.append(Eva(net.parameters(), **EVA))
        return kept[0]

    net = Net(make)
    fit(net, AttachOptimizer(), precision=None, plugins=[scaled(65536.0)])
    fit(net, AttachOptimizer())

    by_user = Net(make)
    optimizer = Eva(by_user.parameters(), **EVA).attach(by_user)
    assert torch.equal(weights(net), by_hand(optimizer, by_user, batches=[*data(), *data()]))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the run that goes on saves nothing
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_resuming_equals_not_having_stopped(precision: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    # A long memory, so that vectors rounded to the type of the weights would show.
    in_one_go = Net(eva(**EVA, kv_new_weight=0.1))
    fit(in_one_go, AttachOptimizer(), saver, max_epochs=2, enable_checkpointing=True, precision=precision)

    resumed = Net(eva(**EVA, kv_new_weight=0.1))
    checkpoint = tmp_path / "epoch=0.ckpt"
    trainer = fit(resumed, AttachOptimizer(), max_epochs=2, precision=precision, ckpt_path=str(checkpoint))

    assert trainer.optimizers[0].stats.counted_steps == STEPS  # type: ignore[attr-defined]
    assert torch.equal(weights(resumed), weights(in_one_go))
    (state,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    vectors = [each["kv_a"].dtype for each in state["state"].values() if "kv_a" in each]
    assert vectors == [torch.float64 if precision == "64-true" else torch.float32] * 2


def test_a_compiled_module_trains_as_an_eager_one() -> None:
    net, watch = Net(eva(**EVA)), Watch()
    compiled = torch.compile(net, backend="aot_eager")

    fit(compiled, AttachOptimizer(), watch)  # type: ignore[arg-type]

    assert all(watch.rho(step) for step in range(1, STEPS + 1))
    torch.testing.assert_close(weights(net), plain(**EVA), rtol=0, atol=1e-12)
    assert hooked(net) == []
