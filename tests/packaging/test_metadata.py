"""What pyproject.toml, constraints.txt and the changelog say agrees."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import lightning_efficient

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = ("linux", "darwin")
ENVIRONMENTS = [
    {"python_version": python, "sys_platform": platform, "platform_machine": "x86_64", "extra": ""}
    for python in PYTHONS
    for platform in PLATFORMS
]


def requirements() -> Iterator[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    yield from (requirement for line in lines if (requirement := Requirement(line)).name != PROJECT["name"])


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def test_version_is_the_packages() -> None:
    assert PROJECT["version"] == lightning_efficient.__version__


def test_changelog_has_an_entry_for_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = Version(PROJECT["version"])
    heading = (
        r"## \[Unreleased\]" if version.is_devrelease else rf"## \[{re.escape(str(version))}\] - \d{{4}}-\d\d-\d\d"
    )
    entry = re.search(rf"^{heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert entry, f"no heading {heading}"
    assert re.search(r"^- ", entry[1], re.MULTILINE), "the entry lists no change"


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: f"{e['python_version']}-{e['sys_platform']}")
def test_each_dependency_has_one_pin_within_its_range(environment: dict[str, str]) -> None:
    pinned: dict[str, Version] = {}
    for pin in pins():
        if applies(pin, environment):
            (specifier,) = pin.specifier
            assert specifier.operator == "==", pin
            assert pin.name not in pinned, f"{pin.name} is pinned twice"
            pinned[pin.name] = Version(specifier.version)
    for requirement in requirements():
        if applies(requirement, environment):
            assert requirement.name in pinned, f"{requirement.name} has no pin in constraints.txt"
            assert requirement.specifier.contains(pinned[requirement.name], prereleases=True), requirement


def test_classifiers_name_the_pythons_that_the_pins_serve() -> None:
    listed = {text.rsplit(" ", 1)[1] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)}
    assert listed == set(PYTHONS)
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_hooks_fetch_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for repo in config["repos"] for hook in repo["hooks"]} == {"system"}
