"""`mil compare`: the figures are those of the tests it names, and unlike runs are refused or warned of."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mil.cli import main as cli
from mil.cohort.cohort import Cohort
from mil.errors import EvaluationError, RunError
from mil.evaluation.fold_scores import differing_folds, fold_scores, mean_over_seeds, mean_test_to_train
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.evaluation.tables import out_of_fold_rows
from mil.experiments.compare import compare_runs
from mil.experiments.crossval import train
from mil.files import write_csv
from mil.runs.ensemble import make_ensemble
from mil.runs.run_folder import RunFolder
from mil.runs.saved_outcomes import read_outcomes
from mil.splits.folds import make_splits
from mil.statistics.bootstrap import Resampling
from mil.statistics.delong import delong_test
from mil.statistics.paired_tests import (
    corrected_t_test,
    holm,
    minimum_detectable_difference,
    paired_difference,
    permutation_test,
)
from mil.training.replica import Replica
from tests.test_mil.small import fast_config, make_cohort, make_store

COHORT = make_cohort(40)


def write_run(
    folder: Path,
    skill: float,
    cohort: Cohort = COHORT,
    split_seed: int = 0,
    seeds: Sequence[int] = (0, 1),
    metrics: dict[str, object] | None = None,
) -> Path:
    """A run folder as comparisons read it: four folds of a head whose probabilities are right by `skill`."""
    splits = make_splits(cohort, 4, split_seed, tuple(seeds), 0.2)
    config = fast_config("folds=4")
    replicas = tuple(Replica(fold, seed, config) for fold in range(4) for seed in seeds)
    parts = np.stack([splits.parts(each.fold, each.seed) for each in replicas])
    rng = np.random.default_rng([int(1000 * skill), len(cohort)])
    n_classes = len(cohort.class_names)
    noise = rng.dirichlet(np.ones(n_classes), (len(replicas), len(cohort)))
    predictions = ReplicaPredictions(
        cohort, replicas, parts, (1 - skill) * noise + skill * np.eye(n_classes)[cohort.labels]
    )
    folder.mkdir(parents=True)
    write_csv(folder / "predictions.csv", predictions.rows())
    write_csv(folder / "oof.csv", out_of_fold_rows(cohort, predictions.out_of_fold()))
    facts = {"target": "subtype", "class_names": list(cohort.class_names), "head": folder.name, "entry": "tiny"}
    (folder / "metrics.json").write_text(json.dumps(facts | {"looks": 1, "synthetic": False} | (metrics or {})))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A poor reference, a good run, and one about as poor."""
    folder = tmp_path_factory.mktemp("rüns")
    return [write_run(folder / name, skill) for name, skill in (("mean", 0.05), ("good", 0.45), ("alike", 0.051))]


@pytest.mark.parametrize("metric", ["macro_f1", "accuracy"])
def test_figures_are_those_of_the_tests(runs: list[Path], metric: str) -> None:
    comparison = compare_runs(runs, metric, replicates=400, seed=1)
    first, *others = (read_outcomes(RunFolder.open(folder)) for folder in runs)
    assert [row.name for row in comparison.rows] == ["mean", "good", "alike"]
    assert (comparison.n_slides, comparison.n_patients, comparison.target) == (80, 40, "subtype")
    expected_p = []
    for row, found in zip(comparison.rows[1:], others, strict=True):
        both = (found.cohort.labels, found.predicted, first.predicted, found.patient_ids, metric)
        pair = paired_difference(*both, resampling=Resampling(400, seed=1))
        assert (row.difference.value, row.difference.low, row.difference.high) == pytest.approx(pair)
        assert row.value.value - comparison.rows[0].value.value == pytest.approx(pair.difference)
        assert row.p == permutation_test(*both, resamples=400, seed=1)
        assert row.detectable == minimum_detectable_difference(*both, resampling=Resampling(400, seed=1))
        scores = (found.predicted[:, 1], first.predicted[:, 1])
        assert row.p_delong == delong_test(found.cohort.labels, *scores, found.patient_ids).p
        expected_p.append(row.p)
    assert [row.p_holm for row in comparison.rows[1:]] == holm(expected_p)
    assert [row.verdict for row in comparison.rows] == ["reference", "better", "no difference shown"]
    assert compare_runs(runs[1::-1], metric, replicates=400).rows[1].verdict == "worse"


def test_the_t_test_pairs_test_folds_and_averages_seeds(runs: list[Path]) -> None:
    row = compare_runs(runs[:2], "macro_f1", replicates=50).rows[1]
    scores = [fold_scores(RunFolder.open(folder).predictions()) for folder in runs[:2]]
    folds = [mean_over_seeds(each, "macro_f1") for each in scores]
    assert len(folds[0]) == 4
    assert len(scores[0]) == 8
    differences = [folds[1][test] - folds[0][test] for test in folds[0]]
    assert row.p_t_test == pytest.approx(corrected_t_test(differences, mean_test_to_train(scores[0])).p)
    assert 0.25 < mean_test_to_train(scores[0]) < 0.6


def test_fold_scores_are_those_of_the_training(tmp_path: Path) -> None:
    cohort = make_cohort(18)
    options = {"folds": 3, "seeds": 2, "epochs": 2, "device": "cpu"}
    run = train(make_store(cohort), cohort, head="mean", **options).save(tmp_path / "one")
    train(make_store(cohort), cohort, head="max", **options).save(tmp_path / "two")
    scores = fold_scores(RunFolder.open(tmp_path / "one").predictions())
    for each, expected in zip(scores, run.metrics["per_replica"], strict=True):
        assert each.replica.name == expected["replica"]
        assert each.n_train == expected["training_bags"]
        for metric in ("macro_f1", "balanced_accuracy", "auroc"):
            assert each.score(metric) == pytest.approx(expected[metric])
        assert 0 <= each.score("accuracy") <= 1
    comparison = compare_runs([tmp_path / "one", tmp_path / "two"], replicates=100)
    assert comparison.rows[0].value.value == pytest.approx(run.metrics["out_of_fold"]["macro_f1"]["value"])
    assert (comparison.rows[1].head, comparison.rows[1].entry) == ("max", "tiny")
    assert comparison.rows[1].p_t_test is not None
    assert comparison.warnings == ()


def test_order_of_slides_and_classes_does_not_matter(runs: list[Path], tmp_path: Path) -> None:
    again = write_run(tmp_path / "good", 0.45)
    rows = (again / "oof.csv").read_text(encoding="utf-8").splitlines()
    (again / "oof.csv").write_text("\n".join([rows[0], *rows[:0:-1]]) + "\n", encoding="utf-8")
    facts = json.loads((again / "metrics.json").read_text())
    facts["class_names"].reverse()
    (again / "metrics.json").write_text(json.dumps(facts))
    expected, found = (compare_runs([runs[0], each], replicates=200).rows[1] for each in (runs[1], again))
    assert replace(found, p_t_test=None) == replace(expected, p_t_test=None)
    assert found.p_t_test == pytest.approx(expected.p_t_test)


def test_three_classes_have_no_delong(tmp_path: Path) -> None:
    labels = np.arange(60) % 3
    cohort = replace(make_cohort(60, 1), labels=labels, class_names=("a", "b", "c"))
    folders = [write_run(tmp_path / str(skill), skill, cohort) for skill in (0.1, 0.5)]
    row = compare_runs(folders, "auroc", replicates=100).rows[1]
    assert row.p_delong is None
    assert row.p_t_test is not None
    assert row.verdict == "better"


def test_other_folds_are_told_and_not_paired(runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", 0.45, split_seed=7)
    comparison = compare_runs([runs[0], other], replicates=50)
    assert comparison.rows[1].p_t_test is None
    assert comparison.rows[1].p is not None
    (text,) = comparison.warnings
    assert text.startswith("other was trained under other folds than mean (4 of 4 test folds are others)")


def test_folds_that_are_the_same_in_part_are_other_folds(runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "swapped", 0.45)
    path = other / "predictions.csv"
    with open(path, encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    tested = {row["patient_id"]: row["fold"] for row in table if row["split"] == "test"}
    first, second = (next(patient for patient, fold in tested.items() if fold == each) for each in "01")
    part = {(row["replica"], row["patient_id"]): row["split"] for row in table}
    for row in table:
        swapped = {first: second, second: first}.get(row["patient_id"], row["patient_id"])
        row["split"] = part[row["replica"], swapped]
    write_csv(path, [list(table[0]), *(list(row.values()) for row in table)])
    comparison = compare_runs([runs[0], other], replicates=20)
    assert comparison.rows[1].p_t_test is None
    assert any("2 of 4 test folds are others" in text for text in comparison.warnings)


def test_more_seeds_on_the_same_folds_are_no_other_folds(runs: list[Path], tmp_path: Path) -> None:
    more = write_run(tmp_path / "more", 0.45, seeds=(0, 1, 2))
    comparison = compare_runs([runs[0], more], replicates=50)
    assert comparison.rows[1].p_t_test is not None
    assert comparison.warnings == ()
    first = fold_scores(RunFolder.open(runs[0]).predictions())
    moved = [replace(each, validation=frozenset()) if each.replica.seed == 0 else each for each in first]
    assert differing_folds(first, moved) == "4 of 8 validation parts are others"


def test_an_ensemble_is_compared_without_its_folds(runs: list[Path], tmp_path: Path) -> None:
    cohort, store = make_cohort(18), make_store(make_cohort(18))
    options = {"folds": 3, "seeds": 1, "epochs": 2, "device": "cpu"}
    folders = [train(store, cohort, head=head, **options).save(tmp_path / head).folder for head in ("mean", "max")]
    both = make_ensemble(folders).save(tmp_path / "both")
    found = compare_runs([*folders, both], replicates=50)
    _, single, averaged = found.rows
    assert single.p_t_test is not None
    assert averaged.p_t_test is None
    assert averaged.p is not None
    assert averaged.value.value == pytest.approx(
        json.loads((both / "metrics.json").read_text())["out_of_fold"]["macro_f1"]["value"]
    )
    assert [text for text in found.warnings if "ensemble" in text] == [
        "both is an ensemble, whose runs may have other folds: its t test over test folds is left out, and all other "
        "figures are of its out-of-fold predictions"
    ]
    turned = compare_runs([both, *folders], replicates=50)
    assert [row.p_t_test for row in turned.rows] == [None, None, None]
    assert all("other folds than" not in text for text in turned.warnings)


def test_looks_beyond_the_runs_compared_are_told(tmp_path: Path) -> None:
    looks = {"a": 1, "b": 2, "c": 9}
    folders = [write_run(tmp_path / "runs" / name, 0.2, metrics={"looks": n}) for name, n in looks.items()]
    assert compare_runs(folders[:2], replicates=20).warnings == ()
    (text,) = compare_runs(folders, replicates=20).warnings
    assert "looked at 9 times for the 3 runs" in text
    elsewhere = write_run(tmp_path / "elsewhere" / "d", 0.3, metrics={"looks": 2})
    (text,) = compare_runs([folders[0], elsewhere], replicates=20).warnings
    assert "looked at 3 times for the 2 runs" in text


def test_few_patients_are_told(tmp_path: Path) -> None:
    cohort = make_cohort(8)
    folders = [write_run(tmp_path / str(skill), skill, cohort) for skill in (0.1, 0.5)]
    assert any("'Luminal A' has 4 patients" in text for text in compare_runs(folders, replicates=20).warnings)


def test_other_slides_patients_and_classes_are_refused_by_name(runs: list[Path], tmp_path: Path) -> None:
    fewer = write_run(tmp_path / "fewer", 0.2, COHORT.subset(range(78)))
    with pytest.raises(RunError, match=r"mean and fewer.*2 slides only in mean: 'slide 78', 'slide 79'"):
        compare_runs([runs[0], fewer])
    with pytest.raises(RunError, match=r"2 slides only in mean: 'slide 78'"):
        compare_runs([fewer, runs[0]])
    patients = ("p-other", *COHORT.patient_ids[1:])
    other = write_run(tmp_path / "patients", 0.2, replace(COHORT, patient_ids=patients))
    with pytest.raises(RunError, match=r"1 slides of another patient: 'slide 00'"):
        compare_runs([runs[0], other])
    labels = COHORT.labels.copy()
    labels[5] = 1 - labels[5]
    relabelled = write_run(tmp_path / "labels", 0.2, replace(COHORT, labels=labels))
    with pytest.raises(RunError, match=r"1 slides of another class: 'slide 05'"):
        compare_runs([runs[0], relabelled])
    renamed = write_run(tmp_path / "renamed", 0.2, replace(COHORT, class_names=("x", "y")))
    with pytest.raises(RunError, match=r"'Luminal A', 'triple-negative'.*'x', 'y'"):
        compare_runs([runs[0], renamed])


def test_what_is_no_comparison_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="two or more, each once"):
        compare_runs(runs[:1])
    with pytest.raises(RunError, match="two or more, each once"):
        compare_runs([runs[0], runs[1], runs[0].parent / "mean"])
    with pytest.raises(RunError, match="finished mil train"):
        compare_runs([runs[0], tmp_path / "none"])
    with pytest.raises(EvaluationError, match="did you mean 'macro_f1'"):
        compare_runs(runs, "macro-f1")
    partial = write_run(tmp_path / "partial", 0.2)
    (partial / "predictions.csv").write_text("slide_id,replica\na,b\n")
    with pytest.raises(RunError, match=r"predictions.csv cannot be read \(ValueError .*is not in list\)"):
        compare_runs([runs[0], partial])


def test_the_csv_holds_every_figure(runs: list[Path], tmp_path: Path) -> None:
    comparison = compare_runs(runs, replicates=50)
    comparison.write_csv(tmp_path / "compare.csv")
    with open(tmp_path / "compare.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == ["mean", "good", "alike"]
    assert (table[0]["difference"], table[0]["p"], table[0]["verdict"]) == ("", "", "reference")
    assert float(table[1]["difference_low"]) == pytest.approx(comparison.rows[1].difference.low, rel=1e-5)
    assert float(table[2]["detectable"]) == pytest.approx(comparison.rows[2].detectable, rel=1e-5)
    assert {row["metric"] for row in table} == {"macro_f1"}


def _mil(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["mil", "compare", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "80")
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_says_what_was_found(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = _mil(monkeypatch, *runs, "--metric", "auroc", "--out", tmp_path / "compare.csv")
    printed = capsys.readouterr().out
    assert code == 0
    assert "good: better than mean, difference in AUROC 0." in printed
    assert "alike: no difference shown to mean; one below 0." in printed
    assert "subtype: 80 slides, 40 patients" in printed
    assert "SYNTHETIC" not in printed
    # tables keep their figures whole on a narrow terminal
    assert re.search(r"\n +\[\d\.\d{3}, \d\.\d{3}\] +\[-?\d\.\d{3}, \d\.\d{3}\]", printed)
    assert re.search(r"\n good +<0\.001 +0\.00\d +<0\.001 +0\.0\d\d", printed)
    assert (tmp_path / "compare.csv").is_file()


def test_the_command_marks_synthetic_data_and_names_mistakes(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = write_run(tmp_path / "drawn", 0.3, metrics={"synthetic": True})
    assert _mil(monkeypatch, runs[0], drawn) == 0
    assert "SYNTHETIC DATA" in capsys.readouterr().out
    assert _mil(monkeypatch, runs[0]) == 2
    assert "expected two or more" in capsys.readouterr().err
    assert _mil(monkeypatch, *runs, "--metric", "f1") == 2
    assert "got metric 'f1'" in capsys.readouterr().err
    assert _mil(monkeypatch, *runs, "--out", tmp_path / "no folder" / "x.csv") == 2
    assert "a file in a folder that exists" in " ".join(capsys.readouterr().err.replace("│", " ").split())
