"""LoRAFA on two real ranks: DDP equals one process with the joint batch, FSDP2 trains, saves and goes on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lightning_efficient.callbacks import LoRAFA, load_lora_fa_checkpoint
from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa
from tests.callbacks.lora_fa_toys import equal, tensors
from tests.plugins.tiny import BATCHES, CLASSES, FEATURES, TinyData, TinyModule
from tests.support.collectives import count_collectives
from tests.support.ranks import run_ranks
from tests.support.trainers import make_trainer

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-10
"""Float64 sums in another order over six steps of Adam; a lost all-reduce shows as 1e-2."""

SETTINGS: dict[str, Any] = {"r": 4, "alpha": 8.0, "adapter_dtype": "float64"}


def adam(parameters: Any) -> Optimizer:
    return Adam(parameters, lr=0.03)


class TrainData(TinyData):
    val_dataloader = pl.LightningDataModule.val_dataloader


def fit(module: pl.LightningModule, world_size: int, *callbacks: Callback, **kwargs: Any) -> pl.Trainer:
    ckpt_path = kwargs.pop("ckpt_path", None)
    trainer = make_trainer(world_size, callbacks=list(callbacks), **{"max_epochs": 2, **kwargs})
    data = TinyData() if isinstance(module, TinyModule) else TrainData()
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


# ---- DDP ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DDPRun:
    weights: dict[str, Tensor]
    sent: list[int]
    sent_acp: list[int]
    a_of_eva: dict[str, Tensor]
    a_of_gradient: dict[str, Tensor]
    files: list[str]


class CountSent(Callback):
    """Elements of the gradients that one step reduces."""

    sent: list[int]

    @override
    def on_before_backward(self, *_: Any) -> None:
        self.counting = count_collectives()
        self.seen = self.counting.__enter__()

    @override
    def on_after_backward(self, *_: Any) -> None:
        self.counting.__exit__(None, None, None)
        self.sent = [each.numel for each in self.seen if each.op == "all_reduce"]


def _ddp(rank: int, world_size: int, folder: str) -> DDPRun:
    torch.manual_seed(rank)
    module, count, count_acp = TinyModule(adam).double(), CountSent(), CountSent()
    lora = LoRAFA("net", **SETTINGS, export_dir=f"{folder}/adapter-{rank}")
    fit(module, world_size, lora, count, strategy="ddp")
    fit(TinyModule(adam).double(), world_size, LoRAFA("net", **SETTINGS), count_acp, strategy="acp_sgd")
    chosen = []
    for init in ("eva", "gradient"):
        other = TinyModule(adam).double()
        fit(other, world_size, LoRAFA("net", **SETTINGS, init=init, calibration_batches=2), strategy="ddp")
        chosen.append(tensors(other, "lora_A"))
    files = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
    return DDPRun(tensors(module), count.sent, count_acp.sent, *chosen, files)


def test_ddp_equals_one_process_with_the_joint_batch(tmp_path: Path) -> None:
    first, second = run_ranks(_ddp, 2, str(tmp_path))
    alone = TinyModule(adam).double()
    fit(alone, 1, LoRAFA("net", **SETTINGS))

    assert equal(first.weights, second.weights)
    for name, each in tensors(alone).items():
        torch.testing.assert_close(first.weights[name], each, rtol=0, atol=TOLERANCE)
        if "lora_B" not in name:
            assert torch.equal(first.weights[name], each), name

    trained = sum(each.numel() for each in tensors(alone, "lora_B").values())
    assert sum(first.sent) == trained  # of 4 x 34 + base, only B travels
    assert 0 < sum(first.sent_acp) <= trained
    assert [name.split("/")[0] for name in first.files] == ["adapter-0"] * len(first.files)  # rank 0 alone writes

    for one, other in ((first.a_of_eva, second.a_of_eva), (first.a_of_gradient, second.a_of_gradient)):
        assert equal(one, other)
        assert not any(torch.equal(each, tensors(alone)[name]) for name, each in one.items())
    joint = TinyModule(adam).double()
    fit(joint, 1, LoRAFA("net", **SETTINGS, init="eva", calibration_batches=2))
    for name, each in tensors(joint, "lora_A").items():  # the ranks' products add up: the same subspace
        found = first.a_of_eva[name].double()
        torch.testing.assert_close(found.T @ found, each.double().T @ each.double(), rtol=0, atol=1e-3)


# ---- FSDP2 --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Sharded(pl.LightningModule):
    """Puts adapters in and shards its blocks itself, as FSDP2 wants it.

    Args:
        each_linear: shard A and B by themselves, which is wrong.
    """

    def __init__(self, each_linear: bool = False) -> None:
        super().__init__()
        self.each_linear, self.net, self.losses = each_linear, None, []

    @override
    def configure_model(self) -> None:
        if self.net is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = nn.Sequential(Block(FEATURES, 16), Block(16, 14), Block(14, CLASSES)).double()
        mesh = getattr(self, "_device_mesh", None)
        if mesh is None or self.trainer is None:
            return
        apply_lora_fa(self.net, LoRAFAConfig(**SETTINGS))
        for block in self.net:
            if self.each_linear:
                fully_shard(block.linear.lora_B["default"], mesh=mesh["data_parallel"])
                fully_shard(block.linear.lora_A["default"], mesh=mesh["data_parallel"])
            else:
                fully_shard(block, mesh=mesh["data_parallel"])

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])  # type: ignore[misc]
        self.losses.append(loss.item())
        return loss

    @override
    def configure_optimizers(self) -> Optimizer:
        return adam([p for p in self.parameters() if p.requires_grad])


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in module.named_parameters()}


def sharding(full: bool) -> dict[str, Any]:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=not full)
    return {"strategy": strategy, "precision": "32-true"}  # converts nothing: the module is float64 itself


@dataclass(frozen=True)
class FSDPRun:
    in_one_go: dict[str, Tensor]
    resumed: dict[str, Tensor]
    steps_resumed: int
    lean: float
    errors: dict[str, str]
    strict_loading: bool


def _error(*args: Any, **kwargs: Any) -> str:
    try:
        fit(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _fsdp(rank: int, world_size: int, folder: str, full: bool) -> FSDPRun:
    torch.manual_seed(rank)
    in_one_go, stopped, resumed, lora = Sharded(), Sharded(), Sharded(), LoRAFA("net", **SETTINGS)
    fit(in_one_go, world_size, lora, **sharding(full))
    path = f"{folder}/it.ckpt"
    trainer = fit(stopped, world_size, LoRAFA("net", **SETTINGS), **sharding(full), max_epochs=1)
    trainer.save_checkpoint(path)
    fit(resumed, world_size, LoRAFA("net", **SETTINGS), **sharding(full), ckpt_path=path)
    errors = {
        "export": _error(Sharded(), world_size, LoRAFA("net", **SETTINGS, export_dir=folder), **sharding(full)),
        "init": _error(Sharded(), world_size, LoRAFA("net", **SETTINGS, init="eva"), **sharding(full)),
        "linear": _error(Sharded(each_linear=True), world_size, LoRAFA("net", **SETTINGS), **sharding(full)),
    }
    if full:
        for key in ("net.0.linear.lora_A.default.weight", "net.1.linear.lora_B.default.weight"):
            if rank == 0:
                checkpoint = torch.load(path, weights_only=True)
                del checkpoint["state_dict"][key]
                torch.save(checkpoint, f"{folder}/{key}.ckpt")
            torch.distributed.barrier()
            errors[key] = _error(
                Sharded(), world_size, LoRAFA("net", **SETTINGS), **sharding(full), ckpt_path=f"{folder}/{key}.ckpt"
            )
    return FSDPRun(
        whole(in_one_go), whole(resumed), len(resumed.losses), lora.stats["lora_fa/adapted"], errors,
        resumed.strict_loading,
    )  # fmt: skip


@pytest.mark.parametrize("full", [False, True], ids=["distributed checkpoint", "full checkpoint"])
def test_fsdp2_trains_saves_adapters_only_and_goes_on(full: bool, tmp_path: Path) -> None:
    first, second = run_ranks(_fsdp, 2, str(tmp_path), full, timeout=120)
    assert equal(first.in_one_go, second.in_one_go)
    assert first.steps_resumed == BATCHES
    assert first.lean == 3
    assert first.strict_loading

    alone = Sharded()
    fit(alone, 1, LoRAFA("net", **SETTINGS), precision="32-true")
    for name, each in tensors(alone).items():
        torch.testing.assert_close(first.in_one_go[name], each, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(first.resumed[name], first.in_one_go[name], rtol=0, atol=1e-14)

    assert "cannot be written at the end: the adapters are sharded" in first.errors["export"]
    assert "needs whole layers, and they are sharded" in first.errors["init"]
    assert "fully_shard was called on a linear inside an adapted layer" in first.errors["linear"]
    if full:
        for key in ("net.0.linear.lora_A.default.weight", "net.1.linear.lora_B.default.weight"):
            assert f"The checkpoint lacks {key}" in first.errors[key]
        held = set(torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"])
        assert held == {name for name in first.in_one_go if "lora_" in name}

    fresh = load_lora_fa_checkpoint(Sharded(), tmp_path / "it.ckpt")  # by one process, without a Trainer
    one_epoch = Sharded()
    fit(one_epoch, 1, LoRAFA("net", **SETTINGS), max_epochs=1, precision="32-true")
    for name, each in tensors(one_epoch).items():
        torch.testing.assert_close(tensors(fresh)[name], each, rtol=0, atol=TOLERANCE)


def _shards_without_adapters(rank: int, world_size: int) -> str:
    class Plain(Sharded):
        def configure_model(self) -> None:
            self.net = nn.Sequential(Block(FEATURES, 16), Block(16, CLASSES)).double()
            for block in self.net:
                fully_shard(block, mesh=self._device_mesh["data_parallel"])  # type: ignore[index]

    return _error(Plain(), world_size, LoRAFA("net", **SETTINGS), **sharding(True))


def test_sharding_before_the_adapters_are_in_is_refused() -> None:
    for error in run_ranks(_shards_without_adapters, 2):
        assert "sharded already: adapters have to be there before fully_shard" in error
