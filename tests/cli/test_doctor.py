"""`doctor` reports what is here, and never fails for what is not."""

import json
from importlib import metadata

import pytest
import torch

from lightning_efficient.cli import main


def test_doctor_prints_versions_and_what_is_missing_for_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0

    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out
    assert all(title in out for title in ("versions", "devices", "backends", "extras", "tools"))
    assert "netlab" in out


def test_doctor_json_agrees_with_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    versions = {finding["name"]: finding["detail"] for finding in found["versions"]}
    assert versions["lightning"] == metadata.version("lightning")
    assert {"gloo", "nccl", "triton"} == {finding["name"] for finding in found["backends"]}
    extras = {finding["name"]: finding["there"] for finding in found["extras"]}
    assert extras["test"]
    for finding in found["extras"]:
        assert finding["there"] or f"[{finding['name']}]" in finding["detail"]


def test_doctor_finds_a_tool_only_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    assert main(["doctor", "--json"]) == 0

    tools = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["tools"]}
    assert not tools["make"]["there"]
    assert tools["make"]["detail"] == "not found"
