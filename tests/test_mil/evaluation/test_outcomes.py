"""Labels, numbers and survival when runs are scored and compared: figures are those of plain counting."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import r2_score, roc_auc_score

from mil.cli import main as cli
from mil.cohort.cohort import Attrition, Cohort
from mil.cohort.targets import find_strata
from mil.errors import EvaluationError, RunError
from mil.evaluation.headlines import HEADLINES, first_headline
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.paired import Interval, Pair
from mil.experiments.compare import compare_runs
from mil.experiments.crossval import train
from mil.reports.rescore import OperatingTarget, score_runs
from mil.runs.ensemble import make_ensemble
from mil.runs.run_folder import RunFolder
from mil.runs.saved_outcomes import read_outcomes
from mil.statistics.bootstrap import Resampling
from mil.statistics.delong import delong_test
from mil.statistics.survival import concordance
from tests.test_mil.training.test_tasks import SETTINGS, TARGETS, make_task_cohort

QUICK = SETTINGS | {"epochs": 4, "folds": 3, "seeds": 2}


def outcomes(task: str, skill: float, seed: int = 0, n: int = 60) -> Outcomes:
    """Two slides a patient, three folds, predictions that are right by `skill`."""
    truth_rng, rng = np.random.default_rng(7), np.random.default_rng([seed, int(100 * skill)])
    patients = tuple(f"p{at // 2:02d}" for at in range(n))
    hidden = np.repeat(truth_rng.normal(size=(n // 2, 2)), 2, axis=0)
    values = {
        "multilabel": (hidden > 0).astype(float),
        "regression": 50 + 10 * hidden[:, :1],
        "survival": np.stack([np.exp(-hidden[:, 0]), hidden[:, 1] < 0.8], axis=1).astype(float),
    }[task]
    if task == "multilabel":
        values[::9, 1] = np.nan
    labels, names = find_strata(task, TARGETS[task].split(","), values, patients)
    ids = tuple(f"s{at:02d}" for at in range(n))
    cohort = Cohort(ids, patients, labels, names, TARGETS[task], Attrition(n, n), task, values)
    guess = skill * hidden + (1 - skill) * rng.normal(size=(n, 2))
    said = {"multilabel": 1 / (1 + np.exp(-guess)), "regression": 50 + 10 * guess[:, :1], "survival": guess[:, :1]}
    found = Outcomes(cohort, said[task])
    if task != "survival":
        return found
    rows = [np.flatnonzero(np.arange(n) // 2 % 3 == fold) for fold in range(3)]
    return Outcomes.of_folds(Outcomes(cohort.subset(each), said[task][each]) for each in rows)


def naive(found: Outcomes) -> float:
    """The first headline, counted plainly."""
    truth, said = found.truth, found.predicted
    if found.cohort.task == "multilabel":
        known = np.isfinite(truth)
        return float(np.mean([roc_auc_score(truth[known[:, k], k], said[known[:, k], k]) for k in (0, 1)]))
    if found.cohort.task == "regression":
        return float(r2_score(truth, said))
    people: dict[tuple[str, int], list[int]] = {}
    for row, (patient, fold) in enumerate(zip(found.patient_ids, found.folds, strict=True)):
        people.setdefault((patient, fold), []).append(row)
    rows = [(fold, *truth[of[0]], said[of].mean()) for (_, fold), of in people.items()]
    right = pairs = 0.0
    for fold, time, event, risk in rows:
        for other_fold, other_time, other_event, other_risk in rows:
            if fold == other_fold and event and (time < other_time or (time == other_time and not other_event)):
                pairs += 1
                right += (risk > other_risk) + 0.5 * (risk == other_risk)
    return right / pairs


# ------------------------------------------------------------------------------------------------ outcomes and pairs


@pytest.mark.parametrize("task", TARGETS)
def test_scores_are_plain_counting_and_weights_are_repeats(task: str) -> None:
    found = outcomes(task, 0.6)
    first = first_headline(task)
    assert found.scores()[first][0] == pytest.approx(naive(found))
    assert set(found.scores()) <= set(HEADLINES[task])
    assert found.evaluate(Resampling(20))[first]["value"] == pytest.approx(naive(found))
    # a patient with weight 0 is as if it were not there
    weights = np.array([[float(patient not in ("p00", "p07")) for patient in found.patient_ids]])
    kept = np.flatnonzero(weights[0])
    folds = tuple(found.folds[row] for row in kept) if found.folds else ()
    less = Outcomes(found.cohort.subset(kept), found.predicted[kept], folds)
    assert found.scores(weights)[first][0] == pytest.approx(naive(less))


@pytest.mark.parametrize("task", TARGETS)
def test_a_better_model_is_found_and_an_equal_one_is_not(task: str) -> None:
    good, poor = outcomes(task, 0.9), outcomes(task, 0.1)
    pair = Pair(good, poor, first_headline(task), Resampling(300))
    difference = pair.difference()
    assert difference.difference == pytest.approx(naive(good) - naive(poor))
    assert difference.low > 0
    assert pair.p() < 0.02
    assert 0 < pair.detectable() < 1.5
    same = Pair(good, good, first_headline(task), Resampling(100))
    assert same.difference() == (0, 0, 0)
    assert same.p() == 1
    assert same.detectable() is None
    turned = Pair(poor, good, first_headline(task), Resampling(300))
    assert turned.difference().high == pytest.approx(-difference.low)


def test_paired_differences_are_those_of_resampled_patients() -> None:
    one, other = outcomes("regression", 0.7), outcomes("regression", 0.4)
    patients, of_slide = np.unique(one.patient_ids, return_inverse=True)
    rng, found = np.random.default_rng(0), []
    for _ in range(1000):
        drawn = np.concatenate(
            [np.flatnonzero(of_slide == at) for at in rng.integers(len(patients), size=len(patients))]
        )
        found.append(
            r2_score(one.truth[drawn], one.predicted[drawn]) - r2_score(one.truth[drawn], other.predicted[drawn])
        )
    pair = Pair(one, other, "r2", Resampling(2000)).difference()
    np.testing.assert_allclose([pair.low, pair.high], np.quantile(found, [0.025, 0.975]), atol=0.06)


def test_risks_of_other_scales_compare_alike() -> None:
    one, other = outcomes("survival", 0.6), outcomes("survival", 0.3)
    folds = np.array(other.folds)[:, None]
    # a model of its own in every fold, with its own unit
    stretched = replace(
        other, predicted=np.where(folds == 1, 1000 * other.predicted - 5e4, other.predicted / 7 + 3 * folds)
    )
    expected, found = (Pair(one, each, "concordance", Resampling(200)) for each in (other, stretched))
    assert found.difference() == expected.difference()
    assert found.p() == expected.p()


def test_exchanged_risks_are_ranks_put_in_the_place_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = outcomes("survival", 0.6), outcomes("survival", 0.3)
    patients, patient_of = np.unique(one.patient_ids, return_inverse=True)
    swaps = np.random.default_rng(0).integers(0, 2, (6, len(patients)))[:, patient_of].astype(float)
    mixed = [replace(one, predicted=np.where(row[:, None] > 0, _ranks(other), _ranks(one))) for row in swaps]
    np.testing.assert_allclose(one.exchanged(other, swaps, "concordance"), [naive(each) for each in mixed])
    # all exchanges of a test are a few calls: one by one, a thousand patients would take a minute
    calls = []
    monkeypatch.setattr("mil.evaluation.outcomes.concordance", lambda *given: calls.append(1) or concordance(*given))
    assert Pair(one, other, "concordance", Resampling(300)).p() is not None
    assert len(calls) < 10


def _ranks(found: Outcomes) -> np.ndarray:
    """Of every slide the rank that its patient's mean risk has in the fold, [n, 1]."""
    who = np.array([f"{fold} {patient}" for fold, patient in zip(found.folds, found.patient_ids, strict=True)])
    mean = np.array([found.predicted[who == each, 0].mean() for each in who])
    ranks = np.zeros(len(who))
    for fold in set(found.folds):
        own = np.array(found.folds) == fold
        ranks[own] = [len({m for m in mean[own] if m < each}) for each in mean[own]]
    return ranks[:, None]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_metric_that_a_model_does_not_have_is_not_tested(task: str) -> None:
    good = outcomes("regression", 0.9)
    if task == "regression":
        pair = Pair(good, replace(good, predicted=np.full_like(good.predicted, 7.0)), "pearson", Resampling(50))
    else:
        # of two classes one is left
        cohort = replace(good.cohort, values=None, task=task, labels=np.zeros(60, np.int64), class_names=("a", "b"))
        pair = Pair(*(Outcomes(cohort, np.full((60, 2), share)) for share in (0.4, 0.5)), "auroc", Resampling(50))
    assert Interval.of(pair.difference()) == Interval(None, None, None)
    assert pair.p() is None


# ------------------------------------------------------------------------------------------------- runs of every task


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two runs of each task on the same folds."""
    home, found = tmp_path_factory.mktemp("läufe"), {}
    for task in TARGETS:
        store, cohort = make_task_cohort(task)
        for head in ("mean", "max"):
            train(store, cohort, **QUICK | {"head": head}).save(home / task / head)
        found[task] = [home / task / head for head in ("mean", "max")]
    return found


@pytest.mark.parametrize("task", TARGETS)
def test_folders_give_back_the_metrics_of_the_training(runs: dict[str, list[Path]], task: str) -> None:
    folder = make_ensemble(runs[task]).save(runs[task][0].parent / "both")
    for path in (*runs[task], folder):
        stored = json.loads((path / "metrics.json").read_text())["out_of_fold"]
        again = read_outcomes(RunFolder.open(path)).evaluate()
        for name in HEADLINES[task]:
            assert list(again[name].values()) == pytest.approx(list(stored[name].values()), abs=1e-6), name
    comparison = compare_runs([*runs[task], folder], replicates=50)
    assert comparison.rows[2].p_t_test is None
    assert comparison.rows[1].p_t_test is not None


@pytest.mark.parametrize("task", TARGETS)
def test_comparing_states_what_pairs_say(runs: dict[str, list[Path]], task: str, tmp_path: Path, capsys) -> None:
    comparison = compare_runs(runs[task], replicates=100)
    first, second = (read_outcomes(RunFolder.open(path)) for path in runs[task])
    pair = Pair(second, first, comparison.metric, Resampling(100))
    row = comparison.rows[1]
    assert comparison.metric == first_headline(task)
    assert (row.difference.value, row.difference.low, row.difference.high) == pair.difference()
    assert (row.p, row.detectable, row.p_delong) == (pair.p(), pair.detectable(), None)
    cli.app(["compare", *map(str, runs[task]), "--out", str(tmp_path / "c.csv")], standalone_mode=False)
    assert "detectable" in capsys.readouterr().out
    with open(tmp_path / "c.csv", encoding="utf-8") as file:
        assert [each["metric"] for each in csv.DictReader(file)] == [first_headline(task)] * 2


def test_a_lower_error_is_better(tmp_path: Path, runs: dict[str, list[Path]]) -> None:
    poor = tmp_path / "poor"
    poor.mkdir()
    (poor / "metrics.json").write_text((runs["regression"][0] / "metrics.json").read_text())
    for name in ("oof.csv", "predictions.csv"):
        with open(runs["regression"][0] / name, encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["predicted_ki67"] = f"{float(row['predicted_ki67']) + 60}"
        with open(poor / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    assert compare_runs([poor, runs["regression"][0]], "mae", replicates=100).rows[1].verdict == "better"
    assert compare_runs([runs["regression"][0], poor], "mae", replicates=100).rows[1].verdict == "worse"
    assert compare_runs([runs["regression"][0], poor], "r2", replicates=100).rows[1].verdict == "worse"


def test_one_label_has_delongs_test(tmp_path: Path) -> None:
    store, cohort = make_task_cohort("multilabel")
    one = replace(cohort, values=cohort.values[:, 1:], target="her2")
    folders = [tmp_path / head for head in ("mean", "max")]
    for folder in folders:
        train(store, one, **QUICK | {"head": folder.name, "epochs": 2}).save(folder)
    first, second = (read_outcomes(RunFolder.open(folder)) for folder in folders)
    known = np.flatnonzero(np.isfinite(first.truth[:, 0]))
    scores = (second.predicted[known, 0], first.predicted[known, 0])
    expected = delong_test(first.truth[known, 0].astype(int), *scores, [first.patient_ids[row] for row in known]).p
    assert compare_runs(folders, replicates=20).rows[1].p_delong == expected


@pytest.mark.parametrize("text", ["[]", "3", '{"task": "regression"}'])
def test_what_is_no_run_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.json").write_text(text)
    (tmp_path / "oof.csv").write_text("slide_id,patient_id\n")
    with pytest.raises(RunError, match=r"metrics\.json.* → .*give the --out folder of a finished mil train"):
        read_outcomes(RunFolder.open(tmp_path))


def test_unlike_runs_are_refused(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"mean of task multilabel, .*mean of task survival, .* → expected one task"):
        compare_runs([runs["multilabel"][0], runs["survival"][0]])
    with pytest.raises(EvaluationError, match=r"metric 'auroc' .* one of 'macro_auroc'"):
        compare_runs(runs["multilabel"], "auroc")
    store, cohort = make_task_cohort("multilabel")
    fewer = replace(cohort, values=cohort.values[:, :1], target="er")
    train(store, fewer, **QUICK | {"epochs": 1}).save(tmp_path / "er")
    with pytest.raises(
        RunError,
        match=r"target er,her2, and .*target er → expected .* the same columns",
    ):
        compare_runs([runs["multilabel"][0], tmp_path / "er"])
    store, cohort = make_task_cohort("survival")
    train(store, cohort, **QUICK | {"epochs": 1, "split_seed": 5}).save(tmp_path / "folds")
    with pytest.raises(RunError, match=r"tested in different folds → expected the same folds"):
        compare_runs([runs["survival"][0], tmp_path / "folds"])


def test_columns_of_another_order_are_matched_by_name(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    store, cohort = make_task_cohort("multilabel")
    turned = replace(cohort, values=cohort.values[:, ::-1], target="her2,er")
    train(store, turned, **QUICK | {"head": "max"}).save(tmp_path / "turned")
    row = compare_runs([runs["multilabel"][0], tmp_path / "turned"], replicates=20).rows[1]
    stored = json.loads((tmp_path / "turned" / "metrics.json").read_text())["out_of_fold"]
    assert row.value.value == pytest.approx(stored["macro_auroc"]["value"])


@pytest.mark.parametrize("task", TARGETS)
def test_scores_of_other_intervals(runs: dict[str, list[Path]], task: str, tmp_path: Path, capsys) -> None:
    how = Resampling(150, 2, 0.9, "bca", True)
    found = score_runs(runs[task], how).runs[0]
    saved = read_outcomes(RunFolder.open(runs[task][0]))
    assert found.metrics == saved.evaluate(how)
    assert (found.metrics["interval"], found.metrics["stratified"]) == ("bca", True)
    first = first_headline(task)
    for other in (Resampling(150, 2, 0.9), Resampling(150, 2, 0.9, "bca"), Resampling(150, 2, 0.9, stratified=True)):
        assert saved.evaluate(other)[first]["low"] != found.metrics[first]["low"]
    assert (found.calibration, found.abstention, found.operating) == (None, None, ())
    with pytest.raises(RunError, match=rf"run of task {task}, for operating points → expected a run of classes"):
        score_runs(runs[task], how, OperatingTarget())
    out = tmp_path / "scores"
    cli.app(["score", *map(str, runs[task]), "--replicates", "50", "--out", str(out)], standalone_mode=False)
    assert {path.name for path in out.iterdir()} == {"scores.json", "scores.csv"}
    with open(out / "scores.csv", encoding="utf-8") as file:
        rows = {(row["run"], row["target"], row["metric"]): row["value"] for row in csv.DictReader(file)}
    assert float(rows["mean", "", first]) == pytest.approx(found.metrics[first]["value"], abs=1e-5)
    assert task == "survival" or ("max", saved.cohort.columns[-1], "auroc" if task == "multilabel" else "r2") in rows
    assert "no look is counted" in capsys.readouterr().out
