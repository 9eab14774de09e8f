"""The in-tree Llama: its parts against their formulas, and the whole against transformers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.models import LLAMA_PRESETS, Llama, LlamaConfig
from lightning_efficient.models.llama import RMSNorm, rope_tables, rotate

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "ffn_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "max_seq_len": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "multi-query": {"num_kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "grouped, tied, long waves": {"num_kv_heads": 2, "tie_embeddings": True, "rope_theta": 500_000.0, "norm_eps": 1e-6},
}


def small(seed: int = 0, *, activation_checkpointing: bool = False, **changes: Any) -> Llama:
    torch.manual_seed(seed)
    return Llama(LlamaConfig(**(SMALL | changes)), activation_checkpointing=activation_checkpointing)


def some_ids(seed: int = 1) -> Tensor:
    return torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours = small(**VARIANTS[name])
    # Larger weights than at initialisation, so that attention is far from uniform and an error in it would show.
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(5)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ours.config.to_hf())).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        expected = theirs(input_ids=some_ids(), use_cache=False).logits
        actual = ours(some_ids())
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    back = small(seed=9, **VARIANTS[name])
    back.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(back(some_ids()), ours(some_ids()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_eager_attention_equals_the_fused_one_with_its_gradients(heads: int, dtype: torch.dtype) -> None:
    results = []
    for attention in ("sdpa", "eager"):
        model = small(num_kv_heads=heads, attention=attention).to(dtype)
        logits = model(some_ids())
        gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
        results.append([logits.detach(), *gradients])

    # A sum of some thirty terms in another order, relative to the largest of each tensor.
    relative = 1e-12 if dtype == torch.float64 else 1e-5
    for fused, formula in zip(*results, strict=True):
        torch.testing.assert_close(formula, fused, rtol=0, atol=relative * float(fused.abs().max()))


def test_there_is_no_third_attention() -> None:
    with pytest.raises(ValueError, match="There is no attention 'flash'"):
        small(attention="flash")


def test_fused_attention_equals_the_formula_with_grouped_heads() -> None:
    model = small(num_kv_heads=2)
    attention = model.model.layers[0].self_attn
    x_BTD = torch.randn(2, 7, 32)
    rope = rope_tables(7, 8, theta=10_000.0, device=torch.device("cpu"))
    q, k, v = (proj(x_BTD).view(2, 7, -1, 8) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = []
    for head in range(4):
        q_BTE, k_BTE = (rotate(x, *rope) for x in (q[:, :, head], k[:, :, head // 2]))
        scores_BTT = (q_BTE @ k_BTE.mT / math.sqrt(8)).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        heads.append(scores_BTT.softmax(-1) @ v[:, :, head // 2])
    expected = attention.o_proj(torch.cat(heads, -1))
    torch.testing.assert_close(attention(x_BTD, rope), expected, rtol=1e-5, atol=1e-6)


def test_scores_after_rotation_depend_on_distance_alone() -> None:
    q_E, k_E = torch.randn(2, 8, dtype=torch.float64)
    cos, sin = (table.double() for table in rope_tables(20, 8, theta=100.0, device=torch.device("cpu")))
    q_TE, k_TE = rotate(q_E.expand(20, 8), cos, sin), rotate(k_E.expand(20, 8), cos, sin)
    scores_TT = q_TE @ k_TE.T
    for distance in range(-19, 20):
        diagonal = scores_TT.diagonal(distance)
        # The tables are float32, so the angles are exact to 20 * 2^-24 or so.
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert scores_TT.diagonal(3)[0] != pytest.approx(float(scores_TT.diagonal(4)[0]), abs=1e-2)
    torch.testing.assert_close(q_TE.norm(dim=-1), q_E.norm().expand(20), rtol=1e-6, atol=0)


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, ids = small(), some_ids()
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    torch.testing.assert_close(model(ids)[:, :9], model(changed)[:, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(model(ids)[:, 9:], model(changed)[:, 9:], atol=1e-3)


def test_rmsnorm_equals_torch() -> None:
    norm, x = RMSNorm(16, eps=1e-5), torch.randn(4, 16)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (16,), norm.weight, 1e-5))


def test_rmsnorm_of_bfloat16_is_computed_in_float32() -> None:
    x = torch.full((1, 4096), 1e-3, dtype=torch.bfloat16)
    norm = RMSNorm(4096).to(torch.bfloat16)
    exact = RMSNorm(4096)(x.float())
    torch.testing.assert_close(norm(x).float(), exact, rtol=2**-8, atol=0)  # one rounding to bfloat16


def test_checkpointing_recomputes_and_gives_equal_gradients() -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = small(activation_checkpointing=checkpointing)
        count = [0]
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        model(some_ids()).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        calls.append(count[0])
    assert calls == [1, 2]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_there_are_no_buffers_for_ddp_to_broadcast() -> None:
    assert list(small().buffers()) == []


def test_initial_weights_follow_the_seed_and_the_given_deviation() -> None:
    first, again, other = small(0, hidden_size=128), small(0, hidden_size=128), small(1, hidden_size=128)
    for (name, weight), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, same)
        if "norm" in name:
            assert torch.all(weight == 1)
        else:
            assert not torch.equal(weight, different)
            assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05), (
                name
            )  # about 6000 values or more: 1 % deviation
            assert abs(float(weight.detach().mean())) < 0.001


def test_tied_head_is_one_parameter() -> None:
    tied, untied = small(tie_embeddings=True), small()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    saved = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert saved == 61 * 32


# The sizes that the Llama-2 paper and the models' own cards give, in parameters (vocabulary 32 000).
@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("160m", 162_417_408),
        ("1.3b", 1_345_423_360),
        ("7b", 6_738_415_616),
        ("13b", 13_015_864_320),
        ("70b", 68_976_648_192),
    ],
)
def test_presets_have_the_published_sizes(size: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Llama(LlamaConfig(**LLAMA_PRESETS[size]))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_tiny_is_tiny() -> None:
    model = Llama(LlamaConfig(vocab_size=256, **LLAMA_PRESETS["tiny"]))
    assert 500_000 < sum(p.numel() for p in model.parameters()) < 1_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, r"num_layers is 0: .* Set it to 1 or more"),
        ({"num_kv_heads": 3}, r"num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_heads": 5}, r"hidden_size 32 over num_heads 5"),
        ({"hidden_size": 12}, r"hidden_size 12 over num_heads 4 is not an even whole number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**(SMALL | changes))


def test_too_long_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"17 tokens, more than max_seq_len=16.*block_size"):
        small()(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(16,\): Llama takes \(batch, sequence\)"):
        small()(torch.zeros(16, dtype=torch.int64))
