"""The private names that _compat touches are still there and mean the same."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from lightning_efficient import _compat
from lightning_efficient.strategies import FullyShardedStrategy
from tests.support.ranks import run_ranks


def test_sequence_numbers_lead_from_a_running_node_to_the_code_that_made_it() -> None:
    x = torch.ones(3, requires_grad=True)
    seen: list[int | None] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(_compat.running_sequence_number())
            return gradient * 2

    before = _compat.next_sequence_number()
    y = Watched.apply(x)
    after = _compat.next_sequence_number()
    y.sum().backward()

    assert before < after
    assert seen[0] is not None
    assert before <= seen[0] < after
    assert _compat.running_sequence_number() is None


def test_a_dispatch_mode_sees_every_operator() -> None:
    seen = []

    class Mode(_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        nn.Linear(2, 2)(torch.ones(1, 2))

    assert "aten.addmm.default" in seen


def test_plain_parts_are_those_that_a_wrapper_holds() -> None:
    plain = torch.ones(2)
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)

    assert _compat.plain_parts(plain) == [plain]
    assert {tuple(part.shape) for part in _compat.plain_parts(nested)} >= {(3, 3), (3,)}


def test_fake_tensors_are_told_from_others() -> None:
    with _compat.FakeTensorMode():
        assert _compat.is_fake(torch.ones(2))
    assert not _compat.is_fake(torch.ones(2))
    assert not _compat.is_fake(torch.ones(2, device="meta"))


def test_the_data_parallel_size_is_the_strategys() -> None:
    strategy = FullyShardedStrategy()

    _compat.set_data_parallel_size(strategy, 3)

    # What setup_environment reads; the sharding tests of the models run it.
    assert vars(strategy)["_data_parallel_size"] == 3


def test_a_context_is_entered_around_calls_of_a_module_compiled_in_place() -> None:
    entered = []

    @contextmanager
    def around() -> Iterator[None]:
        entered.append(1)
        yield

    module = nn.Linear(2, 2)
    assert _compat.wrap_compiled_call(module, around) is None
    module.compile(backend="eager")
    undo = _compat.wrap_compiled_call(module, around)
    assert undo is not None
    module(torch.ones(1, 2))
    assert entered == [1]
    undo()
    module(torch.ones(1, 2))
    assert entered == [1]


def test_a_step_without_values_raises_what_is_named() -> None:
    with _compat.FakeTensorMode(), pytest.raises(_compat.fake_tensor_errors()):
        torch.ones(2).sum().item()


def test_operators_of_torch_can_be_taken_apart() -> None:
    assert _compat.is_composed_operator(torch.ops.aten.linear.default)
    assert not _compat.is_composed_operator(torch.ops.prim.device.default)
    assert not _compat.is_composed_operator(len)


@pytest.mark.distributed
def test_hooks_of_a_dtensor_fire_after_a_move() -> None:
    fired, revived = run_ranks(_hooks_after_a_move, 1, timeout=150)[0]
    # Where the first is not empty, torch has mended it, and `revive_gradient_hooks` can go.
    assert fired == []
    assert sorted(revived) == ["new", "old"]


def _hooks_after_a_move(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    module = nn.Module()
    mesh = init_device_mesh("cpu", (1,))
    module.weight = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, (Replicate(),)))
    fired: list[str] = []
    module.weight.register_post_accumulate_grad_hook(lambda _: fired.append("old"))
    module.to("cpu")
    module.weight.register_post_accumulate_grad_hook(lambda _: fired.append("new"))
    module.weight.to_local().sum().backward()
    before = list(fired)
    _compat.revive_gradient_hooks(module.weight)
    module.weight.to_local().sum().backward()
    return before, fired[len(before) :]


def test_transforms_of_functorch_can_be_stepped_aside_for() -> None:
    order: list[str] = []
    x = torch.ones(2)
    with _compat.around_functorch(lambda: order.append("leave"), lambda: order.append("enter")):
        torch.func.grad(lambda y: torch.func.grad(lambda z: (z**3).sum())(y).sum())(x)
        assert order == ["leave", "enter"]
    torch.func.grad(torch.sum)(x)
    assert order == ["leave", "enter"]
