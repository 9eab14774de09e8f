"""Capture under torch.compile, autocast and a gradient scaler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.eva.captured import Watch, agree


class _Net(nn.Module):
    """A convolution, a Linear on three dimensions used twice and one on two, with outputs changed in place."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.inner = nn.Linear(6, 6)
        self.narrow = nn.Linear(24, 5)
        self.head = nn.Linear(5, 3)
        self.checkpointed = checkpointed

    def _body(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.conv(x)).flatten(2)
        x = torch.relu_(self.inner(self.inner(x).tanh()))
        return torch.relu_(self.narrow(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        body: Any = checkpoint(self._body, x, use_reentrant=False) if self.checkpointed else self._body(x)
        return self.head(body)


def _inputs(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 2, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _net(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return _Net(**kwargs).double()


def _loss(output: Tensor) -> Tensor:
    return (output.float().sin() * output.float()).mean() if output.dtype == torch.bfloat16 else output.sin().mean()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_net_captures_the_same(backend: str, checkpointed: bool) -> None:
    torch.compiler.reset()
    model = _net(checkpointed=checkpointed)
    watch = Watch(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    # The second batch is accumulated: what the graph wrote once must be added to, and no new graph made.
    for x in (_inputs(1), _inputs(2)):
        _loss(compiled(x)).backward()
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(_inputs(1), _inputs(2)))
    watch.capture.clear()
    model.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        _loss(compiled(_inputs(3))).backward()
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(_inputs(3)))


def test_a_compiled_net_in_eval_mode_or_without_backward_leaves_no_trace() -> None:
    torch.compiler.reset()
    model = _net()
    watch = Watch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(_inputs(7))
    model.eval()
    _loss(compiled(_inputs(8))).backward()
    model.train()
    model.zero_grad()
    _loss(compiled(_inputs(1))).backward()
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(_inputs(1)))


def test_autocast_keeps_the_sums_in_float32() -> None:
    model = _net().float()
    watch, x = Watch(model), _inputs(1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(model(x))
    loss.backward()
    a, g = watch.vectors()
    # Both sum the same bf16 numbers, but autocast sums the gradient of the bias in bf16: up to 10 roundings of 2^-9 (30
    # for the convolution, in blocks). Inputs of inner layers are rounded to 2^-9 once or twice, and their means cancel.
    agree(g, watch.bias_gradients(), rtol=0.03)
    agree(a, watch.mean_inputs(x), rtol=0.03)
    assert {vector.dtype for each in (a, g) for vector in each.values()} == {torch.float32}


def test_the_first_layer_under_autocast_is_summed_before_any_rounding() -> None:
    layer = nn.Sequential(nn.Linear(6, 4))
    watch, x = Watch(layer), torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) + 3
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().mean().backward()
    agree(watch.vectors()[0], {"0": x.double().mean(0)}, rtol=1e-6)  # float32: 64 roundings of 6e-8 at most


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_under_a_gradient_scaler_g_is_the_unscaled_gradient_of_the_bias(scale: float) -> None:
    model = _net()
    watch, x = Watch(model), _inputs(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(_loss(model(x))).backward()
    scaler.unscale_(optimizer)
    a, g = watch.vectors(loss_scale=scaler.get_scale())
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(x))


def test_what_is_not_finite_is_told() -> None:
    def finite(change: Callable[[Tensor], Tensor]) -> bool:
        model = _net()
        watch = Watch(model)
        _loss(model(_inputs(1))).backward()
        _loss(change(model(_inputs(2)))).backward()
        watch.capture.reduce(None, 1)
        return bool(watch.capture.vectors(world_size=1, loss_scale=None).finite)

    assert finite(lambda y: y)
    assert not finite(lambda y: y * float("nan"))
