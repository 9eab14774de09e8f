"""The in-tree mixture-of-experts Llama: equal to Mixtral, trained, generated with, and spread over real ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import SGD

from lightning_efficient.data import SyntheticTokens
from lightning_efficient.models import MOE_LLAMA_PRESETS, MoELlama, MoELlamaConfig, MoELlamaLM
from lightning_efficient.models._shard import shard_heads
from lightning_efficient.models.generation import generate
from lightning_efficient.models.llama import SwiGLU
from lightning_efficient.moe import MoELayer, aux_loss, moe_layers
from lightning_efficient.moe.hf import swap_state_dict, unswap_state_dict
from lightning_efficient.strategies import FullyShardedStrategy, ParmStrategy
from tests.data.recording import trainer
from tests.models.test_sharding import fit as fit_sharded
from tests.support.ranks import run_ranks

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "ffn_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 32,
    "num_experts": 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "two of four": {},
    "three of eight, tied": {"num_experts": 8, "top_k": 3, "tie_embeddings": True},
    "experts of their own size": {"expert_size": 20, "num_kv_heads": None},
}


def small(seed: int = 0, *, activation_checkpointing: bool = False, **changes: Any) -> MoELlama:
    torch.manual_seed(seed)
    return MoELlama(MoELlamaConfig(**(SMALL | changes)), activation_checkpointing=activation_checkpointing)


def with_large_weights(model: MoELlama) -> MoELlama:
    """Weights with which routes and attention are far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def some_ids(rows: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(61, (rows, 16), generator=torch.Generator().manual_seed(seed))


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_names_equal_mixtral(name: str) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    ours = with_large_weights(small(**VARIANTS[name])).eval()
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**ours.config.to_hf())).eval()
    theirs.load_state_dict(unswap_state_dict(ours))  # strict: every name is there, and no other
    with torch.no_grad():
        expected = theirs(input_ids=some_ids(), use_cache=False).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(some_ids()), expected, rtol=1e-5, atol=1e-5)

    back = small(seed=9, **VARIANTS[name])
    back.load_state_dict(swap_state_dict(theirs.state_dict()))
    for key, weight in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], weight)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe_every": 2}, "moe_every is 2"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"normalize": "never"}, "normalize is 'never'"),
        ({"top_k": 1}, "top_k is 1"),
    ],
)
def test_what_is_no_mixtral_is_not_called_one(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MoELlamaConfig(**(SMALL | changes)).to_hf()


def test_every_second_layer_has_experts() -> None:
    model = small(num_layers=4, moe_every=2)
    assert [type(layer.mlp) for layer in model.model.layers] == [SwiGLU, MoELayer, SwiGLU, MoELayer]


def test_presets_fit_together() -> None:
    for name, shape in MOE_LLAMA_PRESETS.items():
        with torch.device("meta"):
            model = MoELlama(MoELlamaConfig(**shape))
        if name == "mixtral-8x7b":  # as published: 46.7 billion
            assert sum(each.numel() for each in model.parameters()) == 46_702_792_704


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe_every": 3}, "moe_every is 3, of 2 layers"),
        ({"top_k": 5}, "top_k is 5, of 4 experts"),
        ({"drop_policy": "last"}, "no drop_policy 'last'"),
        ({"activation": "tanh"}, "no activation 'tanh'"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0"),
    ],
)
def test_a_bad_option_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        small(**changes)


def test_an_unknown_size_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no Llama of size 'mixtral-8x7B'.*did you mean 'mixtral-8x7b'"):
        MoELlamaLM("mixtral-8x7B")


# Room for the even share alone: some assignments are dropped, and checkpointing must drop the same again.
@pytest.mark.parametrize("jitter", [0.0, 0.3])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_checkpointing_changes_no_gradient(capacity_factor: float | None, jitter: float) -> None:
    def gradients(seed: int, activation_checkpointing: bool) -> dict[str, Tensor]:
        model = with_large_weights(
            small(
                activation_checkpointing=activation_checkpointing,
                capacity_factor=capacity_factor,
                min_capacity=1,
                jitter=jitter,
                z_loss_coef=0.1,
            )
        )
        torch.manual_seed(seed)
        (model(some_ids()).square().mean() + aux_loss(model)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    stored, recomputed, other = gradients(5, False), gradients(5, True), gradients(6, True)

    assert stored.keys() == recomputed.keys()
    for name, gradient in stored.items():
        assert torch.equal(recomputed[name], gradient), name
    router = "model.layers.1.mlp.router.weight"
    assert torch.equal(other[router], stored[router]) == (not jitter)


def test_generation_with_the_cache_equals_reading_all_tokens_anew() -> None:
    model = with_large_weights(small())
    ids = some_ids()[:, :5]
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat((expected, model.eval()(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(model, ids, 8), expected)
    # Other prompts in the batch take no slot from a row where nothing is dropped.
    assert torch.equal(generate(model, ids[:1], 8), expected[:1])
    enough = with_large_weights(small(capacity_factor=1.0, eval_capacity_factor=2.0))
    assert torch.equal(generate(enough, ids, 8), generate(model, ids, 8))


# ---- the LightningModule ---------------------------------------------------------------------------------------------


def adam(lr: float) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def test_the_planted_rule_is_learned(tmp_path: Path) -> None:
    data = SyntheticTokens(vocab_size=16, block_size=16, batch_size=32, num_train_tokens=32_768)
    torch.manual_seed(0)
    model = MoELlamaLM(**{**SMALL, "num_layers": 1, "vocab_size": 16}, optimizer=adam(1e-2))
    run = trainer(tmp_path, enable_checkpointing=False, max_steps=100, val_check_interval=50)
    run.fit(model, data)
    # As for the plain Llama: 16 384 validation tokens have a standard error of about 0.01 nats around the entropy.
    assert data.entropy_floor - 0.04 < float(run.callback_metrics["val_loss"]) < data.entropy_floor + 0.1
    assert float(run.callback_metrics["dropped"]) == 0


def test_the_loss_of_training_is_cross_entropy_and_auxiliary_loss_and_the_parts_are_logged(tmp_path: Path) -> None:
    data = SyntheticTokens(vocab_size=16, block_size=16, batch_size=4)
    options = {**SMALL, "vocab_size": 16, "capacity_factor": 0.5, "min_capacity": 1, "aux_loss_coef": 0.3}
    seen: dict[str, float] = {}

    class Recorded(MoELlamaLM):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            seen["loss"], seen["aux_loss"] = loss.item(), aux_loss(self).item()
            with torch.no_grad():
                logits = self(batch["input_ids"])
            seen["train_loss"] = float(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))
            dropped = [layer.stats.dropped for _, layer in moe_layers(self) if layer.stats is not None]
            seen["dropped"] = float(sum(dropped)) / (2 * 2 * 64)  # layers, choices, tokens
            return loss

    torch.manual_seed(0)
    run = trainer(tmp_path, enable_checkpointing=False, max_steps=1, limit_val_batches=0)
    run.fit(Recorded(**options), data)
    logged = {name: float(run.callback_metrics[name]) for name in ("train_loss", "aux_loss", "dropped")}
    assert logged == pytest.approx({name: seen[name] for name in logged}, rel=1e-6)
    assert seen["loss"] == pytest.approx(logged["train_loss"] + logged["aux_loss"], rel=1e-6)
    # Room for half of the assignments: half at least have no slot.
    assert 0.5 <= logged["dropped"] < 1


def test_a_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MoELlamaLM(**SMALL, moe_every=2, capacity_factor=1.5, jitter=0.1)
    run = trainer(tmp_path, enable_checkpointing=False, max_steps=1, limit_val_batches=0)
    run.fit(model, SyntheticTokens(vocab_size=61, block_size=16))
    run.save_checkpoint(tmp_path / "lm.ckpt")
    loaded = MoELlamaLM.load_from_checkpoint(tmp_path / "lm.ckpt", weights_only=True)
    assert loaded.model.config == model.model.config
    assert torch.equal(loaded.eval()(some_ids()), model.eval()(some_ids()))


def test_weights_drawn_in_place_are_those_drawn_at_once() -> None:
    late = MoELlamaLM(**SMALL, moe_every=2, init_on_device=True)
    assert all(each.is_meta for each in late.parameters())
    at_once = small(moe_every=2)
    torch.manual_seed(3)
    at_once.reset_parameters()
    torch.manual_seed(3)
    late.configure_model()
    for name, weight in at_once.state_dict().items():
        assert torch.equal(late.model.state_dict()[name], weight), name
    late.configure_model()
    assert torch.equal(late.model.lm_head.weight, at_once.lm_head.weight)


# ---- on real ranks ---------------------------------------------------------------------------------------------------


def _heads_over_ranks(rank: int, world_size: int, changes: dict[str, Any]) -> dict[str, Tensor]:
    model = with_large_weights(small(**changes)).double()
    shard_heads(model, init_device_mesh("cpu", (world_size,)))
    shard_heads(model, init_device_mesh("cpu", (world_size,)))  # once is enough
    logits = model(some_ids())
    logits.square().mean().backward()
    heads = model.model.layers[0].get_submodule("self_attn").get_parameter("q_proj.weight")
    assert heads.to_local().shape[0] * world_size == heads.shape[0]  # type: ignore[operator]
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"logits": logits.detach()} | {
        name: getattr(each, "full_tensor", lambda each=each: each)() for name, each in gradients.items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{}, {"moe_every": 2, "activation": "relu"}])
def test_attention_over_two_ranks_equals_attention_on_one(changes: dict[str, Any]) -> None:
    model = with_large_weights(small(**changes)).double()
    logits = model(some_ids())
    logits.square().mean().backward()
    expected = {"logits": logits.detach()} | {
        name: each.grad for name, each in model.named_parameters() if each.grad is not None
    }
    for found in run_ranks(_heads_over_ranks, 2, changes, timeout=150):
        assert found.keys() == expected.keys()
        for name, each in expected.items():
            torch.testing.assert_close(found[name], each, rtol=1e-10, atol=1e-12)


def _too_many_ranks(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError, match="model-parallel ranks") as raised:
        shard_heads(small(), init_device_mesh("cpu", (world_size,)))
    return str(raised.value)


@pytest.mark.distributed
def test_heads_that_do_not_divide_are_an_error_on_every_rank() -> None:
    expected = "num_heads is 4, not divisible by the 3 model-parallel ranks"
    assert all(message.startswith(expected) for message in run_ranks(_too_many_ranks, 3, timeout=150))


def _momentum(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.1, momentum=0.9)


# Cross-entropy and z-loss are means over tokens, so that those of two halves are that of the whole; the loss of the
# loads is a product of means, which is not.
LINEAR: dict[str, Any] = {**SMALL, "vocab_size": 32, "aux_loss_coef": 0.0, "z_loss_coef": 0.1, "moe_every": 2}


def _train(rank: int, world_size: int, strategy: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], set[str]]:
    # The strategies allow no 64-true: a module that is float64 itself is left alone by 32-true.
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        module = MoELlamaLM(**LINEAR, optimizer=_momentum, **options)
        torch.manual_seed(7 + rank)  # ranks agree on weights that are drawn later, whatever their generators
        made: dict[str, Any] = {"auto": "auto", "fsdp": FullyShardedStrategy()}
        sizes = {"model_parallel_size": 2, "expert_parallel_size": 2, "expert_sharding_size": 2}
        made["parm"] = ParmStrategy(**sizes, schedule="s1_hier/2", verify_inputs=True)
        groups = world_size // 2 if strategy == "parm" else world_size
        group = rank // 2 if strategy == "parm" else rank
        fit_sharded(module, group, groups, strategy=made[strategy], devices=world_size, max_epochs=1)
    finally:
        torch.set_default_dtype(torch.float32)
    cut = {name for name, each in module.model.named_parameters() if type(each).__name__ == "DTensor"}
    return {name: each.detach() for name, each in unswap_state_dict(module.model).items()}, cut


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "ranks", "options"),
    [
        ("parm", 4, {"init_on_device": True}),
        ("parm", 4, {"activation_checkpointing": True, "tensor_parallel": False}),
        ("fsdp", 2, {}),
    ],
)
def test_training_on_ranks_equals_training_alone(strategy: str, ranks: int, options: dict[str, Any]) -> None:
    alone, _ = _train(0, 1, "auto", options)
    for weights, cut in run_ranks(_train, ranks, strategy, options, timeout=150):
        assert any("experts" in name for name in cut)
        assert any("self_attn" in name for name in cut) == options.get("tensor_parallel", True)
        for name, each in alone.items():
            # Sums in float64 in another order over three steps.
            torch.testing.assert_close(weights[name], each, rtol=0, atol=1e-11)
