"""A disk that is full while results are written: said so, and nothing is left, whatever was written."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mil.config.compose import compose_config
from mil.deployment.artefact import write_artefact
from mil.deployment.external import evaluate_external
from mil.deployment.onnx_export import export_onnx
from mil.errors import RunError
from mil.experiments.benchmark import benchmark
from mil.experiments.crossval import cross_validate, train
from mil.reports.rescore import score_runs
from mil.runs.ensemble import make_ensemble
from mil.runs.look_ledger import LEDGER
from mil.runs.run import Run
from mil.tuning.sweep import sweep
from tests.test_mil.small import make_cohort, make_store

COHORT = make_cohort()
Save = Callable[[Path], object]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two runs, saved."""
    home, options = tmp_path_factory.mktemp("runs"), {"folds": 2, "seeds": 1, "epochs": 1, "device": "cpu"}
    return [train(make_store(COHORT), COHORT, head=head, **options).save(home / head) for head in ("mean", "max")]


@pytest.fixture(params=["run", "ensemble", "scores", "external cohort", "artefact", "onnx"])
def save(request: pytest.FixtureRequest, runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Writes a folder of results."""
    folders = [run.folder for run in runs if run.folder is not None]
    match request.param:
        case "run":
            return runs[0].save
        case "ensemble":
            return make_ensemble(folders).save
        case "scores":
            return score_runs(folders).save
        case "external cohort":
            labels = tmp_path_factory.mktemp("labels") / "labels.csv"
            rows = zip(COHORT.slide_ids, COHORT.patient_ids, COHORT.labels, strict=True)
            lines = ["slide_id,patient_id,subtype", *(f"{s},{p},{COHORT.class_names[label]}" for s, p, label in rows)]
            labels.write_text("\n".join(lines))
            return evaluate_external(folders[0], make_store(COHORT), labels, device="cpu", overlap="mark").save
        case "artefact":
            return lambda folder: write_artefact(folder, {"target": "subtype"}, {"checkpoints/a": b"weights"})
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    return lambda folder: export_onnx(folders[0], folder)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["os.fsync", "pathlib.Path.rename"])
def test_a_full_disk_is_told_and_leaves_nothing(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(at, full)
        with pytest.raises(RunError, match=r"got .*No space left on device.* → free some space or choose another"):
            save(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {LEDGER}
    save(tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    assert {path.name for path in tmp_path.iterdir()} <= {LEDGER, "out"}


@pytest.mark.parametrize("what", ["board", "sweep", "training"])
def test_what_is_written_on_the_way_is_told_too(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, out = make_store(COHORT), tmp_path / "out"
    options = {"folds": 2, "seeds": 1, "epochs": 1, "device": "cpu"}
    begin: dict[str, Callable[[], object]] = {
        "board": lambda: benchmark([store], COHORT, ["mean"], out, **options),
        "sweep": lambda: sweep(store, COHORT, {"optimizer.lr": [0.01, 0.001]}, out, head="mean", **options),
        "training": lambda: cross_validate(store, COHORT, compose_config(values=options), unfinished=out),
    }
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"got .*No space left on device.* → free some space or choose another"):
        begin[what]()
