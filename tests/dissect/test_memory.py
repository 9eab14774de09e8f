"""Peaks belong to their window; state counts each storage once."""

import sys

import pytest
import torch
from torch import nn

from lightning_efficient.dissect import PeakMemory, StateBytes, state_bytes

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory's peak is read from Linux' /proc")
def test_what_a_step_frees_again_shows_in_its_window_and_in_no_other() -> None:
    peak = PeakMemory(torch.device("cpu"))
    peak.reset()
    before, reserved = peak.read()
    block = torch.ones(50 * MIB)
    del block
    during, _ = peak.read()
    peak.reset()
    after, _ = peak.read()

    assert peak.reason == ""
    assert reserved is None
    assert before is not None
    assert during is not None
    assert after is not None
    # 200 MiB; the rest of the process may move by a few pages.
    assert during - before == pytest.approx(200 * MIB, abs=4 * MIB)
    assert after - before == pytest.approx(0, abs=4 * MIB)


def test_a_device_without_a_reading_says_so() -> None:
    peak = PeakMemory(torch.device("meta"))
    peak.reset()

    assert peak.read() == (None, None)
    assert "meta" in peak.reason


def test_state_is_parameters_gradients_and_two_moments() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20))
    optimizer = torch.optim.AdamW(model.parameters())
    trainable = 10 * 20 + 20 + 20 + 20
    parameters = 4 * (trainable + 20 + 20) + 8  # running mean and variance; an int64 counts batches

    assert state_bytes(model, [optimizer]) == StateBytes(parameters, 0, 0)

    model(torch.randn(3, 10)).sum().backward()
    optimizer.step()

    steps = 4 * 4  # AdamW keeps the number of steps of each parameter as a float32
    assert state_bytes(model, [optimizer]) == StateBytes(parameters, 4 * trainable, 2 * 4 * trainable + steps)


def test_tied_weights_and_views_count_once() -> None:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("view", model[0].weight.detach()[3:7])

    assert state_bytes(model) == StateBytes(4 * 30 * 8, 0, 0)


def test_a_frozen_model_has_no_gradients() -> None:
    model = nn.Linear(4, 4).requires_grad_(False)
    model(torch.ones(1, 4, requires_grad=True)).sum().backward()

    assert state_bytes(model).gradient_bytes == 0


def test_a_tensor_subclass_counts_by_its_parts() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    model = nn.Module()
    model.weight = nn.Parameter(nested)
    inside = [getattr(nested, name) for name in nested.__tensor_flatten__()[0]]

    assert state_bytes(model).parameter_bytes == sum(part.untyped_storage().nbytes() for part in inside)


def test_bitsandbytes_weights_count_with_their_scales() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(256, 64, bias=False)
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(64, 256), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    layer = layer.to("cpu")
    codes, scales, table = 64 * 256 // 2, 4 * 64 * 256 // 64, 4 * 16  # 4 bit each, a float32 per 64, 16 levels

    assert state_bytes(layer).parameter_bytes == codes + scales + table
