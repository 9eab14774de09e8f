"""What clean steps are worth, what a batch holds, and which rank lags: numbers that a pencil confirms."""

import statistics
import time

import pytest
import torch
from torch import nn

from lightning_efficient.dissect import (
    Breakdown,
    CleanWindow,
    Counts,
    Row,
    count_batch,
    find_straggler,
    kind_of,
    quantiles,
    rank_times,
    role_of,
)
from lightning_efficient.dissect.intervals import length, overlap, union


def alone(values: object) -> tuple[list[float], float]:
    *counts, seconds = values  # type: ignore[misc]
    return list(counts), seconds


def test_quantiles_are_by_linear_interpolation() -> None:
    values = [5.0, 1.0, 2.0, 4.0]
    found = quantiles(values)
    assert (found.count, found.p50, found.mean) == (4, 3.0, 3.0)
    assert found.p90 == pytest.approx(4 + 0.7)
    assert found.std == pytest.approx(statistics.stdev(values))
    assert found.p99 is None
    assert quantiles([2.0]).std == 0.0
    hundred = quantiles([float(each) for each in range(101)])
    assert hundred.p99 == pytest.approx(99.0)


def test_a_window_times_steps_batches_and_waits() -> None:
    window = CleanWindow(torch.device("cpu"))
    for _ in range(3):
        window.begin_step()
        for _ in range(2):
            window.start_batch(Counts(tokens=10, padded_tokens=16, samples=2))
            time.sleep(0.02)
            window.end_batch()
            time.sleep(0.01)
        window.end_step()
    found = window.finish(alone)
    assert found.step_s.count == 3
    assert 0.06 <= found.step_s.p50 < 0.09
    assert found.micro_batch_s.count == 6
    assert 0.03 <= found.micro_batch_s.p50 < 0.045
    assert 0.01 <= found.wait_s.p50 < 0.02
    assert found.micro_batches_per_step == 2
    assert found.tokens_per_s == pytest.approx(20 / found.step_s.mean)
    assert found.padded_tokens_per_s == pytest.approx(32 / found.step_s.mean)
    assert found.samples_per_s == pytest.approx(4 / found.step_s.mean)


def test_an_interrupted_step_does_not_count() -> None:
    window = CleanWindow(torch.device("cpu"))
    window.begin_step()
    window.start_batch(Counts())
    window.interrupt()
    window.end_step()
    assert window.done == 0
    with pytest.raises(ValueError, match="No clean step was completed"):
        window.finish(alone)


def test_the_slowest_rank_gives_the_rate() -> None:
    window = CleanWindow(torch.device("cpu"))
    window.begin_step()
    window.start_batch(Counts(tokens=10))
    window.end_step()
    found = window.finish(lambda values: ([values[0] * 2, 0.0, 0.0], 4.0))
    assert found.tokens_per_s == pytest.approx(20 / 4.0)
    assert found.samples_per_s is None


@pytest.mark.parametrize(
    ("batch", "tokens", "padded", "samples"),
    [
        (torch.ones(3, 5), 0, 0, 3),
        (torch.ones(3, 5, dtype=torch.long), 15, 15, 3),
        ((torch.ones(3, 5), torch.ones(3, dtype=torch.long)), 0, 0, 3),
        ({"x": [torch.ones(3, 5, dtype=torch.int)], "mask": torch.ones(3, 5, dtype=torch.bool)}, 15, 15, 3),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([[1, -100] * 2] * 2)}, 4, 8, 2),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([1, 0])}, 8, 8, 2),
        ("nothing", 0, 0, 0),
        (torch.tensor(1.0), 0, 0, 1),
    ],
)
def test_what_a_batch_holds(batch: object, tokens: int, padded: int, samples: int) -> None:
    found = count_batch(batch)
    assert (int(found.tokens), int(found.padded_tokens), int(found.samples)) == (tokens, padded, samples)


def rank(*rows: Row) -> Breakdown:
    return Breakdown("host", sum(row.total_s for row in rows), rows)


def test_the_rank_that_waits_least_is_the_straggler() -> None:
    quick = rank(Row("a", forward_s=1.0), Row("b", backward_s=1.0), Row("<communication>", communication_s=1.0))
    late = rank(Row("a", forward_s=1.1), Row("b", backward_s=1.9))
    found = find_straggler([quick, quick, late])
    assert found is not None
    assert (found.rank, found.row) == (2, "b")
    assert found.behind_s == pytest.approx(1.0)
    assert found.row_behind_s == pytest.approx(0.9)
    times = rank_times(0, quick)
    assert (times.forward_s, times.backward_s, times.communication_s) == (1.0, 1.0, 1.0)
    assert times.busy_s == pytest.approx(2.0)


def test_nobody_is_a_straggler_alone_or_by_a_little() -> None:
    one, other = rank(Row("a", forward_s=1.0)), rank(Row("a", forward_s=1.04))
    assert find_straggler([one]) is None
    assert find_straggler([one, other]) is None


def test_sets_of_times() -> None:
    some = union([(5, 9), (0, 2), (8, 12), (2, 3), (4, 4)])
    assert some == [(0, 3), (5, 12)]
    assert length(some) == 10
    assert [overlap(*each, some) for each in ((0, 20), (3, 5), (2, 6), (11, 30), (20, 30))] == [10, 0, 2, 1, 0]
    assert overlap(0, 5, []) == 0


@pytest.mark.parametrize(
    ("path", "module", "role"),
    [
        ("model.embed_tokens", nn.Embedding(2, 2), "embedding"),
        ("model.layers.0.self_attn.q_proj", nn.Linear(1, 1), "qkv"),
        ("model.layers.0.self_attn.o_proj", nn.Linear(1, 1), "out_proj"),
        ("model.layers.0.self_attn", nn.Identity(), "attention"),
        ("model.layers.0.mlp.gate_proj", nn.Linear(1, 1), "mlp"),
        ("model.layers.0.input_layernorm", nn.Identity(), "norm"),
        ("lm_head", nn.Linear(1, 1), "head"),
        ("model.layers.0.self_attn.q_proj.lora_A", nn.Linear(1, 1), "adapter"),
        ("encoder.layer.0.attention.output.dense", nn.Linear(1, 1), "out_proj"),
        ("encoder.layer.0.attention.self.query", nn.Linear(1, 1), "qkv"),
        ("encoder.layer.0.intermediate.dense", nn.Linear(1, 1), "mlp"),
        ("features.0", nn.Conv2d(1, 1, 1), "convolution"),
        ("lstm", nn.LSTM(1, 1), "rnn"),
        ("block.gate", nn.Linear(1, 1), "router"),
        ("experts.3.w1", nn.Linear(1, 1), "expert"),
        ("7", nn.LayerNorm(1), "norm"),
        ("7", nn.ReLU(), "activation"),
        ("7", nn.CrossEntropyLoss(), "loss"),
        ("something", nn.Linear(1, 1), "other"),
    ],
)
def test_roles(path: str, module: nn.Module, role: str) -> None:
    assert role_of(path, module) == role


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "gemm"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_log_softmax_backward_data", "softmax"),
        ("aten::embedding_dense_backward", "embedding"),
        ("aten::mul", "elementwise"),
        ("aten::copy_", "copy"),
        ("aten::view", "shape"),
        ("aten::mkldnn_convolution", "convolution"),
        ("c10d::allreduce_", "communication"),
        ("gloo:all_reduce", "communication"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("aten::_foreach_add_", "optimizer"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "autograd"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "gemm"),
        ("who_knows", "other"),
    ],
)
def test_kinds_of_operators(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind
