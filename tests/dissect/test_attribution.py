"""Rows add up to the step, and a planted rest lands in its own row and in no other."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from typing_extensions import override

from lightning_efficient.dissect import Recorder, attribute
from lightning_efficient.dissect.attribution import ENGINE, TRAINING_STEP
from lightning_efficient.dissect.result import PHASES
from tests.dissect.steps import Sleepy, record, recorded_step, rows, times

REST_S = 0.03
NOISE_S = 0.012
"""A rest of 30 ms is longer than what a busy machine takes from the median of a few short steps, and 12 ms apart."""


def two_layers() -> nn.Sequential:
    return nn.Sequential(Sleepy(8), Sleepy(8))


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.ones(4, 8)).square().mean()
    return loss


def medians(model: nn.Module, **kwargs: Any) -> dict[tuple[str, str], float]:
    """Seconds by row and phase, the middle of three single steps."""
    cuts = [times(record(model, loss_of, steps=1, **kwargs).host) for _ in range(3)]
    keys = {key for cut in cuts for key in cut}
    return {key: sorted(cut.get(key, 0.0) for cut in cuts)[1] for key in keys}


def gains(plain: dict[tuple[str, str], float], rested: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    return {key: rested.get(key, 0.0) - plain.get(key, 0.0) for key in {*plain, *rested}}


def only_gain(found: dict[tuple[str, str], float], key: tuple[str, str]) -> None:
    assert REST_S - 0.001 <= found.pop(key) <= REST_S + NOISE_S
    assert {each: gain for each, gain in found.items() if abs(gain) > NOISE_S} == {}


class RestingSGD(SGD):
    @override
    def step(self, closure: Any = None) -> Any:
        time.sleep(REST_S)
        return super().step(closure)


def test_rows_add_up_to_the_step_and_none_is_negative() -> None:
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    ids = torch.arange(20).reshape(4, 5)
    host = record(model, lambda net: net(ids).square().mean(), steps=3).host

    assert sum(row.total_s for row in host.rows) == pytest.approx(host.step_s, rel=1e-9)
    assert all(getattr(row, f"{phase}_s") >= 0 for row in host.rows for phase in PHASES)
    assert sum(host.phase_s(phase) for phase in PHASES) == pytest.approx(host.step_s, rel=1e-9)


def test_a_rest_in_forward_is_that_modules() -> None:
    plain, rested = two_layers(), two_layers()
    rested[1].forward_s = REST_S
    only_gain(gains(medians(plain), medians(rested)), ("1", "forward"))


def test_a_rest_in_backward_is_that_modules() -> None:
    plain, rested = two_layers(), two_layers()
    rested[0].backward_s = REST_S
    only_gain(gains(medians(plain), medians(rested)), ("0", "backward"))


def test_a_rest_in_the_optimizer_is_the_optimizers() -> None:
    model = two_layers()
    plain = medians(model, optimizer=SGD(model.parameters(), lr=1e-3))
    # A class of its own has a row of its own.
    rested = medians(model, optimizer=RestingSGD(model.parameters(), lr=1e-3))
    found = gains(plain, rested)
    assert found.pop(("<optimizer SGD>", "optimizer")) <= 0
    only_gain(found, ("<optimizer RestingSGD>", "optimizer"))


def test_a_rest_in_a_loss_that_is_no_module_is_the_training_steps() -> None:
    model = two_layers()

    def late(net: nn.Module) -> Tensor:
        loss = loss_of(net)
        time.sleep(REST_S)
        return loss

    cut = times(record(model, late, steps=1).host)
    assert REST_S <= cut[TRAINING_STEP, "forward"] <= REST_S + NOISE_S


def test_a_rest_between_the_parts_is_the_loops() -> None:
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=1e-3)
    recorder = Recorder(model, [optimizer])
    with recorder, recorder.step():
        time.sleep(REST_S)
        loss_of(model).backward()
    assert rows(recorder.result().host)["<loop>"].other_s >= REST_S


def test_a_closure_is_not_the_optimizers_time() -> None:
    model = Sleepy(8, forward_s=REST_S, backward_s=REST_S)
    optimizer = SGD(model.parameters(), lr=1e-3)

    def closure() -> float:
        loss = loss_of(model)
        loss.backward()
        return float(loss.detach())

    recorder = Recorder(model, [optimizer])
    with recorder, recorder.step():
        optimizer.step(closure)
    cut = rows(recorder.result().host)
    assert cut[""].forward_s >= REST_S
    assert cut[""].backward_s >= REST_S
    assert 0 < cut["<optimizer SGD>"].optimizer_s < REST_S


def test_two_optimizers_of_one_class_have_a_row_each_and_no_third() -> None:
    model = two_layers()
    first, second = RestingSGD(model[0].parameters(), lr=1e-3), SGD(model[1].parameters(), lr=1e-3)
    recorder = Recorder(model, [first, second, SGD([nn.Parameter(torch.ones(1))], lr=1.0)])
    with recorder, recorder.step():
        loss_of(model).backward()
        first.step()
        second.step()
    found = {name for name in rows(recorder.result().host) if name.startswith("<optimizer")}
    assert found == {"<optimizer 0 RestingSGD>", "<optimizer 1 SGD>"}


def test_the_names_of_layers_are_names_only() -> None:
    def cut(order: tuple[str, str]) -> dict[str, tuple[float, float]]:
        model = nn.Sequential()
        model.add_module(order[0], Sleepy(8, forward_s=REST_S))
        model.add_module(order[1], Sleepy(8, backward_s=REST_S))
        found = rows(record(model, loss_of, steps=1).host)
        return {name: (found[name].forward_s, found[name].backward_s) for name in order}

    straight, swapped = cut(("a", "b")), cut(("b", "a"))
    for one, other in (("a", "b"), ("b", "a")):
        assert straight[one] == pytest.approx(swapped[other], abs=NOISE_S)
    assert straight["a"][0] >= REST_S > straight["b"][0]
    assert straight["b"][1] >= REST_S > straight["a"][1]


def test_a_record_in_two_goes_is_one_record() -> None:
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=1e-3)
    recorder = Recorder(model, [optimizer])
    for _ in range(2):
        with recorder:
            recorded_step(recorder, model, loss_of, optimizer)
        time.sleep(REST_S)  # between two records, as validation is
    result = recorder.result()
    assert result.steps == 2
    assert sum(row.total_s for row in result.host.rows) == pytest.approx(result.host.step_s, rel=1e-9)
    assert rows(result.host)["0"].calls == 1
    numbers = [each.correlation for each in recorder.events if each.correlation]
    assert len(numbers) == len(set(numbers))


def test_discarding_forgets_the_last_go_only() -> None:
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=1e-3)
    recorder = Recorder(model, [optimizer])
    with recorder:
        recorded_step(recorder, model, loss_of, optimizer)
    recorder.start()
    recorded_step(recorder, model, loss_of, optimizer)
    recorder.discard()
    assert recorder.result().steps == 1
    assert not recorder.running


def test_operators_are_those_of_the_steps_and_their_times_add_up() -> None:
    model = nn.Linear(64, 64)
    result = record(model, lambda net: net(torch.ones(8, 64)).square().mean(), steps=2)
    operators = {each.name: each for each in result.operators}
    assert operators["aten::addmm"].calls == 1
    assert operators["aten::addmm"].kind == "gemm"
    assert sum(each.seconds for each in result.operators) < result.host.step_s


def test_a_record_without_a_step_is_refused() -> None:
    model = two_layers()
    recorder = Recorder(model)
    with recorder:
        loss_of(model).backward()
    with pytest.raises(ValueError, match=r"holds no step.*Run one step at least"):
        recorder.result()
    with pytest.raises(ValueError, match="holds no step"):
        attribute([], {})


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no phase 'thinking'.*Give one of these"), Recorder(two_layers()) as recorder:
        recorder.range("thinking", ENGINE).__enter__()  # type: ignore[arg-type]
