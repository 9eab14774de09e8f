"""Module ranges: which modules they watch, what a failure leaves, and that nothing is left of them afterwards."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_efficient.dissect import ModuleRanges, Recorder
from tests.dissect.steps import Sleepy, record, recorded_step, rows

REST_S = 0.03


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.ones(4, 8)).square().mean()
    return loss


def hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


def test_hooks_are_there_while_it_records_and_gone_afterwards() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    recorder = Recorder(model)
    with recorder:
        assert hooks(model) == 6
        recorder.ranges.attach()  # once more adds none
        assert hooks(model) == 6
    assert hooks(model) == 0


def test_a_shared_module_has_its_first_name_and_every_call() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    cut = rows(record(model, loss_of).host)
    assert cut["0"].calls == 2
    assert "2" not in cut
    assert cut["0"].backward_s > 0


def test_a_module_called_twice_counts_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Sleepy(8, forward_s=REST_S / 2, backward_s=REST_S / 2)

        @override
        def forward(self, x: Tensor) -> Tensor:
            once: Tensor = self.inner(x)
            again: Tensor = self.inner(once)
            return again

    row = rows(record(Twice(), loss_of).host)["inner"]
    assert row.calls == 2
    assert row.forward_s >= REST_S
    assert row.backward_s >= REST_S


def test_a_module_never_called_has_no_row() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].register_module("unused", nn.Linear(3, 3))
    assert "0.unused" not in rows(record(model, loss_of).host)


def test_a_net_that_begins_with_an_embedding_has_its_backward() -> None:
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 8))
    ids = torch.arange(512)
    cut = rows(record(model, lambda net: net(ids).square().mean()).host)
    assert cut["0"].backward_s > 0
    assert cut["0"].role == "embedding"


class Failing(nn.Module):
    """Fails in its forward while `broken`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.broken: BaseException | None = None

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.broken is not None:
            raise self.broken
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["an error", "an interruption"])
def test_a_step_after_a_failed_one_is_cut_as_if_nothing_had_been(error: BaseException) -> None:
    failing = Failing()
    model = nn.Sequential(nn.Sequential(Sleepy(8), failing), Sleepy(8, forward_s=REST_S, backward_s=REST_S))
    optimizer = SGD(model.parameters(), lr=1e-3)
    recorder = Recorder(model, [optimizer])
    with recorder:
        recorded_step(recorder, model, loss_of, optimizer)
        failing.broken = error
        with pytest.raises(type(error)):
            recorded_step(recorder, model, loss_of, optimizer)
        failing.broken = None
        recorded_step(recorder, model, loss_of, optimizer)
        assert recorder._open == []
    result = recorder.result()
    assert hooks(model) == 0
    assert result.steps == 3
    cut = rows(result.host)
    assert cut["1"].calls == pytest.approx(2 / 3)
    assert cut["1"].forward_s >= 2 / 3 * REST_S
    assert cut["1"].backward_s >= 2 / 3 * REST_S
    assert cut["0.1"].forward_s < REST_S / 3
    assert cut["<loop>"].other_s < REST_S / 3
    assert sum(row.total_s for row in result.host.rows) == pytest.approx(result.host.step_s, rel=1e-9)


def test_a_failed_optimizer_closes_with_its_step() -> None:
    model = Sleepy(8)

    class Breaks(SGD):
        @override
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("no step")

    optimizer = Breaks(model.parameters(), lr=1e-3)
    recorder = Recorder(model, [optimizer])
    with recorder:
        with pytest.raises(RuntimeError, match="no step"):
            recorded_step(recorder, model, loss_of, optimizer)
        with recorder.step():
            time.sleep(REST_S)
    result = recorder.result()
    assert result.steps == 2
    assert rows(result.host)["<loop>"].other_s >= REST_S / 2
    assert rows(result.host)["<optimizer Breaks>"].optimizer_s < REST_S / 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_of_exactly_the_modules_in_checkpointed_blocks(reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self, *, checkpointed: bool) -> None:
            super().__init__()
            self.first, self.block, self.last = Sleepy(8), nn.Sequential(Sleepy(8), Sleepy(8)), Sleepy(8)
            self.checkpointed = checkpointed

        @override
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = checkpoint(self.block, x, use_reentrant=reentrant) if self.checkpointed else self.block(x)
            return self.last(x)  # type: ignore[no-any-return]

    plain = rows(record(Net(checkpointed=False), loss_of).host)
    assert {name for name, row in plain.items() if row.recompute_s} == set()
    net = Net(checkpointed=True)
    net.block[1].forward_s = REST_S
    cut = rows(record(net, loss_of).host)
    again = {"block", "block.0", "block.0.linear", "block.1", "block.1.linear"}
    # A non-reentrant recomputation stops at the last tensor that backward needs: the last module may not run again.
    assert again - {"block.1.linear"} <= {name for name, row in cut.items() if row.recompute_s} <= again
    assert cut["block.1"].forward_s >= REST_S
    assert cut["block.1"].recompute_s >= REST_S
    assert cut["block.1"].calls == 1
    assert sum(row.recompute_s for row in cut.values()) < 2 * REST_S


def test_a_checkpoint_wrapper_has_no_name_and_its_module_is_seen_running_again() -> None:
    model = nn.Sequential(checkpoint_wrapper(Sleepy(8, forward_s=REST_S)), Sleepy(8))
    ranges = ModuleRanges(model)
    assert list(ranges.modules) == ["", "0", "0.linear", "1", "1.linear"]
    cut = rows(record(model, loss_of).host)
    assert cut["0"].cls == "Sleepy"
    assert cut["0"].forward_s >= REST_S
    assert cut["0"].recompute_s >= REST_S


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile itself
@pytest.mark.parametrize("wrapped", [True, False], ids=["torch.compile(module)", "module.compile()"])
def test_a_compiled_module_is_one_row_with_its_forward_and_backward(wrapped: bool) -> None:
    torch.compiler.reset()
    compiled: Any = nn.Sequential(nn.Linear(8, 512), nn.GELU(), nn.Linear(512, 8))
    model = nn.Sequential(nn.Linear(8, 8), compiled, nn.Linear(8, 8))
    if wrapped:
        model[1] = torch.compile(compiled, backend="aot_eager")
    else:
        compiled.compile(backend="aot_eager")
    call = model[1]._compiled_call_impl
    recorder = Recorder(model)
    assert recorder.ranges.compiled == ["1"]
    assert list(recorder.ranges.modules) == ["", "0", "1", "2"]

    def loss(net: nn.Module) -> Tensor:
        value: Tensor = net(torch.ones(64, 8)).square().mean()
        return value

    loss(model).backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    result = record(model, loss, warmup=0)
    cut = rows(result.host)
    assert cut["1"].calls == 1
    assert cut["1"].forward_s > cut["0"].forward_s
    assert cut["1"].backward_s > cut["0"].backward_s > 0
    assert cut["<training_step>"].backward_s < cut["1"].backward_s
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # nothing was compiled anew
    assert model[1]._compiled_call_impl is call
    assert hooks(model) == 0


def test_a_model_compiled_as_a_whole_is_one_row() -> None:
    torch.compiler.reset()
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.compile(backend="aot_eager")
    ranges = ModuleRanges(model)
    assert ranges.compiled == [""]
    assert list(ranges.modules) == [""]
    assert ModuleRanges(model, root=False).compiled == [""]
    cut = rows(record(model, loss_of).host)
    assert cut[""].backward_s > 0


def test_names_are_without_the_data_parallel_wrapper() -> None:
    class DistributedDataParallel(nn.Module):  # told by its name: torch's own needs a process group
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = nn.Sequential(nn.Linear(8, 8))
    wrapped = DistributedDataParallel(model)
    assert list(ModuleRanges(wrapped).modules) == ["", "0"]
    assert ModuleRanges(wrapped).describe()["0"] == ("other", "Linear")
