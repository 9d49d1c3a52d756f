"""A metrics.json that is not one is told by every command that reads it, never by a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mil.deployment.model import load_model
from mil.deployment.packing import pack
from mil.errors import RunError
from mil.experiments.compare import compare_runs
from mil.experiments.crossval import train
from mil.experiments.leaderboard import Entrant
from mil.reports.report import write_report
from mil.reports.rescore import score_runs
from mil.runs.ensemble import make_ensemble
from mil.runs.run_folder import RunFolder, read_predictions
from mil.runs.saved_outcomes import read_outcomes
from tests.test_mil.small import make_cohort, make_store

READERS: dict[str, Callable[[Path, Path], object]] = {
    "predictions": lambda run, other: read_predictions(run),
    "outcomes": lambda run, other: read_outcomes(RunFolder.open(run)),
    "compare": lambda run, other: compare_runs([other, run]),
    "ensemble": lambda run, other: make_ensemble([other, run]),
    "pack": lambda run, other: pack(run, run.parent / "model"),
    "model": lambda run, other: load_model(run),
    "report": lambda run, other: write_report(run),
    "score": lambda run, other: score_runs([run]),
    "board": lambda run, other: Entrant.of_run("max", "tiny", run, "runs/max"),
}
BROKEN = {
    "cut": b'{"target": "subty',
    "no text": b"\xff\xfe\x00",
    "list": b"[]",
    "empty": b"{}",
    "null": b"null",
    "deep": b"[" * 100_000,
    "deep value": b'{"target": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}
WRONG: dict[str, Any] = {
    "target": ["subtype"],
    "class_names": "abc",
    "per_replica": {"a": 1},
    "out_of_fold": "good",
    "head": None,
    "task": 3,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, cohort = tmp_path_factory.mktemp("runs"), make_cohort()
    for head in ("max", "mean"):
        train(make_store(cohort), cohort, head=head, folds=2, seeds=1, epochs=1, device="cpu").save(folder / head)
    return [folder / "max", folder / "mean"]


@pytest.fixture
def runs(trained: list[Path], tmp_path: Path) -> tuple[Path, Path]:
    for name in ("run", "other"):
        shutil.copytree(trained[name == "other"], tmp_path / name)
    return tmp_path / "run", tmp_path / "other"


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_is_no_metrics_is_told(read: Callable[[Path, Path], object], content: bytes, runs: tuple[Path, Path]):
    (runs[0] / "metrics.json").write_bytes(content)
    with pytest.raises(RunError, match=r"→.*→") as error:
        read(*runs)
    assert str(runs[0]) in str(error.value)


@pytest.mark.parametrize("key", WRONG)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_values_of_a_wrong_type_are_told(read: Callable[[Path, Path], object], key: str, runs: tuple[Path, Path]):
    path = runs[0] / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: WRONG[key]}))
    with pytest.raises(RunError, match=f"with {key} .*→ expected") as error:
        read(*runs)
    assert str(path) in str(error.value)


KEYS = (*WRONG, "entry", "created", "versions", "cohort", "warnings", "looks", "synthetic", "n_replicas", "split")


@pytest.mark.parametrize("key", [*KEYS, "seed_macro_f1", "calibration", "key"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_an_older_run_lacks_is_told_or_not_needed(
    read: Callable[[Path, Path], object], key: str, runs: tuple[Path, Path]
):
    path = runs[0] / "metrics.json"
    metrics = json.loads(path.read_text())
    del metrics[key]
    path.write_text(json.dumps(metrics))
    try:
        read(*runs)
    except RunError as error:
        assert str(runs[0]) in str(error)  # noqa: PT017
        assert key in str(error) or "cannot be read" in str(error)  # noqa: PT017


def test_a_folder_without_one_is_none(tmp_path: Path):
    assert RunFolder.find(tmp_path) is None
