"""`attribute` on records written by hand: what it makes of each nanosecond can be checked with a pencil."""

import random
import time
from dataclasses import replace

import pytest

from lightning_efficient.dissect import Attribution, Event, attribute
from lightning_efficient.dissect.attribution import (
    COMMUNICATION,
    ENGINE,
    GRAD_ACCUMULATE,
    IDLE,
    LOOP,
    TRAINING_STEP,
    UNATTRIBUTED,
)
from tests.dissect.steps import times

NS = 1e-9
MODULES = {"a": ("mlp", "Linear"), "b": ("head", "Linear")}
NODE = "autograd::engine::evaluate_function: "
ACCUMULATE = f"{NODE}torch::autograd::AccumulateGrad"
STEP = Event("le::step", 0, 1000)
FORWARD = [
    Event("le::P:forward:<training_step>", 100, 400),
    Event("le::F:a", 110, 210),
    Event("aten::mm", 120, 200, sequence=5),
    Event("le::F:b", 220, 320),
    Event("aten::linear", 230, 310, sequence=6),
    Event("aten::addmm", 240, 300, sequence=6),
    Event("aten::mean", 330, 390, sequence=7),
]


def nanoseconds(result: Attribution) -> dict[tuple[str, str], int]:
    return {key: round(seconds / NS) for key, seconds in times(result.host).items()}


def on_device(result: Attribution) -> dict[tuple[str, str], int]:
    assert result.device is not None
    return {key: round(seconds / NS) for key, seconds in times(result.device).items()}


def test_backward_goes_to_the_module_whose_operator_made_the_node() -> None:
    backward = [
        Event("le::P:backward:<engine>", 400, 800),
        Event(f"{NODE}MeanBackward0", 410, 450, sequence=7, forward_thread=1),
        Event(f"{NODE}AddmmBackward0", 460, 600, sequence=6, forward_thread=1),
        Event("aten::mm", 470, 590),
        Event(ACCUMULATE, 610, 640),
        Event(f"{NODE}MmBackward0", 650, 780, sequence=5, forward_thread=1),
        Event(f"{NODE}StrangeBackward0", 785, 790, sequence=99, forward_thread=1),
    ]
    optimizer = [
        Event("Optimizer.step#SGD.step", 800, 900),
        Event("le::P:optimizer:<optimizer 1 SGD>", 810, 890),
        Event("aten::add_", 820, 880),
    ]
    result = attribute([STEP, *FORWARD, *backward, *optimizer], MODULES)

    assert nanoseconds(result) == {
        ("a", "forward"): 100,
        ("b", "forward"): 100,
        (TRAINING_STEP, "forward"): 100,  # 300 - 2 x 100
        (TRAINING_STEP, "backward"): 50,  # to the start of the next node, as the others
        ("b", "backward"): 150,
        ("a", "backward"): 135,
        (GRAD_ACCUMULATE, "backward"): 40,
        (UNATTRIBUTED, "backward"): 5,
        (ENGINE, "backward"): 20,  # 400..410 and 790..800
        ("<optimizer 1 SGD>", "optimizer"): 100,
        (LOOP, "other"): 200,
    }
    assert [row.name for row in result.host.rows][:2] == ["a", "b"]
    assert result.host.rows[1].role == "head"
    assert result.host.step_s == pytest.approx(1000 * NS)
    assert result.device is None
    assert result.host.backward_attributed == pytest.approx(285 / 400)
    operators = {each.name: (each.calls, round(each.seconds / NS)) for each in result.operators}
    assert operators["aten::mm"] == (2, 80 + 120)
    assert operators["aten::linear"] == (1, 20)
    assert operators["AddmmBackward0"] == (1, 20)


def test_the_operator_that_used_a_number_up_is_the_last_that_recorded_it() -> None:
    events = [
        STEP,
        Event("le::F:a", 100, 200),
        Event("aten::detach", 110, 120, sequence=5),  # makes no node
        Event("le::F:b", 200, 300),
        Event("aten::mm", 210, 290, sequence=5),
        Event(f"{NODE}MmBackward0", 400, 500, sequence=5, forward_thread=1),
    ]
    assert nanoseconds(attribute(events, MODULES))["b", "backward"] == 100


def test_backward_on_another_thread_is_no_wait_of_the_engine() -> None:
    """As on a GPU: the training thread waits in the engine's range for a thread that runs the nodes."""
    backward = [
        Event("le::P:backward:<engine>", 400, 800),
        Event(f"{NODE}AddmmBackward0", 450, 600, thread=2, sequence=6, forward_thread=1),
        Event("aten::mm", 460, 590, thread=2),
        # Recomputation: the forward of a, on the engine's thread, with numbers of that thread.
        Event(f"{NODE}MmBackward0", 610, 760, thread=2, sequence=5, forward_thread=1),
        Event("le::R:a", 620, 690, thread=2),
        Event("aten::mm", 630, 680, thread=2, sequence=5),
        Event("aten::add", 900, 950, thread=3, sequence=5),  # another thread's business
    ]
    result = attribute([STEP, *FORWARD, *backward], MODULES)
    found = nanoseconds(result)

    assert found["b", "backward"] == 150
    assert found["a", "recompute"] == 70
    assert found["a", "backward"] == 150 - 70
    assert found[ENGINE, "backward"] == 400 - 300
    assert sum(found.values()) == 1000
    assert result.host.rows[0].calls == 1  # recomputation is no call


def test_a_wait_for_a_collective_is_exposed_communication() -> None:
    backward = [
        Event("le::P:backward:<engine>", 400, 800),
        Event(f"{NODE}AddmmBackward0", 410, 500, sequence=6, forward_thread=1),
        Event(ACCUMULATE, 510, 560),
        Event("c10d::allreduce_", 520, 540, n_bytes=0),
        Event("gloo:all_reduce", 530, 700, thread=9, is_async=True, n_bytes=4096),
        Event(f"{NODE}MmBackward0", 570, 600, sequence=5, forward_thread=1),
    ]
    result = attribute([STEP, *FORWARD, *backward], MODULES)
    found = nanoseconds(result)

    # In flight 530..700; of that 560..600 computes. The own time of the call, of the accumulation around it and of the
    # engine after the last node was a wait: 530..540, 540..560, 600..700.
    assert found[COMMUNICATION, "communication"] == 10 + 20 + 100
    assert found["a", "backward"] == 30
    assert found["b", "backward"] == 100
    assert found[GRAD_ACCUMULATE, "backward"] == 10 + 10 + 10  # 510..520, of the call 520..530, 560..570
    assert found[ENGINE, "backward"] == 10 + 100
    assert sum(found.values()) == 1000
    (one,) = result.collectives
    assert (one.op, one.n_bytes, one.calls) == ("all_reduce", 4096, 1)
    assert one.seconds == pytest.approx(170 * NS)


def test_kernels_are_their_launchers_and_hidden_communication_costs_nothing() -> None:
    step = [replace(STEP, end=2000)]
    host = [
        Event("le::F:a", 100, 200),
        Event("aten::mm", 110, 190, sequence=5, correlation=11),
        Event("le::F:b", 200, 300),
        Event("aten::mm", 210, 290, sequence=6, correlation=12),
        Event("le::P:backward:<engine>", 300, 900),
        Event(f"{NODE}MmBackward0", 310, 400, thread=2, sequence=6, forward_thread=1, correlation=13),
        Event("aten::mm", 320, 390, thread=2, correlation=14),
        Event("c10d::allreduce_", 410, 420, thread=2, correlation=15, n_bytes=64),
        Event(f"{NODE}MmBackward0", 430, 500, thread=2, sequence=5, forward_thread=1, correlation=16),
    ]
    # The call that asks for the collective lies in a node, as DDP's do.
    host[-2] = replace(host[-2], start=385, end=389)
    kernels = [
        Event("gemm_a", 500, 700, on_device=True, correlation=11),
        Event("gemm_b", 720, 920, on_device=True, correlation=12),
        Event("gemm_b_backward", 920, 1220, on_device=True, correlation=14),
        Event("ncclDevKernel_AllReduce_Sum_f32", 1000, 1600, on_device=True, correlation=15, n_bytes=64),
        Event("gemm_a_backward", 1230, 1530, on_device=True, correlation=16),
        Event("someone_elses", 100, 5000, on_device=True, correlation=77),
    ]
    result = attribute([*step, *host, *kernels], MODULES)

    assert on_device(result) == {
        ("a", "forward"): 200,
        ("b", "forward"): 200,
        ("b", "backward"): 300,
        ("a", "backward"): 300,
        (COMMUNICATION, "communication"): 10 + 70,  # 1220..1230 and 1530..1600
        # From the first kernel to the end of the step, 500..2000, the two gaps at 700 and after 1600.
        (IDLE, "other"): 20,
    }
    assert result.device is not None
    assert result.device.clock == "device"
    assert result.device.step_s == pytest.approx(1100 * NS)
    assert {each.name for each in result.operators} == {"gemm_a", "gemm_b", "gemm_b_backward", "gemm_a_backward"}
    (one,) = result.collectives
    assert (one.op, one.n_bytes) == ("all_reduce", 64)
    assert one.seconds == pytest.approx(600 * NS)


def test_what_a_gpu_does_between_two_records_is_no_idleness() -> None:
    def step(at: int, number: int) -> list[Event]:
        return [
            Event("le::step", at, at + 100),
            Event("le::F:a", at + 10, at + 90),
            Event("aten::mm", at + 20, at + 80, sequence=5, correlation=number),
            Event("gemm", at + 40, at + 140, on_device=True, correlation=number),
        ]

    result = attribute([*step(0, 1), *step(1_000_000, 2)], MODULES)
    assert on_device(result) == {("a", "forward"): 100, (IDLE, "other"): 20}  # before the second step's kernel: 40 / 2


def test_events_outside_of_steps_count_for_nothing_but_their_numbers() -> None:
    """Gradient accumulation: the graph of a step may be older than the step."""
    before = [replace(each, start=each.start - 500, end=each.end - 500) for each in FORWARD]
    events = [*before, STEP, Event(f"{NODE}AddmmBackward0", 100, 300, sequence=6, forward_thread=1)]
    result = attribute(events, MODULES)
    assert nanoseconds(result) == {("b", "backward"): 200, (LOOP, "other"): 800}
    assert result.host.rows[0].calls == 0


def test_means_are_over_the_steps() -> None:
    second = [replace(each, start=each.start + 1000, end=each.end + 1000) for each in (STEP, *FORWARD)]
    result = attribute([STEP, *FORWARD, *second, replace(STEP, start=2000, end=2100)], MODULES)
    assert result.steps == 3
    assert nanoseconds(result)["a", "forward"] == round(200 / 3)
    assert result.host.rows[0].calls == pytest.approx(2 / 3)


def test_the_order_of_the_events_does_not_matter() -> None:
    events = [STEP, *FORWARD, Event(f"{NODE}AddmmBackward0", 410, 500, sequence=6, forward_thread=1)]
    shuffled = events[:]
    random.Random(0).shuffle(shuffled)
    assert attribute(shuffled, MODULES) == attribute(events, MODULES)


def test_a_hundred_thousand_events_take_less_than_ten_seconds() -> None:
    def step(number: int) -> list[Event]:
        at = 2000 * number
        moved = [replace(each, start=each.start + at, end=each.end + at) for each in (STEP, *FORWARD)]
        return [*moved, Event("gloo:all_reduce", at + 500, at + 900, is_async=True)]

    events = [event for number in range(100_000 // 9 + 1) for event in step(number)]
    assert len(events) >= 100_000
    begun = time.process_time()
    attribute(events, MODULES)
    assert time.process_time() - begun < 10
