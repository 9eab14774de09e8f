"""Mixture-of-experts models of transformers with swapped blocks: the same function, gradients and files."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.models import HFCausalLM
from lightning_efficient.moe import MoELayer, MoESizes, MoETopology, aux_loss, moe_layers, parallelize
from lightning_efficient.moe.hf import swap_moe_blocks, swap_state_dict, unswap_state_dict
from lightning_efficient.strategies import ParmStrategy
from tests.models.test_sharding import fit
from tests.support.ranks import run_ranks

pytest.importorskip("transformers", minversion="5")

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SOURCES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # The first layer has no experts, the second a shared one besides; weights are not normalised.
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "head_dim": 8,
    },
}
BLOCKS = {
    "mixtral": ["model.layers.0.mlp", "model.layers.1.mlp"],
    "qwen2_moe": ["model.layers.1.mlp"],
    "qwen3_moe": ["model.layers.0.mlp", "model.layers.1.mlp"],
}


def build(model_type: str, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SHAPE, **(SOURCES[model_type] | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # routes and attention far from uniform
                parameter.normal_(std=0.2)
    return model


def some_ids() -> Tensor:
    return torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=some_ids(), use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("model_type", SOURCES)
def test_a_swapped_model_has_the_same_logits_and_gradients(model_type: str) -> None:
    model = build(model_type)
    expected, expected_gradients = logits_and_gradients(model)
    assert expected.std() > 0.1

    assert swap_moe_blocks(model) == BLOCKS[model_type]

    assert [name for name, _ in moe_layers(model)] == BLOCKS[model_type]
    logits, gradients = logits_and_gradients(model)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for name, each in unswap_state_dict(gradients).items():
        largest = float(expected_gradients[name].abs().max())
        torch.testing.assert_close(each, expected_gradients[name], rtol=0, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("model_type", SOURCES)
def test_what_was_swapped_goes_back_exactly_and_the_original_class_reads_it(model_type: str, tmp_path: Path) -> None:
    model = build(model_type)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    swap_moe_blocks(model)
    after = unswap_state_dict(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert all(torch.equal(swap_state_dict(before)[name], each) for name, each in model.state_dict().items())

    model.save_pretrained(tmp_path, state_dict=after)
    read = type(model).from_pretrained(tmp_path)
    assert type(read.model.layers[1].mlp).__name__.endswith("SparseMoeBlock")
    assert all(torch.equal(read.state_dict()[name], each) for name, each in before.items())


def test_options_and_frozen_weights_reach_the_layers() -> None:
    model = build("qwen2_moe", router_aux_loss_coef=0.25)
    model.model.layers[1].mlp.experts.requires_grad_(False)
    swap_moe_blocks(model, capacity_factor=1.5, drop_policy="probs", jitter=0.1, z_loss_coef=0.5)
    layer = model.model.layers[1].mlp
    assert isinstance(layer, MoELayer)
    assert (layer.router.capacity.factor, layer.router.drop_policy, layer.router.jitter) == (1.5, "probs", 0.1)
    assert (layer.aux_loss_coef, layer.z_loss_coef) == (0.25, 0.5)
    assert (layer.router.top_k, layer.router.normalize, layer.training) == (3, "never", False)
    frozen = {name for name, each in layer.named_parameters() if not each.requires_grad}
    assert frozen == {"experts.w_in", "experts.w_out"}


def test_generation_goes_on_as_before() -> None:
    model, ids = build("mixtral"), some_ids()
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **how)
    swap_moe_blocks(model)
    assert torch.equal(model.generate(ids, **how), expected)


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("mixtral", {"output_router_logits": True}, "output_router_logits is true"),
        ("mixtral", {"num_experts_per_tok": 1}, "sends a token to one expert and weighs it by 1"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "experts with GELUActivation"),
    ],
)
def test_what_a_layer_does_not_compute_is_refused_and_nothing_changed(
    model_type: str, changes: dict[str, Any], named: str
) -> None:
    model = build(model_type, **changes)
    with pytest.raises(ValueError, match=named):
        swap_moe_blocks(model)
    assert not list(moe_layers(model))


def test_a_bad_option_changes_nothing() -> None:
    model = build("mixtral")
    with pytest.raises(ValueError, match="no drop_policy 'last'"):
        swap_moe_blocks(model, drop_policy="last")  # type: ignore[arg-type]
    assert not list(moe_layers(model))


def test_a_model_without_experts_names_what_is_known() -> None:
    with pytest.raises(ValueError, match="Linear has no block that can be swapped: known are MixtralSparseMoeBlock"):
        swap_moe_blocks(nn.Linear(2, 2))


def test_experts_that_are_not_stacked_are_of_an_old_release() -> None:
    model = build("mixtral")
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp' has no stacked weights.*Install transformers 5"):
        swap_moe_blocks(model)


@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"bias": True}])
def test_layers_that_transformers_does_not_have_do_not_get_its_names(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no counterpart in transformers"):
        unswap_state_dict(nn.ModuleList([MoELayer(8, 16, 4, **options)]))


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = build("mixtral"), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-efficient\[hf\]'"):
        swap_moe_blocks(model)


# ---- on real ranks ---------------------------------------------------------------------------------------------------


def _spread(rank: int, world_size: int, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    layer = MoELayer(32, 48, 4, capacity_factor=None)
    layer.load_state_dict(state)
    parallelize(layer, MoETopology.create(MoESizes(expert_sharding=world_size)))
    return layer(x).detach(), unswap_state_dict(layer)


@pytest.mark.distributed
def test_each_shard_of_an_expert_has_its_gates_and_ups_together() -> None:
    block = build("mixtral").model.layers[0].mlp
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = block(x.clone())
    for found, weights in run_ranks(_spread, 2, swap_state_dict(block.state_dict()), x, timeout=150):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert weights.keys() == block.state_dict().keys()
        assert all(torch.equal(weights[name], each) for name, each in block.state_dict().items())


def _fine_tune(rank: int, world_size: int, folder: str) -> tuple[Tensor, dict[str, float]]:
    torch.manual_seed(0)
    source = {"model_type": "mixtral", **SHAPE, **SOURCES["mixtral"]}
    module = HFCausalLM(
        source,
        moe={"capacity_factor": 1.0, "aux_loss_coef": 0.3},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    strategy = ParmStrategy(2, 1, 2, schedule="s1")
    trainer = fit(module, 0, 1, devices=world_size, strategy=strategy, max_epochs=3)
    module.save_pretrained(folder)
    torch.distributed.barrier()
    for _, layer in moe_layers(module):
        layer.router.capacity = type(layer.router.capacity)(None)
    with torch.no_grad():
        logits = module.eval()(some_ids())
    assert float(aux_loss(module)) > 0.3 * 2 * 0.99  # a loss of 1 in each layer is that of even loads
    return logits, {name: float(trainer.callback_metrics[name]) for name in ("train_loss", "aux_loss", "dropped")}


@pytest.mark.distributed
def test_a_model_is_fine_tuned_on_ranks_and_saved_for_transformers(tmp_path: Path) -> None:
    import transformers

    ranks = run_ranks(_fine_tune, 2, str(tmp_path / "model"), timeout=150)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        expected = read(input_ids=some_ids()).logits
    for logits, logged in ranks:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert logged["train_loss"] < 3.3  # the logarithm of 32 is 3.47
        assert logged["aux_loss"] >= 0.3 * 2 * 0.99
        assert 0 <= logged["dropped"] < 0.5
    assert type(read).__name__ == "MixtralForCausalLM"
