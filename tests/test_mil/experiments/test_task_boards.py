"""Benchmarks and sweeps of labels, numbers and survival: baselines, choices and figures are what they claim to be."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mil.bags.bags import Bags
from mil.errors import ConfigError, SplitError
from mil.evaluation.headlines import HEADLINES, first_headline
from mil.experiments.baselines import CoxRegression, run_baselines
from mil.experiments.benchmark import benchmark
from mil.experiments.compare import compare_runs
from mil.experiments.crossval import train
from mil.experiments.leaderboard_page import write_page
from mil.runs.run_folder import RunFolder
from mil.runs.saved_outcomes import read_outcomes
from mil.splits.folds import make_splits
from mil.tuning.sweep import sweep
from mil.tuning.sweep_page import write_sweep_page
from tests.test_mil.training.test_tasks import SETTINGS, TARGETS, make_task_cohort

QUICK = SETTINGS | {"epochs": 4, "folds": 3, "seeds": 2}

# -------------------------------------------------------------------------------------------------------- benchmarks


@pytest.mark.parametrize("task", TARGETS)
def test_a_board_of_every_task(task: str, tmp_path: Path) -> None:
    store, cohort = make_task_cohort(task)
    board = benchmark(store, cohort, heads=["max"], out=tmp_path / "board", **_without_head(QUICK))
    first = first_headline(task)
    rows = {row.name: row for row in board.rows}
    folders = {name: tmp_path / "board" / rows[name].folder for name in ("mean", "max")}
    for name, folder in folders.items():
        stored = json.loads((folder / "metrics.json").read_text())["out_of_fold"]
        for metric, value in rows[name].scores.items():
            assert value.value == pytest.approx(stored[metric]["value"], abs=1e-6)
        assert rows[name].seed_low <= rows[name].seed_high
    expected = compare_runs(list(folders.values())).rows[1]
    assert rows["max"].difference.value == pytest.approx(expected.difference.value, abs=1e-6)
    assert rows["max"].p_holm == expected.p_holm
    assert sum(row.kind == "baseline" for row in board.rows) == 2
    values = [row.headline.value for row in board.rows]
    assert values == sorted(values, reverse=True)
    with open(tmp_path / "board" / "leaderboard.csv", encoding="utf-8") as file:
        header = next(csv.reader(file))
    assert header[4] == first
    assert "macro_f1" in header or task != "multilabel"
    write_page(tmp_path / "page.html", board)
    page = (tmp_path / "page.html").read_text()
    assert f"{HEADLINES[task][first]} minus mean pooling" in page
    assert "Macro-F1" not in page


def _without_head(options: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if name != "head"}


def test_baselines_learn_from_the_mean_instances_outside_the_test_fold() -> None:
    for task in TARGETS:
        store, cohort = make_task_cohort(task)
        splits = make_splits(cohort, 3, 0, (0,), 0.2)
        bags = Bags(cohort.slide_ids, [store.slides[name] for name in cohort.slide_ids])
        guess, learnt = (each.outcomes for each in run_baselines(bags, cohort, splits))
        means = np.stack([store.slides[name].astype(np.float64).mean(axis=0) for name in cohort.slide_ids])
        test = splits.test_fold == 1
        if task == "multilabel":
            known = ~test & np.isfinite(cohort.values[:, 1])
            model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
            model.fit(means[known], cohort.values[known, 1])
            np.testing.assert_allclose(learnt.predicted[test, 1], model.predict_proba(means[test])[:, 1], atol=1e-5)
            np.testing.assert_allclose(guess.predicted[test, 1], cohort.values[known, 1].mean())
        elif task == "regression":
            model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 6, 13)))
            expected = model.fit(means[~test], cohort.values[~test, 0]).predict(means[test])
            np.testing.assert_allclose(learnt.predicted[test, 0], expected, rtol=1e-5)
            np.testing.assert_allclose(guess.predicted[test], cohort.values[~test].mean())
        else:
            assert guess.scores()["concordance"][0] == 0.5
            assert learnt.scores()["concordance"][0] > 0.75
            at = {name: row for row, name in enumerate(learnt.cohort.slide_ids)}
            rows = [at[cohort.slide_ids[row]] for row in np.flatnonzero(test)]
            expected = CoxRegression().fit(means[~test], cohort.values[~test]).predict(means[test])
            np.testing.assert_allclose(learnt.predicted[rows], expected, atol=1e-5)


def test_cox_regression_minimises_its_penalised_likelihood() -> None:
    rng = np.random.default_rng(0)
    x, hidden = rng.normal(size=(50, 4)) * [1, 5, 1, 1], rng.normal(size=50)
    x[:, 0] += 2 * hidden
    truth = np.stack([np.round(4 * np.exp(-hidden), 1), rng.random(50) < 0.7], axis=1)
    standard = (x - x.mean(axis=0)) / x.std(axis=0)

    def loss(weights: np.ndarray) -> float:
        risk = standard @ weights
        deaths = [
            np.log(np.exp(risk[truth[:, 0] >= time]).sum()) - at
            for at, (time, event) in zip(risk, truth, strict=True)
            if event
        ]
        return float(np.sum(deaths) + 4 / 2 * (weights**2).sum())

    expected = minimize(loss, np.zeros(4), method="BFGS").x
    np.testing.assert_allclose(CoxRegression().fit(x, truth).weights, expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ sweeps


@pytest.mark.parametrize("task", TARGETS)
def test_a_sweep_chooses_by_the_validation_score_of_the_task(task: str, tmp_path: Path) -> None:
    store, cohort = make_task_cohort(task)
    options = {name: value for name, value in QUICK.items() if name not in ("head", "optimizer")}
    found = sweep(store, cohort, {"head": ["mean", "max"], "optimizer.lr": [0.001, 0.02]}, tmp_path / "s", **options)
    select = first_headline(task)
    assert found.config.select == select
    run = train(store, cohort, **options, head="max", optimizer={"lr": 0.02})
    scores = {(each.replica.fold, each.replica.seed): each for each in run.trained}
    for trial in found.trials:
        if trial.setting.values == {"head": "max", "optimizer.lr": 0.02}:
            for seed, score in zip((0, 1), trial.scores, strict=True):
                trained = scores[trial.fold, seed]
                kept = trained.history[trained.best_epoch - 1]
                assert score.metrics[select] == pytest.approx(kept.validation_score)
                assert score.metrics["loss"] == kept.validation_loss
    for fold, trial in enumerate(found.chosen):
        means = [each.mean(select) for each in found.trials if each.fold == fold]
        assert trial.mean(select) == max(means)
    # the figures are those of the chosen settings' replicas on the folds that they were chosen in
    outcomes = read_outcomes(RunFolder.open(tmp_path / "s"))
    assert found.metrics["out_of_fold"][select]["value"] == pytest.approx(outcomes.scores()[select][0])
    assert found.metrics["task"] == task
    for fold, trial in enumerate(found.chosen):
        head, lr = trial.setting.values.values()
        plain = train(store, cohort, **options, head=head, optimizer={"lr": lr}).predictions
        of_fold = slice(2 * fold, 2 * fold + 2)
        np.testing.assert_array_equal(found.predictions.probabilities[of_fold], plain.probabilities[of_fold])
    page = write_sweep_page(tmp_path / "s", found).read_text()
    assert HEADLINES[task][select] in page
    assert "Macro-F1" not in page
    with open(tmp_path / "s" / "settings.csv", encoding="utf-8") as file:
        assert f"mean_validation_{select}" in next(csv.reader(file))


def test_test_truths_have_no_say_in_what_a_sweep_chooses() -> None:
    store, cohort = make_task_cohort("regression")
    options = _without_head(QUICK) | {"seeds": 1}
    space = {"head": ["mean", "max"]}
    found = sweep(store, cohort, space, **options)
    test = np.flatnonzero(found.splits.parts(0, 0) == "test")
    values = cohort.values.copy()
    for stratum in np.unique(cohort.labels):
        # within a stratum, so that the splits stay as they are
        own = test[cohort.labels[test] == stratum]
        values[own] = values[own][::-1]
    other = sweep(store, replace(cohort, values=values), space, **options)
    np.testing.assert_array_equal(found.splits.parts(0, 0), other.splits.parts(0, 0))
    assert [t.mean("r2") for t in found.trials if t.fold == 0] == [t.mean("r2") for t in other.trials if t.fold == 0]
    assert [t.mean("r2") for t in found.trials if t.fold == 1] != [t.mean("r2") for t in other.trials if t.fold == 1]


def test_losses_of_different_kinds_decide_nothing(tmp_path: Path) -> None:
    store, cohort = make_task_cohort("survival")
    options = _without_head(QUICK) | {"seeds": 1, "head": "mean"}
    found = sweep(store, cohort, {"loss": ["discrete_survival", "cox"]}, **options | {"batch_bags": 20})
    assert not found.config.shares_loss
    assert {each.loss for each in (*found.trials, *found.averages)} == {None}
    alike = sweep(store, cohort, {"optimizer.lr": [1e-9, 1e-8]}, **_without_optimizer(options))
    assert alike.config.shares_loss
    assert all(each.loss is not None for each in (*alike.trials, *alike.averages))


def _without_optimizer(options: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if name != "optimizer"}


def test_what_a_sweep_cannot_choose_by_is_refused(tmp_path: Path) -> None:
    store, cohort = make_task_cohort("survival")
    with pytest.raises(ConfigError, match=r"select auroc → expected one of concordance"):
        sweep(store, cohort, {"head": ["mean", "max"]}, select="auroc", **_without_head(QUICK))
    store, cohort = make_task_cohort("regression")
    options = _without_head(QUICK) | {"folds": 10, "validation_fraction": 0.03}
    with pytest.raises(SplitError, match=r"select r2, which the validation parts of fold \d cannot tell"):
        sweep(store, cohort, {"head": ["mean", "max"]}, **options)
    two = replace(cohort, values=np.hstack([cohort.values, -cohort.values]), target="ki67,other")
    with pytest.raises(ConfigError, match=r"select mae → expected one of r2, pearson, spearman"):
        sweep(store, two, {"head": ["mean", "max"]}, select="mae", **_without_head(QUICK))
    with pytest.raises(ConfigError, match=r"task"):
        benchmark(store, cohort, heads=["mean"], task="survival", target="a,b", **_without_head(QUICK))
