"""Importing the packages is light: what is heavy or optional is loaded when it is used."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

WEB_SERVERS = {"starlette", "uvicorn", "fastapi", "flask", "tornado", "aiohttp", "websockets", "http.server"}
HEAVY = {"openslide", "timm", "ray", "matplotlib", "jinja2", "hydra", "omegaconf"} | WEB_SERVERS


def loaded(statement: str) -> set[str]:
    """Names of all modules in a fresh interpreter after a statement."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_mil_loads_nothing_heavy():
    assert loaded("import mil") & HEAVY == set()


@pytest.mark.parametrize("module", ["extract", "extract.store", "extract.geometry", "extract.errors"])
def test_importing_the_store_loads_neither_torch_nor_slide_readers(module: str):
    assert loaded(f"import {module}") & (HEAVY | {"torch", "zarr", "skimage", "PIL"}) == set()


def test_importing_aggregators_loads_no_readers():
    assert loaded("import aggregators") & (HEAVY | {"zarr", "extract", "mil"}) == set()


def test_a_module_that_is_loaded_is_seen():
    assert {"openslide", "extract.slides.slide"} <= loaded("import extract.slides.slide, openslide")
    assert "hydra" in loaded("import hydra")


def test_lazy_names_load_what_they_need():
    assert "torch" in loaded("import extract; extract.run_extraction")
    assert "torch" not in loaded("import extract; extract.open_store")
