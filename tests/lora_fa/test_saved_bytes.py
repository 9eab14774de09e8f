"""The count of what autograd keeps."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient._saved_bytes import SavedBytes
from lightning_efficient.lora_fa import saved_bytes


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)))


def test_each_storage_counts_once() -> None:
    x = torch.randn(3, 5, requires_grad=True)

    assert saved_bytes(lambda: x * x * x.t().t()).total == 3 * 5 * 4 + 3 * 5 * 4  # x, and x * x
    assert len(saved_bytes(lambda: (x[:2] ** 2).sum() + (x[1:] ** 2).sum()).tensors) == 1


def test_a_small_view_counts_as_the_storage_that_it_keeps_alive() -> None:
    x = torch.randn(100, 5, requires_grad=True)

    assert saved_bytes(lambda: (x[:1] ** 2).sum()).total == 100 * 5 * 4


def test_parameters_and_buffers_are_left_out() -> None:
    net, x = model().eval(), torch.randn(3, 4)
    kept = saved_bytes(lambda: net(x), module=net)
    shapes = [each.shape for each in kept.tensors]

    # The input, tanh's result (once), and what the norm saves; no weight, no running mean.
    assert (8, 4) not in shapes
    assert (3, 4) in shapes
    assert sum(shape == (3, 8) for shape in shapes) == 2
    assert not any(each.nbytes == 8 * 4 and each.shape == (8,) for each in kept.tensors)


def test_without_the_module_parameters_and_views_of_them_are_left_out() -> None:
    weight, x = nn.Parameter(torch.randn(4, 4)), torch.randn(3, 4)

    assert saved_bytes(lambda: x @ weight.t()).total == 3 * 4 * 4


def test_bytes_are_named_by_the_innermost_module_that_ran() -> None:
    net, x = model(), torch.randn(3, 4)
    kept = saved_bytes(lambda: net(x).square().sum(), module=net)

    assert kept.by_module()["0"] == 3 * 4 * 4
    assert set(kept.by_module()) == {"0", "1", "2.0", "2.1", ""}
    assert list(kept.by_module().values()) == sorted(kept.by_module().values(), reverse=True)
    assert sum(kept.by_module().values()) == kept.total
    assert "MiB  2.1" in str(kept)
    assert "(outside of modules)" in str(kept)


def test_as_a_context_and_with_a_function_it_counts_the_same() -> None:
    net, x = model().eval(), torch.randn(3, 4)
    with saved_bytes(module=net) as inside:
        y = net(x)
    called = saved_bytes(lambda: net(x), module=net)

    assert inside.tensors == called.tensors
    assert torch.equal(called.result, y)
    assert inside.result is None


def test_backward_gives_the_gradients_it_would_have_given() -> None:
    net, x = model(), torch.randn(3, 4)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with saved_bytes(module=net):
        loss = net(x).square().sum()
    loss.backward()

    assert all(torch.equal(p.grad, want) for p, want in zip(net.parameters(), expected, strict=True))


def test_a_count_inside_another_is_part_of_it() -> None:
    net, x = model().eval(), torch.randn(3, 4)
    alone = saved_bytes(lambda: net(x), module=net).total
    with saved_bytes(module=net) as outer:
        first = net(x)
        with saved_bytes(module=net) as inner:
            second = net(x.clone())
        third = net(x.clone())

    assert inner.total == alone
    assert outer.total == 3 * alone
    assert first.shape == second.shape == third.shape


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("broken")


@pytest.mark.parametrize("as_function", [True, False])
def test_an_exception_leaves_no_hook_behind(as_function: bool) -> None:
    from torch.nn.modules import module as hooks

    net, x = nn.Sequential(nn.Linear(4, 4), Broken()), torch.randn(3, 4, requires_grad=True)
    before = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    record = saved_bytes(module=net)

    def inside() -> None:
        with record:
            net(x)

    with pytest.raises(ArithmeticError):
        saved_bytes(lambda: net(x), module=net) if as_function else inside()
    counted = record.total
    (x * x).sum().backward()

    assert (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)) == before
    assert record.total == counted
    assert saved_bytes(lambda: net[0](x), module=net).by_module() == {"0": 3 * 4 * 4}


def test_a_module_that_raises_inside_does_not_shift_the_names_after_it() -> None:
    net, x = nn.ModuleDict({"bad": nn.Sequential(Broken()), "good": nn.Linear(4, 4)}), torch.randn(3, 4)
    with saved_bytes(module=net) as kept:
        with pytest.raises(ArithmeticError):
            net["bad"](x)
        (net["good"](x).exp()).sum()

    assert kept.by_module() == {"good": 3 * 4 * 4, "": 3 * 4 * 4}


def test_a_graph_that_never_runs_backward_is_freed() -> None:
    x = torch.randn(64, requires_grad=True)
    with saved_bytes():
        y = x.exp()  # keeps its own result
    gone = weakref.ref(y)
    del y
    gc.collect()

    assert gone() is None


def test_second_derivatives_are_those_without_counting() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def second() -> Tensor:
        (first,) = torch.autograd.grad((x.exp() * x.tanh()).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    expected = second()
    assert torch.equal(saved_bytes(second).result, expected)


def test_without_gradients_nothing_is_kept() -> None:
    net = model().requires_grad_(False)

    assert saved_bytes(lambda: net(torch.randn(3, 4)), module=net).total == 0


def test_a_model_without_memory_keeps_as_much() -> None:
    def kept(device: str) -> int:
        net, x = model().to(device), torch.randn(3, 4, device=device)
        return saved_bytes(lambda: net(x).sum(), module=net).total

    assert kept("meta") == kept("cpu")


def test_transforms_of_torch_func_run_inside_and_what_is_around_them_is_counted() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    with saved_bytes(module=model) as alone:
        model(x)
    with saved_bytes(module=model) as outer, saved_bytes(module=model) as kept:
        first = model(x)
        slope = torch.func.grad(lambda y: torch.func.grad(lambda z: (z**3).sum())(y).sum())(x)
        with pytest.raises(ZeroDivisionError):
            torch.func.grad(lambda y: 1 / 0)(x)
        second = model(2 * x)
    torch.testing.assert_close(slope, 6 * x)
    assert kept.total == outer.total == 2 * alone.total
    assert kept.interrupted
    assert not alone.interrupted
    (first + second).sum().backward()  # the hooks' own tensors are whole


def test_modules_may_have_other_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with saved_bytes(module=model) as own:
        model(torch.randn(2, 4))
    assert own.by_module() == {"0": 32, "1": 32}
    with SavedBytes(model, names={"all": model, "all.last": model[1]}) as kept:
        model(torch.randn(2, 4))
    assert kept.by_module() == {"all": 32, "all.last": 32}
