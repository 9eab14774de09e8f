"""Same weights, same numbers: the adapters train as PEFT's do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa
from lightning_efficient.lora_fa.inject import adapted_layers
from tests.lora_fa.nets import LLAMA, TARGETS, adapted_block, block, fill_B, gradients, ids, llama, normal, peft_twin

BACKENDS = ["native", "peft"]
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8.0}
LLAMA_SETTINGS: dict[str, Any] = {"r": 4, "alpha": 8.0}


def trained(model: nn.Module, x: Tensor, steps: int) -> list[Tensor]:
    """Outputs and input gradients of each step, and the final B."""
    layers = [p for name, p in model.named_parameters() if "lora_B" in name]
    optimizer, seen = torch.optim.AdamW(layers, lr=1e-2), []
    for step in range(steps):
        inputs = (x + 0.1 * step).requires_grad_()
        y = model(inputs)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        seen += [y.detach(), inputs.grad]
    return seen + [p.detach() for p in layers]


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_equal_peft_in_float64(backend: str) -> None:
    ours = adapted_block(dtype=torch.float64, backend=backend)
    theirs = peft_twin(ours, block(dtype=torch.float64), dtype=torch.float64, **SETTINGS)
    x = normal(6, 12)

    for a, b in zip(trained(ours, x, 20), trained(theirs, x, 20), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6, 12), (2, 3, 12)])
def test_saved_dropout_draws_pefts_masks(backend: str, shape: tuple[int, ...]) -> None:
    ours = adapted_block(dtype=torch.float64, backend=backend, dropout=0.3, dropout_mode="saved")
    theirs = peft_twin(ours, block(dtype=torch.float64), dtype=torch.float64, lora_dropout=0.3, **SETTINGS)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        results.append(trained(model, normal(*shape), 5))

    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_llama_equals_peft_in_float64(backend: str) -> None:
    """Fused feed-forward blocks and lean norms included, with PEFT's dropout masks."""
    settings = {**LLAMA_SETTINGS, "dropout": 0.2, "dropout_mode": "saved", "adapter_dtype": "float64"}
    ours = llama(dtype=torch.float64)
    report = apply_lora_fa(ours, LoRAFAConfig(backend=backend, **settings))
    fill_B(ours)
    theirs = peft_twin(ours, llama(dtype=torch.float64), dtype=torch.float64, lora_dropout=0.2, **SETTINGS)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        y = model(ids())
        y.square().mean().backward()
        results.append([y.detach(), *gradients(model).values()])

    assert len(report.lean_blocks) == LLAMA.num_layers * 3 + 1
    assert len(results[0]) == 1 + 7 * LLAMA.num_layers
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def errors_against_float64(make: Any, *, autocast: bool) -> dict[str, float]:
    """The largest relative error of y, dx and dB over the layers."""
    model, wide, x = make
    exact_x = x.detach().double().requires_grad_()
    exact = wide(exact_x)
    exact.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.backward((2 * exact.detach()).to(y.dtype))
    pairs = {"y": (y, exact), "dx": (x.grad, exact_x.grad)}
    wanted = gradients(wide)
    pairs |= {
        f"dB {index}": (got, want)
        for index, (got, want) in enumerate(zip(gradients(model).values(), wanted.values(), strict=True))
    }
    with torch.no_grad():
        return {name: float((got.double() - want).norm() / want.norm()) for name, (got, want) in pairs.items()}


def widened(model: nn.Module) -> nn.Module:
    """The same numbers in float64."""
    wide = adapted_block(dtype=torch.float64, lean=False)
    wide.load_state_dict(model.state_dict())
    return wide


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_no_less_exact_than_pefts(backend: str, autocast: bool) -> None:
    """A bfloat16 base with float32 adapters, and a float32 base under autocast; averaged over ten inputs."""
    dtype = torch.float32 if autocast else torch.bfloat16
    ours = adapted_block(dtype=dtype, backend=backend)
    theirs = peft_twin(ours, block(dtype=dtype), dtype=torch.float32, **SETTINGS)
    total: dict[str, dict[str, float]] = {"ours": {}, "theirs": {}}
    for seed in range(10):
        for name, model in (("ours", ours), ("theirs", theirs)):
            model.zero_grad()
            x = normal(64, 12, seed=seed, dtype=dtype, grad=True)
            for kind, error in errors_against_float64((model, widened(ours), x), autocast=autocast).items():
                total[name][kind] = total[name].get(kind, 0.0) + error

    assert len(total["ours"]) == 2 + len(TARGETS)
    for kind, error in total["ours"].items():
        assert error <= 1.1 * total["theirs"][kind], (kind, total)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_B_equal_those_of_an_adapter_whose_A_trains_too(backend: str) -> None:
    ours = adapted_block(backend=backend)
    theirs = peft_twin(ours, block(), dtype=torch.float32, **SETTINGS)
    for layer in adapted_layers(theirs).values():
        layer.lora_A["default"].weight.requires_grad_(True)
    x = normal(6, 12, dtype=torch.float32)
    for model in (ours, theirs):
        model(x).square().mean().backward()
    theirs_B = [grad for name, grad in gradients(theirs).items() if "lora_B" in name]

    # The head's input differs in the order of roundings only.
    for a, b in zip(gradients(ours).values(), theirs_B, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
