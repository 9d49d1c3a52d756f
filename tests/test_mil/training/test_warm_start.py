"""A checkpoint that has seen slides or patients of a cohort starts no training on it."""

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mil.deployment.packing import pack
from mil.errors import CheckpointError
from mil.experiments.crossval import cross_validate
from mil.experiments.warm_start import check_initial
from mil.runs.lineage import read_lineage
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


def grow(start: Path, folder: Path, name: str) -> Path:
    """A run on slides of its own, begun from the first checkpoint of another."""
    cohort = replace(
        COHORT,
        slide_ids=tuple(f"{name} {at}" for at in range(len(COHORT))),
        patient_ids=tuple(f"{name}{at}" for at in range(len(COHORT))),
    )
    init = f"init={start / 'checkpoints' / 'fold0-seed0.safetensors'}"
    config = fast_config("folds=2", "seeds=1", "epochs=1", init)
    return cross_validate(make_store(cohort), cohort, config).save(folder / name).folder or folder


@pytest.fixture
def line(run: Path, tmp_path: Path) -> list[Path]:
    """Three runs, each grown from the one before."""
    first = shutil.copytree(run, tmp_path / "first")
    second = grow(first, tmp_path, "b")
    return [first, second, grow(second, tmp_path, "c")]


def refused(folder: Path, slides: Sequence[str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        check(folder, ["new", *slides], ["q"] * (1 + len(slides)))


def test_slides_of_every_training_in_the_line_are_refused(line: list[Path], tmp_path: Path) -> None:
    for slide, words in (("c 3", "which was trained"), ("b 3", "grew from"), ("slide 03", "grew from")):
        refused(line[-1], [slide], words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(line[-1], ["new"], ["q"])
    with pytest.raises(CheckpointError, match="'p3'"):
        check(line[-1], ["new"], ["p3"])
    assert len(read_lineage(line[-1]).cohorts) == 3


def test_a_packed_model_keeps_the_whole_line(line: list[Path], tmp_path: Path) -> None:
    model = pack(line[-1], tmp_path / "model").folder
    for folder in line:
        shutil.rmtree(folder)
    for slide in ("c 3", "b 3", "slide 03"):
        refused(model, [slide], "trained on 1 slides")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, ["new"], ["q"])
    later = grow(model, tmp_path, "d")
    refused(later, ["slide 03"], "grew from")


def test_a_line_that_breaks_off_is_warned_of(line: list[Path], tmp_path: Path) -> None:
    shutil.rmtree(line[0])
    with pytest.warns(UserWarning, match=r"which grew from .*first.*figures will be too good"):
        check(line[-1], ["new", "slide 03"], ["q", "q"])
    refused(line[-1], ["b 3"], "grew from")
    packed = pack(line[-1], tmp_path / "model")
    assert any("fold0-seed0.safetensors" in text for text in packed.record["warnings"])
    assert str(tmp_path).encode() not in (packed.folder / "training_cohort.json").read_bytes()
    with pytest.warns(UserWarning, match="which grew from fold0-seed0"):
        check(packed.folder, ["new"], ["q"])


def test_a_run_that_was_put_in_the_place_of_the_first_tells_nothing_of_it(line: list[Path]) -> None:
    metrics = json.loads((line[0] / "metrics.json").read_text())
    (line[0] / "metrics.json").write_text(json.dumps(metrics | {"created": "2999-01-01T00:00:00+00:00"}))
    with pytest.warns(UserWarning, match="which grew from .*first"):
        check(line[-1], ["new"], ["q"])


def test_runs_that_name_each_other_end_the_line(line: list[Path]) -> None:
    for path in (line[0] / "checkpoints").glob("*.json"):
        record = json.loads(path.read_text())
        record["config"]["init"] = str(line[1] / "checkpoints" / "fold0-seed0.safetensors")
        path.write_text(json.dumps(record))
    for folder in line:
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(metrics | {"created": "2026-01-01T00:00:00+00:00"}))
    found = read_lineage(line[-1])
    assert (len(found.cohorts), len(found.unknown)) == (3, 1)


def test_a_model_of_before_says_that_it_does_not_know(line: list[Path], tmp_path: Path) -> None:
    model = pack(line[1], tmp_path / "model").folder
    plain = json.loads((model / "training_cohort.json").read_text())
    (model / "training_cohort.json").write_text(json.dumps({key: plain[key] for key in ("salt", "slides", "patients")}))
    assert read_lineage(model).unknown == ("fold0-seed0.safetensors",)
