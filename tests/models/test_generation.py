"""Generation with a cache gives the tokens of the whole forward pass, in any company and in any slot."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.dissect.serving import (
    Burst,
    ClosedLoop,
    ContinuousBatching,
    Decoder,
    Request,
    StaticBatching,
    serve,
)
from lightning_efficient.models import Llama, LlamaConfig
from lightning_efficient.models.generation import HFDecoder, LlamaDecoder, Sampling, decoder_for, generate, greedy

VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head, sdpa": {},
    "multi-head, eager": {"attention": "eager"},
    "grouped, sdpa": {"num_kv_heads": 2},
    "grouped, eager": {"num_kv_heads": 2, "attention": "eager"},
    "multi-query, tied": {"num_kv_heads": 1, "tie_embeddings": True},
}
BATCHINGS = {"static": StaticBatching(3), "continuous": ContinuousBatching(3)}
# Float64 sums of a few hundred terms in another order: rounding is near 1e-14, an error in a position or mask near 1.
CLOSE = {"rtol": 0.0, "atol": 1e-10}


def llama(**changes: Any) -> Llama:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "ffn_size": 48, "num_layers": 2, "num_heads": 4, "max_seq_len": 48}
    model = Llama(LlamaConfig(**(sizes | changes))).double()
    with torch.no_grad():  # far from uniform attention, so that a wrong key shows
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def hf(model: Llama, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_hf(), **changes)).double().eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def logits_of_hf(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(ids, use_cache=False).logits


def requests(n: int = 8) -> list[Request]:
    """Prompts of 1 to 20 tokens, answers of 1 to 12."""
    numbers = torch.Generator().manual_seed(3)

    def draw(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=numbers).tolist()

    lengths = zip(draw(1, 21, n), [1, *draw(1, 13, n - 1)], strict=True)
    return [Request(tuple(draw(0, 61, prompt)), answer) for prompt, answer in lengths]


@torch.no_grad()
def uncached(logits_of: Callable[[Tensor], Tensor], request: Request) -> tuple[tuple[int, ...], Tensor]:
    """The answer and its logits by whole forward passes."""
    ids, rows = list(request.prompt_ids), []
    for _ in range(request.max_new_tokens):
        rows.append(logits_of(torch.tensor([ids]))[0, -1])
        ids.append(int(rows[-1].argmax()))
    return tuple(ids[len(request.prompt_ids) :]), torch.stack(rows)


class Recorder:
    """Greedy, and keeps the logits."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, logits_NV: Tensor) -> Tensor:
        self.seen.append(logits_NV.clone())
        return greedy(logits_NV)


def answers(decoder: Decoder, load: Sequence[Request], batching: Any) -> tuple[tuple[int, ...], ...]:
    return serve(decoder, load, Burst(len(load)), batching=batching, timeout_s=60).tokens


@pytest.mark.parametrize("batching", BATCHINGS.values(), ids=BATCHINGS)
@pytest.mark.parametrize("name", VARIANTS)
def test_llama_with_a_cache_gives_the_tokens_of_whole_forwards(name: str, batching: Any) -> None:
    model, load = llama(**VARIANTS[name]), requests()
    expected = tuple(uncached(model, each)[0] for each in load)
    assert len({each for answer in expected for each in answer}) > 10  # the answers are not one token
    assert answers(LlamaDecoder(model, 3), load, batching) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batching", BATCHINGS.values(), ids=BATCHINGS)
def test_transformers_model_with_a_cache_gives_the_tokens_of_whole_forwards(batching: Any, attention: str) -> None:
    model, load = llama(num_kv_heads=2), requests()
    theirs = hf(model, attn_implementation=attention)
    if attention == "eager":  # in float64 it gives NaN to rows padded on the left
        with pytest.raises(ValueError, match="not finite"):
            HFDecoder(theirs, 2).prefill([0, 1], [[1, 2], [3]])
        theirs.float()
    assert answers(HFDecoder(theirs, 3), load, batching) == tuple(uncached(model, each)[0] for each in load)


@pytest.mark.parametrize("kind", ["llama", "transformers"])
@pytest.mark.parametrize("name", ["multi-head, sdpa", "grouped, eager"])
def test_logits_equal_those_of_whole_forwards(name: str, kind: str) -> None:
    model, recorder = llama(**VARIANTS[name]), Recorder()
    load = [Request(each.prompt_ids, 6) for each in requests(3)]
    served: Any = model if kind == "llama" else hf(model)
    decoder = decoder_for(served, 3, pick=recorder)
    decoder.prefill([0, 1, 2], [each.prompt_ids for each in load])
    for _ in range(5):
        decoder.decode([0, 1, 2])
    for row, each in enumerate(load):
        actual = torch.stack([step[row] for step in recorder.seen])
        if kind == "llama":
            torch.testing.assert_close(actual, uncached(model, each)[1], **CLOSE)
        else:  # their norms compute in float32, whose rounding a difference of 1e-16 can turn
            torch.testing.assert_close(actual, uncached(logits_of_hf(served), each)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["multi-head, sdpa", "grouped, sdpa", "grouped, eager", "multi-query, tied"])
def test_generate_equals_generate_of_transformers(name: str) -> None:
    model = llama(**VARIANTS[name])
    ids = torch.randint(61, (3, 7), generator=torch.Generator().manual_seed(5))
    theirs = hf(model)
    theirs.generation_config.eos_token_id = None  # or an answer ends where it draws token 2
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9)
    assert torch.equal(generate(model, ids, 9), expected)
    assert torch.equal(generate(theirs, ids, 9), expected)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_other_families_of_transformers(family: str) -> None:
    """Learned positions, and a window of 8 tokens, which counts columns: rows must stay without gaps."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
        "mistral": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 48,
            "sliding_window": 8,
        },
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=61, initializer_range=0.2, **sizes[family])
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    load = requests()
    expected = tuple(uncached(logits_of_hf(model), each)[0] for each in load)
    for batching in BATCHINGS.values():
        assert answers(HFDecoder(model, 3), load, batching) == expected


@pytest.mark.parametrize("kind", ["llama", "transformers"])
def test_a_released_slot_is_as_good_as_new(kind: str) -> None:
    model = llama(num_kv_heads=2)
    served: nn.Module = model if kind == "llama" else hf(model)
    long, short = Request(tuple(range(30)), 8), Request((7, 7, 3), 10)

    def answer(decoder: Decoder, slot: int, request: Request) -> list[int]:
        tokens = decoder.prefill([slot], [request.prompt_ids])
        return tokens + [decoder.decode([slot])[0] for _ in range(request.max_new_tokens - 1)]

    fresh = answer(decoder_for(served, 2), 1, short)
    used = decoder_for(served, 2)
    used.prefill([0], [(1, 2, 3, 4)])  # a neighbour that rests
    answer(used, 1, long)
    used.release([1])
    assert answer(used, 1, short) == fresh == list(uncached(model, short)[0])
    assert used.decode([0]) == [uncached(model, Request((1, 2, 3, 4), 2))[0][1]]  # and the neighbour is unharmed


@pytest.mark.parametrize("kind", ["llama", "transformers"])
def test_slots_in_any_order(kind: str) -> None:
    model = llama()
    decoder = decoder_for(model if kind == "llama" else hf(model), 4)
    load = [Request(each.prompt_ids, 4) for each in requests(3)]
    slots = [3, 0, 2]
    columns = [decoder.prefill(slots, [each.prompt_ids for each in load])]
    columns.append(decoder.decode([3, 0, 2]))
    last = dict(zip([2, 3, 0], decoder.decode([2, 3, 0]), strict=True))
    columns.append([last[slot] for slot in slots])
    columns.append([decoder.decode([slot])[0] for slot in slots])
    assert [tuple(answer) for answer in zip(*columns, strict=True)] == [uncached(model, each)[0] for each in load]


def test_static_batching_carries_a_full_row_no_further() -> None:
    """A finished request with no room left is not computed; its neighbours go on."""
    model = llama()
    load = [Request(tuple(range(40)), 8), Request((5,), 40)]
    assert answers(LlamaDecoder(model, 2), load, StaticBatching(2)) == tuple(uncached(model, each)[0] for each in load)


def test_closed_loop_answers_each_request_once() -> None:
    model, load = llama(), requests(7)
    run = serve(LlamaDecoder(model, 2), load, ClosedLoop(2, 7), batching=ContinuousBatching(2), timeout_s=60)
    assert run.tokens == tuple(uncached(model, each)[0] for each in load)
    assert max(run.active_slots) <= 2


def test_training_forward_is_that_of_before() -> None:
    """The formula of training without a cache, written out, bit by bit."""
    model = llama(num_kv_heads=2).float()
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    body = model.model
    from lightning_efficient.models.llama import rope_tables, rotate

    rope = rope_tables(9, 8, theta=10_000.0, device=ids.device)
    x = body.embed_tokens(ids)
    for layer in body.layers:
        attention, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            proj(h).view(2, 9, -1, 8).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        y = torch.nn.functional.scaled_dot_product_attention(
            rotate(q, *rope), rotate(k, *rope), v, is_causal=True, enable_gqa=True
        )
        x = x + attention.o_proj(y.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    assert torch.equal(model(ids), model.lm_head(body.norm(x)))


def test_cache_bytes_are_those_of_keys_and_values() -> None:
    decoder = LlamaDecoder(llama(num_kv_heads=2), 3, max_len=20)
    assert decoder.cache_bytes == 2 * 2 * 3 * 2 * 20 * 8 * 8  # keys and values, L, S, K, M, E, float64
    theirs = HFDecoder(hf(llama(num_kv_heads=2)), 3)
    theirs.prefill([0, 1], [[1, 2, 3], [4]])
    theirs.decode([0, 1])
    assert theirs.cache_bytes == 2 * 2 * 2 * 2 * 4 * 8 * 8  # here 2 rows of 4 columns


def test_generate_leaves_the_mode_of_each_module() -> None:
    model = llama().train()
    model.model.norm.eval()
    generate(model, torch.tensor([[1, 2]]), 2)
    assert [name for name, module in model.named_modules() if not module.training] == ["model.norm"]


def test_sampling_follows_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    rows, generator = 40_000, torch.Generator().manual_seed(0)
    for top_k in (None, 2):
        drawn = Sampling(0.7, top_k, generator)(logits.expand(rows, 4))
        kept = logits if top_k is None else torch.tensor([-torch.inf, 1.0, 2.0, -torch.inf])
        share = torch.bincount(drawn, minlength=4) / rows
        # Five standard errors of a share of 1/2 are 0.0125.
        torch.testing.assert_close(share, (kept / 0.7).softmax(0), rtol=0, atol=0.0125)


def test_sampled_generation_repeats_with_its_generator() -> None:
    model, ids = llama(), torch.tensor([[1, 2, 3], [4, 5, 6]])

    def sample(seed: int) -> Tensor:
        return generate(model, ids, 12, temperature=3.0, top_k=20, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda: LlamaDecoder(llama(), 0), "0 slots"),
        (lambda: LlamaDecoder(llama(), 1, max_len=49), "max_len is 49: the model takes 1 to 48"),
        (lambda: LlamaDecoder(llama(), 2).prefill([0, 0], [[1], [2]]), "a slot of its own"),
        (lambda: LlamaDecoder(llama(), 2).prefill([2], [[1]]), "Slot 2 is not one of the 2"),
        (lambda: LlamaDecoder(llama(), 2).prefill([0], [[]]), "A prompt has 0 tokens"),
        (lambda: LlamaDecoder(llama(), 2).prefill([0], [[1] * 49]), "A prompt has 49 tokens: 1 to 48"),
        (lambda: LlamaDecoder(llama(), 2).decode([1]), "Slot 1 holds no request"),
        (lambda: generate(llama(), torch.tensor([1, 2]), 3), r"shape \(2,\)"),
        (lambda: generate(llama(), torch.tensor([[1] * 40]), 9), "max_len is 49"),
        (lambda: generate(llama(), torch.tensor([[1]]), 2, top_k=3), "top_k and generator have no effect"),
        (lambda: Sampling(-1.0), "temperature is -1"),
        (lambda: Sampling(1.0, 0), "top_k is 0"),
    ],
)
def test_wrong_values_are_refused(words: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        words()


@pytest.mark.parametrize("kind", ["llama", "transformers"])
def test_a_used_or_full_slot_is_refused(kind: str) -> None:
    model = llama()
    decoder = decoder_for(model if kind == "llama" else hf(model), 2, max_len=4)
    decoder.prefill([0], [[1, 2, 3]])
    with pytest.raises(ValueError, match="Slot 0 is in use"):
        decoder.prefill([0], [[1]])
    decoder.decode([0])
    with pytest.raises(ValueError, match="full"):
        decoder.decode([0])


def test_other_modules_cannot_generate() -> None:
    with pytest.raises(TypeError, match="Linear cannot generate"):
        decoder_for(nn.Linear(2, 2), 1)


def test_a_recurrent_cache_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    decoder = HFDecoder(transformers.MambaForCausalLM(config), 2, max_len=8)
    with pytest.raises(ValueError, match="full attention"):
        decoder.prefill([0], [[1, 2]])


@pytest.mark.parametrize(("name", "works"), [("OPT", True), ("Bart", False)])
def test_a_model_that_counts_positions_from_the_padding_is_refused(name: str, works: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "max_position_embeddings": 48, "pad_token_id": 1}
    if name == "OPT":
        sizes |= {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes["word_embed_proj_dim"] = 32
    else:
        sizes |= {"d_model": 32, "decoder_ffn_dim": 48, "decoder_layers": 2, "decoder_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    decoder = HFDecoder(model, 2)
    if works:
        decoder.prefill([0, 1], [[2, 3, 4], [5]])
    else:
        with pytest.raises(ValueError, match="counts positions from the padding"):
            decoder.prefill([0, 1], [[2, 3, 4], [5]])
