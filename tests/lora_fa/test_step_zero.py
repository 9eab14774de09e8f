"""At B = 0 the adapted model is the base model, to the last bit; and with B drawn, it is PEFT's."""

from typing import Any

import pytest
import torch

from lightning_efficient.lora_fa import LoRAFAConfig, LoRAFAReport, apply_lora_fa
from tests.lora_fa import hf
from tests.lora_fa.nets import fill_B, gradients, ids, llama

PRECISIONS = ["float32", "bfloat16", "autocast"]


def run(model: Any, name: str, precision: str) -> torch.Tensor:
    torch.manual_seed(2)  # of the model's own dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        return model(ids()) if name == "in-tree llama" else hf.logits(model, name)


def built(name: str, precision: str) -> Any:
    model = llama() if name == "in-tree llama" else hf.build(name)
    # Frozen before it is compared: torch picks other kernels for products with weights that train.
    model.requires_grad_(False)
    return model.to(torch.bfloat16) if precision == "bfloat16" else model


def adapt(model: Any, **settings: Any) -> LoRAFAReport:
    # RoBERTa's classifier has three outputs, fewer than the rank.
    return apply_lora_fa(model, LoRAFAConfig(r=4, alpha=8.0, exclude_modules=["classifier.out_proj"], **settings))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["in-tree llama", *hf.MODELS])
def test_the_first_output_is_the_bases_bit_for_bit(name: str, precision: str, training: bool) -> None:
    model = built(name, precision).train(training)
    before = run(model, name, precision)
    report = adapt(model)

    assert torch.equal(run(model, name, precision), before)
    assert report.adapted
    assert not report.fell_back


@pytest.mark.parametrize("name", ["in-tree llama", "llama"])
def test_a_first_output_with_dropout_is_the_bases_too(name: str) -> None:
    model = built(name, "float32")
    before = run(model, name, "float32")
    adapt(model, dropout=0.5)

    assert torch.equal(run(model, name, "float32"), before)


@pytest.mark.parametrize("backend", ["native", "peft"])
@pytest.mark.parametrize("name", hf.MODELS)
def test_lean_models_equal_plain_ones(name: str, backend: str) -> None:
    """The lean blocks, norms and activations of each kind of model, against the same adapters in plain operations."""
    results = []
    for lean in (True, False):
        model = hf.build(name).double().eval()
        report = adapt(model, lean=lean, adapter_dtype="float64", backend=backend)
        fill_B(model)
        y = hf.logits(model, name)
        y.square().mean().backward()
        results.append([y.detach(), *gradients(model).values()])

        if lean:
            kinds = {"llama": 7, "roberta": 0, "t5 relu": 4, "t5 gated-gelu": 4, "gpt2": 2}
            assert len(report.lean_blocks) == kinds[name], report.lean_blocks

    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
