"""Lean and plain are one function, whatever the shape, dtype, rank, scale and dropout."""

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa, merge, unmerge
from tests.lora_fa.nets import fill_B, gradients, normal

DTYPES = {"float64": (1e-11, "float64"), "float32": (1e-4, "float32"), "bfloat16": (0.05, "float32")}


@st.composite
def layers(draw: Any) -> dict[str, Any]:
    inputs, outputs = draw(st.integers(1, 33)), draw(st.integers(1, 33))
    return {
        "inputs": inputs,
        "outputs": outputs,
        "r": draw(st.integers(1, min(inputs, outputs))),
        "alpha": draw(st.floats(0.1, 8.0)),
        "shape": draw(st.lists(st.integers(0, 5), max_size=3)),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "needs_x": draw(st.booleans()),
        "rslora": draw(st.booleans()),
    }


def build(case: dict[str, Any], *, lean: bool) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(case["inputs"], case["outputs"], bias=case["bias"], dtype=torch.float64)
    model = nn.Sequential(linear.to(getattr(torch, case["dtype"])))
    config = LoRAFAConfig(
        r=case["r"],
        alpha=case["alpha"],
        use_rslora=case["rslora"],
        dropout=case["dropout"],
        dropout_mode="saved",  # the plain forward's own, so that masks agree
        adapter_dtype=DTYPES[case["dtype"]][1],
        lean=lean,
    )
    apply_lora_fa(model, config)
    return fill_B(model)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(layers())
def test_lean_equals_plain(case: dict[str, Any]) -> None:
    tolerance, results = DTYPES[case["dtype"]][0], []
    for lean in (True, False):
        model = build(case, lean=lean)
        x = normal(*case["shape"], case["inputs"], dtype=getattr(torch, case["dtype"])).requires_grad_(case["needs_x"])
        torch.manual_seed(1)
        y = model(x)
        y.backward(normal(*y.shape, seed=2, dtype=y.dtype))
        results.append([y.detach(), *gradients(model).values(), *([x.grad] if case["needs_x"] else [])])

    assert len(results[0]) == 2 + case["needs_x"]
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        scale = max(1.0, float(plain.abs().max()) if plain.numel() else 1.0)
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * scale)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers())
def test_merging_and_unmerging_changes_nothing(case: dict[str, Any]) -> None:
    case = {**case, "dtype": "float64", "dropout": 0.0}
    model = build(case, lean=True)
    x = normal(*case["shape"], case["inputs"])
    before, weight = model(x).detach(), model[0].base_layer.weight.clone()
    merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-11, atol=1e-11)
    unmerge(model)

    torch.testing.assert_close(model[0].base_layer.weight, weight, rtol=1e-11, atol=1e-12)
