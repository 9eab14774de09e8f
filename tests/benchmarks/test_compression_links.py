"""The benchmark of links runs, and its arithmetic is right."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import compression_links
from tests.benchmarks._links_methods import DDP_CAP_MB, Method, Transformer
from tests.benchmarks._links_rank import RankReport, Sample
from tests.benchmarks._links_report import Target, figures
from tests.support.collectives import Collective


def _collective(op: str, nbytes: int) -> Collective:
    return Collective(op, nbytes // 4, "Float", nbytes, thread_id=1, time_ns=1, group="default")


def _report(ddp: list[float], acp: list[float]) -> RankReport:
    samples: dict[tuple[str | None, str], Sample] = {
        (None, "ddp"): Sample(ddp, ddp, [9.0] * 3),
        (None, "acp_sgd:4"): Sample(acp, acp, [3.0] * 3),
    }
    two_steps = {
        "ddp": [_collective("all_reduce", 800)] * 4,
        "acp_sgd:4": [_collective("all_reduce", 80), _collective("all_gather", 40)],
    }
    return RankReport(samples, two_steps, parameters=400)


@pytest.mark.netlab
@pytest.mark.distributed
@pytest.mark.slow
def test_quick_measures_all_sections_and_writes_both_files(tmp_path: Path) -> None:
    assert compression_links.main(["--quick", "--out", str(tmp_path)]) == 0
    (data,) = tmp_path.glob("compression_links_*core_cpu_*.json")
    raw = json.loads(data.read_text())
    links = raw["links"]
    # Plain DDP hands over each gradient once; nothing is sent without communication.
    assert links["payload"]["ddp"] == 4 * links["parameters"]
    assert links["payload"]["no_communication"] == 0
    assert links["payload"]["acp_sgd:4"] < links["payload"]["torch_power_sgd:4"] < links["payload"]["ddp"] / 10
    # Headers and acknowledgements of real TCP come on top of the formula.
    for method in ("ddp", "torch_power_sgd:4", "acp_sgd:4"):
        assert 1.0 < links["tx_bytes"][f"200mbit {method}"] / links["wire"][method] < 1.2
    assert set(raw["memory_in_gradient_sizes"]) == {"ddp", "torch_power_sgd:4", "acp_sgd:4"}
    page = data.with_suffix(".md").read_text()
    assert "--quick" in page
    assert "| `acp_sgd:4` |" in page


def test_the_transformer_has_the_parameters_the_tables_say() -> None:
    assert sum(p.numel() for p in Transformer().parameters()) == pytest.approx(5.26e6, rel=0.001)


def test_ratios_are_medians_over_rounds_of_the_slowest_rank() -> None:
    # The machine slowed down in round 3 for both methods: their ratio did not.
    fast, slow = _report([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]), _report([4.0, 4.0, 40.0], [1.0, 1.0, 10.0])
    joined = figures([fast, slow])
    assert joined.seconds[None, "ddp"] == [4.0, 4.0, 40.0]
    assert joined.speedup(None, "ddp", "acp_sgd:4") == 4.0
    assert joined.speedup("100mbit", "ddp", "acp_sgd:4") is None
    assert joined.cpu_added(None, "ddp", "acp_sgd:4") == 2.0


def test_wire_bytes_follow_the_ring() -> None:
    joined = figures([_report([1.0] * 3, [1.0] * 3)] * 4)
    assert joined.payload == {"ddp": 1600, "acp_sgd:4": 60}
    assert joined.wire == {"ddp": 1600 * 1.5, "acp_sgd:4": 40 * 1.5 + 20 * 3}


@pytest.mark.parametrize(
    ("value", "bound", "at_least", "verdict"),
    [
        (1.5, 1.5, True, "met"), (1.4, 1.5, True, "MISSED"), (1.2, 1.2, False, "met"),
        (1.3, 1.2, False, "MISSED"), (None, 1.0, True, "not measured"),
    ],
)  # fmt: skip
def test_a_target_is_met_missed_or_not_measured(
    value: float | None, bound: float, at_least: bool, verdict: str
) -> None:
    assert Target("claim", value, bound, at_least).verdict == verdict


def test_method_names_are_read() -> None:
    assert Method.parse("acp_sgd:32@1000") == Method("acp_sgd:32@1000", "acp_sgd", 32, 1000.0)
    assert Method.parse("ddp") == Method("ddp", "ddp", 0, DDP_CAP_MB)
    assert Method.parse("torch_power_sgd").rank == 4


@pytest.mark.parametrize("name", ["acp", "top_k:4", "acp_sgd:x", ""])
def test_unknown_methods_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="method"):
        Method.parse(name)
