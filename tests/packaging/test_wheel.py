"""The wheel holds what an installed package needs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / done.stdout.strip().splitlines()[-1])


def test_every_recipe_ships_inside_the_package(wheel: zipfile.ZipFile) -> None:
    recipes = {
        f"lightning_efficient/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.yaml")
    }
    assert "lightning_efficient/recipes/quickstart.yaml" in recipes
    assert recipes <= set(wheel.namelist())


def test_every_module_ships_and_nothing_beside_the_package(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_efficient").rglob("*.py")} <= names
    assert "lightning_efficient/py.typed" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"lightning_efficient"}


def test_the_command_and_the_license_ship(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "lightning-efficient = lightning_efficient.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
