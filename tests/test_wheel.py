"""The wheel holds the packages, their data and their facts, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGES = ("mil", "extract", "aggregators")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "tests", "benchmarks"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, cwd=target, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_it_is_a_pure_wheel_of_the_distribution(wheel: Path):
    assert wheel.name.startswith("tessera_mil-")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_it_holds_every_module_and_data_file_and_nothing_else(names: set[str]):
    wanted = ("*.py", "py.typed", "templates/*.html")
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for pattern in wanted
        for path in (REPOSITORY / package).rglob(pattern)
    }
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed
    assert {"extract/store/formats/zarr_store.py", "mil/cli/main.py", "aggregators/abmil.py"} <= packed
    assert any(name.startswith("mil/visualization/templates/") and name.endswith(".html") for name in packed)
    assert {name.split("/")[0] for name in packed} == set(PACKAGES)


def test_its_metadata_say_what_it_is(wheel: Path, names: set[str]):
    info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Name"] == "tessera-mil"
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.14"}
    assert entry_points.split() == ["[console_scripts]", "mil", "=", "mil.cli.start:main"]
    assert any(name.startswith(f"{info}/") and name.endswith("LICENSE") for name in names)
    assert metadata.get_payload().strip(), "the README is the long description"
    assert {"report", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_the_packages_import_from_the_wheel_alone(wheel: Path, tmp_path: Path):
    code = f"""
import sys
sys.path.insert(0, {str(wheel)!r})
import extract.store, aggregators, mil
print(extract.store.__file__, aggregators.__file__, mil.__file__)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(place.startswith(str(wheel)) for place in done.stdout.split())
