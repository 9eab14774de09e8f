"""However a net is run, the captured g is the gradient of the bias and the captured a the mean of the inputs.

Each case says how a net is trained on one batch; a plain copy of the net and autograd say what must be captured.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.eva.captured import Watch, agree

# float64 sums of at most a few hundred entries in two orders differ by less than 1e-14.

D = 5


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def _inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _loss(output: Tensor) -> Tensor:
    return (output.sin() * output).mean()


def _mlp(inplace: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 7), nn.ReLU(inplace), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


def _net_of_convolutions(inplace: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(4, 6, 2, groups=2), nn.ReLU(inplace), nn.Flatten(),
        nn.Linear(54, 3),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2-d linear": (_mlp, (8, D)),
    "2-d linear, in-place ReLU": (partial(_mlp, True), (8, D)),
    "3-d linear": (_mlp, (4, 6, D)),
    "3-d linear, in-place ReLU": (partial(_mlp, True), (4, 6, D)),
    "4-d linear, in-place ReLU": (partial(_mlp, True), (2, 3, 4, D)),
    "unbatched linear": (_mlp, (D,)),
    "conv": (_net_of_convolutions, (5, 2, 4, 4)),
    "conv, in-place ReLU": (partial(_net_of_convolutions, True), (5, 2, 4, 4)),
}


@pytest.mark.parametrize("net", NETS)
def test_a_plain_pass(net: str) -> None:
    make, shape = NETS[net]
    model = _seeded(make)
    watch, x = Watch(model), _inputs(*shape)
    _loss(model(x)).backward()
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(x))


def test_an_unbatched_image_is_one_sample() -> None:
    model = _seeded(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(True), nn.Conv2d(4, 3, 2, groups=1)))
    watch, x = Watch(model), _inputs(2, 6, 5)
    _loss(model(x)).backward()
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(x))


@pytest.mark.parametrize("bias", [True, False])
def test_an_in_place_change_of_a_linear_output_on_three_dimensions(bias: bool) -> None:
    layer = _seeded(lambda: nn.Linear(D, 4, bias=bias))
    watch, x = Watch(nn.Sequential(layer)), _inputs(3, 2, D)
    y = layer(x)
    before = y.detach().clone()
    _loss(y.mul_(2).add_(1)).backward()
    g = watch.vectors()[1]["0"]
    leaf = before.requires_grad_()
    (dy,) = torch.autograd.grad(_loss(leaf * 2 + 1), leaf)
    agree({"0": g}, {"0": dy.sum((0, 1))})


@pytest.mark.parametrize("net", ["2-d linear", "3-d linear", "conv"])
def test_accumulated_micro_batches_add_up(net: str) -> None:
    make, (_, *shape) = NETS[net]
    model = _seeded(make)
    watch = Watch(model)
    batches = [_inputs(n, *shape, seed=n) for n in (2, 4, 3)]
    for x in batches:
        (_loss(model(x)) / 3).backward()
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(*batches))


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).tanh()))


def test_a_module_called_twice_counts_twice() -> None:
    model = _seeded(_Twice)
    watch, x = Watch(model), _inputs(6, D)
    _loss(model(x)).backward()
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(x))


class _ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.conv = nn.Linear(D, D), nn.Conv1d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(input=self.layer(input=x))


def test_inputs_may_be_passed_by_keyword() -> None:
    model = _seeded(_ByKeyword)
    watch, x = Watch(model), _inputs(6, 2, D)
    _loss(model(x)).backward()
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, {"layer": x.mean((0, 1))})


@pytest.mark.parametrize("net", ["2-d linear, in-place ReLU", "3-d linear, in-place ReLU", "conv"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_once(net: str, reentrant: bool) -> None:
    make, shape = NETS[net]
    model = _seeded(make)
    watch, x = Watch(model), _inputs(*shape)
    middle: Any = checkpoint(model[0:3], x.clone().requires_grad_(), use_reentrant=reentrant)
    _loss(checkpoint(model[3:], middle, use_reentrant=reentrant)).backward()
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_is_used_inside_and_outside_of_a_checkpoint(reentrant: bool) -> None:
    layer = _seeded(lambda: nn.Linear(D, D))
    watch, x = Watch(nn.Sequential(layer)), _inputs(6, D)
    inside: Any = checkpoint(layer, layer(x), use_reentrant=reentrant)
    _loss(layer(inside)).backward()
    a, g = watch.vectors()
    agree(g, {"0": layer.bias.grad})
    with torch.no_grad():
        inputs = [x, watch.plain(x), watch.plain(watch.plain(x))]
    agree(a, {"0": torch.stack(inputs).mean((0, 1))})


# ---- what must leave no trace ----------------------------------------------------------------------------------------


def _evaluate(model: nn.Module, x: Tensor) -> None:
    model.eval()
    _loss(model(x)).backward()  # even with a backward pass
    model.train()


def _evaluate_without_grad(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def _forward_only(model: nn.Module, x: Tensor) -> None:
    model(x)


def _inner_gradient(model: nn.Module, x: Tensor) -> None:
    """As in a gradient penalty or a physics-informed net: no parameter receives a gradient."""
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x, create_graph=True)


def _inner_gradient_alone(model: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x)


@pytest.mark.parametrize(
    "pass_", [_evaluate, _evaluate_without_grad, _forward_only, _inner_gradient, _inner_gradient_alone]
)
@pytest.mark.parametrize("net", ["2-d linear", "3-d linear", "conv"])
def test_a_pass_that_gives_no_gradients_leaves_no_trace(pass_: Callable[[nn.Module, Tensor], None], net: str) -> None:
    make, shape = NETS[net]
    model = _seeded(make)
    watch, x = Watch(model), _inputs(*shape)
    pass_(model, _inputs(*shape, seed=9))
    model.zero_grad()
    _loss(model(x)).backward()
    pass_(model, _inputs(*shape, seed=10)) if pass_ is not _evaluate else None
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(x))


def test_a_backward_pass_that_keeps_its_graph_counts() -> None:
    model = _seeded(_mlp)
    watch, x = Watch(model), _inputs(6, D)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
        _loss(model(x)).backward(create_graph=True)
    a, g = watch.vectors()
    agree(g, {name: each.detach() for name, each in watch.bias_gradients().items()})
    agree(a, watch.mean_inputs(x))
    model.zero_grad()


def test_one_tensor_read_by_several_layers_is_read_anew_once_it_has_changed() -> None:
    first, second, third = (_seeded(lambda: nn.Linear(D, 3)) for _ in range(3))
    watch, x = Watch(nn.ModuleList([first, second, third])), _inputs(4, D)
    old = x.mean(0)
    with torch.autograd.graph.save_on_cpu():  # keeps copies, so that x may change
        y = first(x) + second(x)
        x.add_(1)
        (y + third(x)).sum().backward()
    agree(watch.vectors()[0], {"0": old, "1": old, "2": old + 1})


def test_clear_forgets_what_was_captured() -> None:
    model = _seeded(_mlp)
    watch, x = Watch(model), _inputs(6, D)
    _loss(model(x * 7)).backward()
    watch.capture.clear()
    model.zero_grad()
    _loss(model(x)).backward()
    a, g = watch.vectors()
    agree(g, watch.bias_gradients())
    agree(a, watch.mean_inputs(x))


def test_a_layer_without_a_backward_pass_has_no_value() -> None:
    model = _seeded(_mlp)
    watch = Watch(model)
    model[2](model[0](_inputs(4, D))).sum().backward()
    a, g = watch.vectors()
    assert a["4"].isnan().all()
    assert g["4"].isnan().all()
    assert not a["2"].isnan().any()
    assert watch.capture.rows.tolist() == [4, 4, 0]


def test_the_hooks_go_away() -> None:
    model = _seeded(_mlp)
    watch = Watch(model)
    watch.capture.remove()
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    _loss(model(_inputs(4, D))).backward()
    assert watch.vectors()[0]["0"].isnan().all()
