"""Ensembles of runs: what is averaged, what is said of it, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mil.errors import RunError
from mil.evaluation.averaging import Averaging, combine
from mil.experiments.crossval import train
from mil.runs.ensemble import make_ensemble, over_members, read_ensemble
from mil.runs.folders import is_ensemble
from mil.runs.run_folder import RunFolder
from mil.runs.saved_outcomes import read_outcomes
from mil.statistics import classification as statistics
from tests.test_mil.small import make_cohort, make_store

COHORT = make_cohort(18)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same slides by other heads and folds."""
    folder, store = tmp_path_factory.mktemp("runs"), make_store(COHORT)
    for head, folds in (("mean", 3), ("max", 2)):
        train(store, COHORT, head=head, folds=folds, seeds=1, epochs=2, device="cpu").save(folder / head)
    return [folder / "mean", folder / "max"]


def test_a_run_with_itself_is_itself() -> None:
    rng = np.random.default_rng(0)
    values = rng.dirichlet(np.ones(3), 20)
    for average in ("probabilities", "logits"):
        np.testing.assert_allclose(combine([values, values, values], average), values, rtol=1e-12)


def test_means_are_arithmetic_and_geometric() -> None:
    members = [np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])]
    np.testing.assert_allclose(combine(members), [[0.7, 0.3]])
    geometric = np.sqrt([0.45, 0.05])
    np.testing.assert_allclose(combine(members, "logits"), [geometric / geometric.sum()])
    assert np.isfinite(combine([np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])], "logits")).all()


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_the_order_of_members_does_not_matter(runs: list[Path], average: str) -> None:
    one, other = make_ensemble(runs, average), make_ensemble(runs[::-1], average)
    np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-12)
    members = [read_outcomes(RunFolder.open(run)).predicted for run in runs]
    np.testing.assert_allclose(one.probabilities, combine(members, average), rtol=1e-8)


def test_slides_and_classes_are_matched_by_name(runs: list[Path], tmp_path: Path) -> None:
    turned = tmp_path / "turned"
    shutil.copytree(runs[1], turned)
    lines = (turned / "oof.csv").read_text().splitlines()
    (turned / "oof.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    lines = (turned / "predictions.csv").read_text().splitlines()
    rows = [line.split(",") for line in [lines[0], *lines[:0:-1]]]
    # the last two columns are those of the classes
    (turned / "predictions.csv").write_text("\n".join(",".join([*row[:-2], *row[:-3:-1]]) for row in rows) + "\n")
    metrics = json.loads((turned / "metrics.json").read_text())
    metrics["class_names"].reverse()
    (turned / "metrics.json").write_text(json.dumps(metrics))
    found, expected = make_ensemble([runs[0], turned]), make_ensemble(runs)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-12)


def test_gains_are_paired_with_each_member(runs: list[Path]) -> None:
    made = make_ensemble(runs)
    found = statistics.evaluate(COHORT.labels, made.probabilities, COHORT.patient_ids, COHORT.class_names)
    assert made.metrics["out_of_fold"] == found
    for run, member in zip(runs, made.metrics["members"], strict=True):
        alone = json.loads((run / "metrics.json").read_text())["out_of_fold"]["macro_f1"]
        assert member["macro_f1"] == alone
        expected = found["macro_f1"]["value"] - alone["value"]
        assert member["gain_macro_f1"]["difference"] == pytest.approx(expected)


def test_what_is_saved_comes_back_and_is_a_look(runs: list[Path], tmp_path: Path) -> None:
    made = make_ensemble(runs, "logits")
    folder = made.save(tmp_path / "both")
    assert is_ensemble(folder)
    assert not is_ensemble(runs[0])
    assert read_ensemble(folder) == (tuple(runs), Averaging("logits"))
    np.testing.assert_allclose(read_outcomes(RunFolder.open(folder)).predicted, made.probabilities, rtol=1e-8)
    assert json.loads((folder / "metrics.json").read_text())["looks"] == 1
    made.save(folder)
    assert json.loads((folder / "metrics.json").read_text())["looks"] == 2


def test_new_slides_are_predicted_by_every_member(runs: list[Path], tmp_path: Path) -> None:
    members = read_ensemble(make_ensemble(runs).save(tmp_path / "both"))
    values = {runs[0]: np.array([[0.8, 0.2]]), runs[1]: np.array([[0.2, 0.8]])}
    ids, mean = over_members(*members, lambda run: (("new",), values[run]))
    assert ids == ("new",)
    np.testing.assert_allclose(mean, [[0.5, 0.5]])
    with pytest.raises(RunError, match="other slides"):
        over_members(*members, lambda run: ((run.name,), values[run]))


def test_what_is_no_ensemble_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="two or more different runs"):
        make_ensemble(runs[:1])
    with pytest.raises(RunError, match="two or more different runs"):
        make_ensemble([runs[0], runs[0]])
    with pytest.raises(RunError, match=r"metrics\.json cannot be read"):
        make_ensemble([runs[0], tmp_path])
    sweep = shutil.copytree(runs[1], tmp_path / "sweep")
    metrics = json.loads((sweep / "metrics.json").read_text())
    (sweep / "metrics.json").write_text(json.dumps(metrics | {"sweep": {}}))
    with pytest.raises(RunError, match=r"sweep, a sweep, .*best\.yaml"):
        make_ensemble([runs[0], sweep])
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "model.json").touch()
    with pytest.raises(RunError, match="averaged before they are packed"):
        make_ensemble([runs[0], tmp_path / "packed"])
    smaller = make_cohort(12)
    other = train(make_store(smaller), smaller, head="mean", folds=2, seeds=1, epochs=1, device="cpu")
    other.save(tmp_path / "other")
    with pytest.raises(RunError, match="same slides, patients and labels"):
        make_ensemble([runs[0], tmp_path / "other"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(RunError, match=r"'notes\.txt'"):
        make_ensemble(runs).save(tmp_path / "full")


def test_members_of_other_classes_are_refused(runs: list[Path], tmp_path: Path) -> None:
    other = replace(COHORT, target="grade", class_names=tuple(f"G{at}" for at in range(len(COHORT.class_names))))
    train(make_store(COHORT), other, head="mean", folds=2, seeds=1, epochs=1, device="cpu").save(tmp_path / "grade")
    with pytest.raises(
        RunError,
        match=r"target subtype \(classes .*target grade \(classes 'G0', 'G1'\) → ",
    ):
        make_ensemble([runs[0], tmp_path / "grade"])


def test_a_member_that_has_gone_is_named(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[1], tmp_path / "gone")
    folder = make_ensemble([runs[0], tmp_path / "gone"]).save(tmp_path / "both")
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(RunError, match="gone' has gone"):
        read_ensemble(folder)
    (folder / "ensemble.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        read_ensemble(folder)
