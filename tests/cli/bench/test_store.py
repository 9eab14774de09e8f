import json
from pathlib import Path

import pytest

from lightning_efficient.cli.bench.store import Store, read_results
from lightning_efficient.cli.errors import UserError
from tests.dissect.report.samples import case


def filled(path: Path) -> None:
    with Store(path, "abc") as store:
        store.append(case("none"))
        store.append(case("F", status="oom", reason="no room"))


def test_results_come_back(tmp_path: Path) -> None:
    filled(tmp_path / "r.jsonl")
    with Store(tmp_path / "r.jsonl", "abc") as store:
        assert list(store.results.values()) == [case("none"), case("F", status="oom", reason="no room")]
    assert read_results(tmp_path / "r.jsonl") == list(store.results.values())


def test_the_last_line_of_a_case_counts(tmp_path: Path) -> None:
    filled(tmp_path / "r.jsonl")
    with Store(tmp_path / "r.jsonl", "abc") as store:
        store.append(case("F"))
    assert [each.status for each in read_results(tmp_path / "r.jsonl")] == ["ok", "ok"]


@pytest.mark.parametrize("cut", [1, 200])
def test_half_a_line_is_dropped_with_a_warning_and_its_case_written_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    filled(path)
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(read_results(path)) == 1
    with pytest.warns(UserWarning, match="ends in half a line"):
        store = Store(path, "abc")
    with store:
        assert list(store.results) == [case("none").case_id]
        store.append(case("F"))
    assert len(read_results(path)) == 2


def test_a_file_cut_in_its_first_line_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"kind": "light')
    with pytest.warns(UserWarning, match="half a line"):
        store = Store(path, "abc")
    with store:
        store.append(case("none"))
    assert len(read_results(path)) == 1


def test_another_sweep_is_refused_and_fresh_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    filled(path)
    with pytest.raises(UserError, match=r"another sweep.*--out, or --fresh"):
        Store(path, "other")
    with Store(path, "other", fresh=True) as store:
        assert store.results == {}
    assert len(read_results(tmp_path / "r.old.jsonl")) == 2
    Store(path, "third", fresh=True).close()
    assert len(read_results(tmp_path / "r.old.jsonl")) == 2
    assert read_results(tmp_path / "r.old2.jsonl") == []


def test_files_that_hold_nothing_or_no_text_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.touch()
    with pytest.raises(UserError, match="has only begun"):
        read_results(path)
    filled(path)
    path.write_bytes(path.read_bytes() + b"\xff\n")
    with pytest.raises(UserError, match="is damaged"):
        read_results(path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path / "r.jsonl", "abc"), pytest.raises(UserError, match="in use"):
        Store(tmp_path / "r.jsonl", "abc")
    Store(tmp_path / "r.jsonl", "abc").close()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    filled(path)
    head, *rest = path.read_text().splitlines()
    for lines, message in (
        ([json.dumps({**json.loads(head), "schema": 99}), *rest], "has schema 99, this version reads 1"),
        ([head, json.dumps({**json.loads(rest[0]), "schema": 99})], "schema 99"),
        (rest, "is no results file"),
        ([head, "{", *rest], "is damaged"),
        ([head, '{"case_id": 1, "colour": 2}'], "no CaseResult"),
    ):
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(UserError, match=message):
            Store(path, "abc")
        with pytest.raises(UserError, match=message):
            read_results(path)
    with pytest.raises(UserError, match="there is no file"):
        read_results(tmp_path / "none.jsonl")
