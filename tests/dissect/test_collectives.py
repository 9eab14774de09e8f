"""Times of collectives: what is derived from them, the line through them, and real ranks that agree."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_efficient.dissect import (
    AlphaBeta,
    Collective,
    CollectivePoint,
    CommReport,
    bus_factor,
    fit,
    from_json,
    predict_step,
    sweep,
    to_json,
)
from lightning_efficient.dissect.collectives import OPS
from tests.support.ranks import rank_outcomes, run_ranks

SIZES = [2**power for power in range(10, 24)]


@pytest.mark.parametrize(
    ("op", "factor"),
    [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75), ("all_to_all", 0.75), ("broadcast", 1.0)],
)
def test_bus_bandwidth_of_four_ranks(op: str, factor: float) -> None:
    point = CollectivePoint(op, n_bytes=8_000_000, seconds=0.002, world_size=4)
    assert point.algbw == 4e9
    assert point.busbw == pytest.approx(factor * 4e9)
    assert bus_factor(op, 4) == factor


def points(line: AlphaBeta, sizes: list[int] = SIZES) -> list[CollectivePoint]:
    return [CollectivePoint("all_reduce", size, line.predict(size), 2) for size in sizes]


@given(st.floats(1e-6, 1e-2), st.floats(1e-11, 1e-7))
def test_the_fit_recovers_a_planted_line(alpha_s: float, beta_s_per_byte: float) -> None:
    found = fit(points(AlphaBeta(alpha_s, beta_s_per_byte)))
    # Within what the times of these sizes tell of either: a term below a millionth of all times is lost in rounding.
    assert found.alpha_s == pytest.approx(alpha_s, rel=1e-4, abs=1e-5 * beta_s_per_byte * SIZES[0])
    assert found.beta_s_per_byte == pytest.approx(beta_s_per_byte, rel=1e-4, abs=1e-5 * alpha_s / SIZES[-1])
    assert found.residual < 1e-5


def test_sizes_that_were_disturbed_do_not_bend_the_line() -> None:
    line = AlphaBeta(3e-4, 8e-9)
    disturbed = points(line)
    for at, factor in ((0, 0.5), (5, 3.0), (9, 1.7)):
        disturbed[at] = CollectivePoint("all_reduce", disturbed[at].n_bytes, factor * disturbed[at].seconds, 2)
    found = fit(disturbed)
    assert found.alpha_s == pytest.approx(line.alpha_s, rel=0.01)
    assert found.beta_s_per_byte == pytest.approx(line.beta_s_per_byte, rel=0.01)
    assert found.residual > 0.1  # and yet it says that the points do not lie on it


@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=8))
def test_neither_term_is_ever_negative(seconds: list[float]) -> None:
    found = fit([CollectivePoint("broadcast", 4**n, t, 2) for n, t in enumerate(seconds, start=5)])
    assert found.alpha_s >= 0
    assert found.beta_s_per_byte >= 0
    assert found.alpha_s + found.beta_s_per_byte > 0


def test_a_step_takes_the_sum_of_its_collectives() -> None:
    fits = {"all_reduce": AlphaBeta(1e-3, 1e-8), "all_gather": AlphaBeta(2e-3, 1e-8)}
    step = [Collective("all_reduce", 1_000_000, 3, 0.1), Collective("all_gather", 500_000, 1, 0.1)]
    # An all-gather of 4 ranks has a result of 2 MB.
    assert predict_step(fits, step, world_size=4) == pytest.approx(3 * (1e-3 + 1e-2) + (2e-3 + 2e-2))
    with pytest.raises(ValueError, match="no line for broadcast"):
        predict_step(fits, [Collective("broadcast", 1, 1, 1.0)], world_size=4)


def swept(rank: int, world_size: int) -> CommReport:
    return sweep(sizes=[1000, 65_536], repeats=2)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_on_every_collective(world_size: int) -> None:
    reports = run_ranks(swept, world_size)
    first = reports[0]
    assert all(report == first for report in reports)
    assert {each.op for each in first.points} | first.unsupported.keys() == set(OPS)
    assert {"all_reduce", "all_gather", "broadcast"} <= {each.op for each in first.points}
    for each in first.points:
        assert each.n_bytes % (4 * world_size) == 0
        assert 0 < each.seconds < 5
    assert {each.n_bytes for each in first.points if each.op == "all_reduce"} == {
        -(-size // (4 * world_size)) * 4 * world_size for size in (1000, 65_536)
    }
    assert from_json(CommReport, to_json(first)) == first  # the lines too, as lines


class OnlyTwo(dist.ProcessGroup):
    """A process group written in Python, as vendors do, that lacks most collectives."""

    def __init__(self, gloo: dist.ProcessGroup, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self._gloo = gloo

    def getBackendName(self) -> str:
        return "only_two"

    def allreduce(self, tensors: list[Tensor], options: object) -> dist.Work:
        return self._gloo.allreduce(tensors, options)

    def broadcast(self, tensors: list[Tensor], options: object) -> dist.Work:
        return self._gloo.broadcast(tensors, options)


def swept_with_two(rank: int, world_size: int, folder: str) -> CommReport:
    def create(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.ProcessGroup:
        return OnlyTwo(dist.ProcessGroupGloo(store, rank, world_size, timeout), rank, world_size)

    dist.Backend.register_backend("only_two", create, devices=["cpu"])
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("only_two", store=store, rank=rank, world_size=world_size)
    return sweep(sizes=[1024, 4096], repeats=1)


@pytest.mark.distributed
def test_what_a_backend_lacks_is_reported_with_the_reason(tmp_path: Path) -> None:
    first, second = run_ranks(swept_with_two, 2, str(tmp_path), group=False)
    assert first == second
    assert {each.op for each in first.points} == set(first.fits) == {"all_reduce", "broadcast"}
    assert set(first.unsupported) == {"all_gather", "reduce_scatter", "all_to_all"}
    assert all("only_two does not support it" in why for why in first.unsupported.values())


def within_budget(rank: int, world_size: int) -> tuple[list[int], float]:
    begin = time.perf_counter()
    report = sweep(ops=["all_reduce"], sizes=[4**n for n in range(5, 15)], repeats=3, budget_s=0.1)
    return [each.n_bytes for each in report.points], time.perf_counter() - begin


@pytest.mark.distributed
def test_a_budget_leaves_out_large_sizes_on_all_ranks_alike() -> None:
    (sizes, seconds), (others, _) = run_ranks(within_budget, 2)
    assert sizes == others
    assert 2 <= len(sizes) < 10
    assert seconds < 10


def dies(rank: int, world_size: int) -> None:
    dist.barrier()
    if rank == 1:
        os._exit(7)
    sweep(ops=["all_reduce"], sizes=[1 << 20], repeats=100, timeout_s=5)


@pytest.mark.distributed
def test_a_rank_that_is_gone_is_an_error_and_no_hang() -> None:
    begin = time.monotonic()
    outcomes = rank_outcomes(dies, 2, timeout=60)
    assert time.monotonic() - begin < 40
    assert "a rank is gone or the network is stuck" in str(outcomes[0])


def refused(rank: int, world_size: int) -> list[str]:
    said = []
    for wrong in ({"ops": ["allreduce"]}, {"sizes": []}, {"repeats": 0}, {"sizes": [0]}, {"timeout_s": 0}):
        with pytest.raises(ValueError, match=r"no collective|bad sweep") as error:
            sweep(**wrong)  # type: ignore[arg-type]
        said.append(str(error.value))
    return said


@pytest.mark.distributed
def test_bad_arguments_are_refused_before_any_collective() -> None:
    said = run_ranks(refused, 2)[0]
    assert "There is no collective 'allreduce'" in said[0]


def alone(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="one process has no link"):
        sweep()


@pytest.mark.distributed
def test_one_rank_or_none_is_an_error() -> None:
    run_ranks(alone, 1)
    with pytest.raises(RuntimeError, match="no process group"):
        sweep()
