"""Compiled layers give what eager ones give, in one graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

from lightning_efficient.lora_fa import LoRAFAConfig, apply_lora_fa
from tests.lora_fa import hf
from tests.lora_fa.nets import adapted_block, fill_B, gradients, ids, llama, normal

# torch 2.13's own tracing of an autograd.Function; nothing of ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated. Methods on autograd functions are all static:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(model: nn.Module, x: Tensor, seed: int = 3) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x)
    y.square().mean().backward()
    found = [y.detach(), *gradients(model).values()]
    return [*found, x.grad.clone()] if x.grad is not None else found


def close(ours: list[Tensor], eager: list[Tensor]) -> None:
    assert len(ours) == len(eager)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # sums in another order, in float32


@pytest.mark.parametrize(
    "settings",
    [{}, {"dropout": 0.4}, {"dropout": 0.4, "dropout_mode": "lowrank"}, {"dropout": 0.4, "dropout_mode": "saved"}],
)
def test_a_block_compiles_into_one_graph(settings: dict[str, Any]) -> None:
    """aot_eager draws eager's random numbers, so dropout's masks can be compared, too."""
    eager = run(adapted_block(**settings), normal(6, 12, dtype=torch.float32, grad=True))
    compiled = torch.compile(adapted_block(**settings), fullgraph=True, backend="aot_eager")

    close(run(compiled, normal(6, 12, dtype=torch.float32, grad=True)), eager)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_llama_compiles_into_one_graph(dropout: float) -> None:
    models = []
    for _ in range(2):
        model = llama()
        apply_lora_fa(model, LoRAFAConfig(r=4, dropout=dropout))
        models.append(fill_B(model))

    close(run(torch.compile(models[1], fullgraph=True, backend="aot_eager"), ids()), run(models[0], ids()))


def test_a_layer_compiles_under_autocast() -> None:
    eager, compiled = (adapted_block(dropout=0.3) for _ in range(2))
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(eager, normal(6, 12, dtype=torch.float32, grad=True))
        found = run(step, normal(6, 12, dtype=torch.float32, grad=True))

    assert expected[0].dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)  # a few roundings of bfloat16


@pytest.mark.parametrize("name", ["t5 relu", "t5 gated-gelu"])
def test_recomputed_activations_compile(name: str) -> None:
    eager, compiled = (hf.build(name).eval() for _ in range(2))
    for model in (eager, compiled):
        apply_lora_fa(model, LoRAFAConfig(r=4))
        fill_B(model)
    lean, plain = (model.encoder.block[0].layer[-1] for model in (compiled, eager))
    x = normal(2, 5, 32, dtype=torch.float32)

    close(run(torch.compile(lean, fullgraph=True, backend="aot_eager"), x), run(plain, x))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_inductor_equals_eager(dropout: float) -> None:
    """With torch's own random numbers in place of inductor's, the masks are eager's."""
    eager, compiled = (adapted_block(dropout=dropout) for _ in range(2))
    x = normal(6, 12, dtype=torch.float32)
    with torch._inductor.config.patch(fallback_random=True):
        found = run(torch.compile(compiled, fullgraph=True), x)

    close(found, run(eager, x))


@pytest.mark.slow
def test_inductor_masks_backward_as_it_masked_forward() -> None:
    """Its own random numbers: the output's gradient follows a step that the mask has to agree with."""
    model = adapted_block(dtype=torch.float64, dropout=0.5, target_modules=["first"])
    compiled = torch.compile(model.first, fullgraph=True)
    with torch.no_grad():
        model.first.base_layer.weight.zero_()
        model.first.base_layer.bias.zero_()
    x = normal(64, 12, grad=True)
    y = compiled(x)
    y.sum().backward()

    # Linear in x: y = J x, whose mask is that of this call, so that <dy, y> = <dx, x>.
    torch.testing.assert_close((x.grad * x).sum(), y.detach().sum())
    assert 0.3 < float((x.grad == 0).double().mean()) < 0.7
