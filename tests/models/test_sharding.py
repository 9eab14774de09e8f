"""Language models over two ranks by FSDP2: the same training as in one process, on CPUs."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_efficient.models import CausalLM, HFCausalLM, LlamaLM
from lightning_efficient.strategies import FullyShardedStrategy
from tests.support.ranks import run_ranks
from tests.support.trainers import make_trainer

ROWS, LENGTH, STEPS = 8, 12, 3
SHAPE: dict[str, Any] = {"hidden_size": 16, "ffn_size": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}


def build(kind: str, **options: Any) -> CausalLM:
    torch.manual_seed(0)

    def momentum(parameters: Any) -> SGD:
        return SGD(parameters, lr=0.1, momentum=0.9)

    if kind == "llama":
        return LlamaLM(**SHAPE, optimizer=momentum, **options).double()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    source = {"model_type": "llama", **dict(zip(names, SHAPE.values(), strict=True))}
    return HFCausalLM(source, optimizer=momentum, dtype="float64", **options)


def loader(rank: int, world_size: int) -> DataLoader[Any]:
    ids = torch.randint(32, (STEPS, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    own = ids[:, rank::world_size].flatten(0, 1)
    rows = [{"input_ids": row[:-1], "labels": row[1:]} for row in own]
    return DataLoader(rows, batch_size=ROWS // world_size)  # type: ignore[arg-type]


def fit(module: pl.LightningModule, rank: int, world_size: int, **kwargs: Any) -> pl.Trainer:
    # The strategy allows no 64-true, so the module is float64 itself, which 32-true leaves alone.
    trainer = make_trainer(world_size, **{"precision": "32-true", "limit_val_batches": 0, **kwargs})
    trainer.fit(module, loader(rank, world_size), loader(rank, world_size))
    return trainer


def train(rank: int, world_size: int, kind: str, path: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    module = build(kind, **options)
    strategy = FullyShardedStrategy() if world_size > 1 else "auto"
    torch.manual_seed(0)  # HFCausalLM draws its weights now
    trainer = fit(module, rank, world_size, strategy=strategy, max_epochs=1)
    kinds = {type(each).__name__ for each in module.parameters()}
    trainer.save_checkpoint(path)
    weights = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in module.named_parameters()}
    return weights, ",".join(sorted(kinds))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"reshard_after_forward": True, "activation_checkpointing": True}),
        ("llama", {"reshard_after_forward": False}),
        ("hf", {"reshard_after_forward": True}),
    ],
)
def test_two_ranks_equal_one_process_with_the_joint_batch(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    if kind == "hf":
        pytest.importorskip("transformers")
    alone, _ = train(0, 1, kind, str(tmp_path / "alone.ckpt"), options)
    ranks = run_ranks(train, 2, kind, str(tmp_path / "sharded.ckpt"), options, timeout=100)

    start = build(kind)
    start.configure_model()
    assert any(not torch.equal(alone[name], p.to(alone[name].dtype)) for name, p in start.named_parameters())
    for weights, kinds in ranks:
        assert kinds == "DTensor"
        for name, each in alone.items():
            # Sums in float64 in another order over three steps.
            torch.testing.assert_close(weights[name], each, rtol=0, atol=1e-12)

    stored = torch.load(tmp_path / "sharded.ckpt", weights_only=True)
    loaded = build(kind, **options)
    loaded.configure_model()
    loaded.load_state_dict(stored["state_dict"])
    for name, each in loaded.named_parameters():
        torch.testing.assert_close(each.detach(), alone[name], rtol=0, atol=1e-12)


def _offload(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError, match="training runs on cpu") as raised:
        fit(build("llama", cpu_offload=True), rank, world_size, strategy=FullyShardedStrategy())
    return str(raised.value)


@pytest.mark.distributed
def test_offload_needs_a_gpu() -> None:
    assert "there is no device memory to free" in run_ranks(_offload, 1)[0]


def test_offload_without_sharding_is_no_silent_no_op() -> None:
    with pytest.raises(ValueError, match="cpu_offload is set, but the strategy does not shard"):
        fit(build("llama", cpu_offload=True), 0, 1, max_steps=1)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_weights_drawn_on_the_device_have_its_type_and_the_same_distribution(precision: Any) -> None:
    torch.manual_seed(0)
    module = LlamaLM(**SHAPE, init_on_device=True)
    assert all(each.is_meta for each in module.parameters())

    fit(module, 0, 1, precision=precision, max_steps=1)

    wanted = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16}[precision]
    assert {each.dtype for each in module.parameters()} == {wanted}
    # 256 draws of deviation 0.02, and one step of AdamW by 0.001 on top.
    assert float(module.model.model.layers[0].self_attn.q_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert float(module.model.model.norm.weight.detach().mean()) == pytest.approx(1, abs=0.05)
