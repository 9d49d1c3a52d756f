"""A checkpoint that has seen slides or patients of a cohort starts no training on it."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from mil.crossval import cross_validate
from mil.errors import CheckpointError
from mil.initial import check_initial
from mil.packing import pack
from tests.test_mil.small import fast_config, make_cohort, make_store

COHORT = make_cohort(8, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("initial") / "run"
    cross_validate(make_store(COHORT), COHORT, fast_config("folds=2", "seeds=1", "epochs=1")).save(folder)
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Path:
    return pack(run, run.parent / "model").folder


def check(folder: Path, slides: list[str], patients: list[str]) -> None:
    config = fast_config(f"init={folder / 'checkpoints' / 'fold0-seed0.safetensors'}")
    check_initial(replace(config, store=Path("elsewhere.zarr"), target="another"), slides, patients)


@pytest.mark.parametrize("kind", ["run", "model"])
def test_slides_and_patients_of_its_training_are_refused(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # moved, so that nothing but what lies beside the checkpoint can tell
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"trained on 1 slides.*'cohort b/SLIDE 03.svs'"):
        check(folder, ["new", "cohort b/SLIDE 03.svs"], ["q0", "q1"])
    with pytest.raises(CheckpointError, match="'p3'"):
        check(folder, ["new", "newer"], ["q0", "p3"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(folder, ["new", "newer"], ["q0", "q1"])
        check_initial(fast_config(), COHORT.slide_ids, COHORT.patient_ids)


def test_a_training_on_the_same_slides_does_not_begin(run: Path) -> None:
    config = fast_config(f"init={run / 'checkpoints' / 'fold0-seed0.safetensors'}", "folds=2", "seeds=1", "epochs=1")
    store = make_store(COHORT)
    store.path = Path("moved.zarr")
    with pytest.raises(CheckpointError, match="that it has learned"):
        cross_validate(store, replace(COHORT, target="grade"), config)


def test_a_checkpoint_on_its_own_is_warned_of(run: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "alone" / "checkpoints")
    with pytest.warns(UserWarning, match="nothing beside it says which slides"):
        check(tmp_path / "alone", ["slide 03"], ["p3"])
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / "training_cohort.json").write_text(json.dumps([]))
    with pytest.warns(UserWarning, match="nothing beside it says which slides"):
        check(damaged, ["slide 03"], ["p3"])
