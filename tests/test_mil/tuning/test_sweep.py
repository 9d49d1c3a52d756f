"""Sweeps: nested and honest, resumed to the same end, searched and pruned, told when wrong."""

import builtins
import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import f_oneway
from sklearn import metrics as sk

from mil.config.compose import compose_config
from mil.config.train import TrainConfig
from mil.errors import ConfigError, MissingExtraError, RunError, SplitError
from mil.experiments.compare import compare_runs
from mil.experiments.crossval import cross_validate, split_plan, train
from mil.runs.run_folder import RunFolder
from mil.runs.saved_outcomes import read_outcomes
from mil.splits.plan import split_cohort
from mil.training import resume as unfinished
from mil.tuning import sweep as module
from mil.tuning.importance import importances
from mil.tuning.score_ledger import SeedScore
from mil.tuning.search_space import draw_settings, override_text, parse_space
from mil.tuning.sweep import sweep
from mil.tuning.sweep_config import Setting, compose_sweep
from mil.tuning.sweep_figures import importance_plot
from mil.tuning.sweep_folder import PROCEDURE, Sweep
from mil.tuning.sweep_page import write_sweep_page
from mil.tuning.trials import SweepProgress, Trial, best_trial, validation_metrics
from mil.visualization.plotting import to_svg
from tests.test_mil.small import FEATURES, MemoryStore, make_cohort, make_features

COHORT = make_cohort(n_patients=15)
OPTIONS: dict[str, Any] = {"folds": 3, "seeds": 2, "epochs": 3, "device": "cpu"}
LISTS: dict[str, Any] = {"head": ["mean", "max"], "optimizer.lr": [1e-3, 3e-2]}
SEARCH: dict[str, Any] = {"optimizer.lr": "interval(1e-5,1e-1)", "head": ["mean", "max"]}
N_INSIDE = 6


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    """Bags whose classes are hard enough to tell that settings differ."""
    rng = np.random.default_rng(5)
    bags = [bag + rng.normal(0, 2, bag.shape) for bag in make_features(len(COHORT), COHORT.labels)]
    return MemoryStore(dict(zip(COHORT.slide_ids, [bag.astype(np.float16) for bag in bags], strict=True)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps") / "sweep ü"


@pytest.fixture(scope="module")
def listed(store: MemoryStore, folder: Path) -> Sweep:
    return sweep(store, COHORT, LISTS, folder, **OPTIONS)


@pytest.fixture(scope="module")
def searched(store: MemoryStore, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(store, COHORT, SEARCH, tmp_path_factory.mktemp("searches") / "s", trials=9, **OPTIONS)


def _table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------------- honesty


def test_every_setting_is_tried_in_every_fold_and_the_best_on_validation_is_chosen(listed: Sweep) -> None:
    assert [(trial.fold, trial.number) for trial in listed.trials] == [(f, n) for f in range(3) for n in range(4)]
    for fold, chosen in enumerate(listed.chosen):
        own = [trial for trial in listed.trials if trial.fold == fold]
        best = max(trial.mean("auroc") for trial in own)
        ties = [trial for trial in own if trial.mean("auroc") == best]
        assert chosen is min(ties, key=lambda trial: trial.mean("log_loss"))
    assert len({trial.mean("auroc") for trial in listed.trials}) > 3


def test_scores_are_those_of_the_validation_parts_of_training_by_hand(listed: Sweep, store: MemoryStore) -> None:
    trial = listed.trials[5]
    run = cross_validate(store, COHORT, trial.setting.config)
    for at, seed in enumerate(listed.splits.seeds):
        (replica,) = (each for each in run.trained if (each.replica.fold, each.replica.seed) == (trial.fold, seed))
        within = listed.splits.parts(trial.fold, seed) == "validation"
        expected = validation_metrics(COHORT.labels[within], replica.probabilities[within])
        assert trial.scores[at].metrics == pytest.approx(expected)


def test_the_nested_predictions_are_those_of_the_chosen_settings_trained_by_hand(
    listed: Sweep, store: MemoryStore
) -> None:
    found, tested = listed.predictions.out_of_fold(), listed.splits.test_fold
    for fold, trial in enumerate(listed.chosen):
        run = cross_validate(store, COHORT, trial.setting.config)
        own = tested == fold
        np.testing.assert_allclose(found[own], run.predictions.out_of_fold()[own], atol=1e-6)
    scored = sk.roc_auc_score(COHORT.labels, found[:, 1])
    assert listed.metrics["out_of_fold"]["auroc"]["value"] == pytest.approx(scored)


@pytest.mark.parametrize(("space", "trials"), [(LISTS, None), (SEARCH, 4)])
def test_a_choice_never_sees_the_labels_of_its_test_part(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, space: dict[str, Any], trials: int | None
) -> None:
    splits = split_cohort(COHORT, split_plan(compose_config(values=OPTIONS)))
    monkeypatch.setattr(module, "split_cohort", lambda cohort, plan: splits)
    labels = COHORT.labels.copy()
    tested = np.flatnonzero(splits.test[0])
    labels[tested] = 1 - labels[tested]
    true, false = (
        sweep(store, cohort, space, trials=trials, **OPTIONS) for cohort in (COHORT, replace(COHORT, labels=labels))
    )
    for a, b in zip(_of_fold(true, 0), _of_fold(false, 0), strict=True):
        assert a.setting.values == b.setting.values
        assert [score.metrics for score in a.scores] == [score.metrics for score in b.scores]
    assert true.chosen[0].setting.values == false.chosen[0].setting.values
    own = splits.test_fold == 0
    np.testing.assert_allclose(true.predictions.out_of_fold()[own], false.predictions.out_of_fold()[own], atol=1e-6)
    # what the other folds learn from has changed
    assert [t.scores[0].metrics for t in _of_fold(true, 1)] != [t.scores[0].metrics for t in _of_fold(false, 1)]


def _of_fold(found: Sweep, fold: int) -> list[Trial]:
    return [trial for trial in found.trials if trial.fold == fold]


def test_what_was_not_chosen_leaves_no_test_prediction(store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        sweep(store, COHORT, LISTS, tmp_path / "s", progress=_stop_at(13), **OPTIONS)
    splits = split_cohort(COHORT, split_plan(compose_config(values=OPTIONS)))
    kept = list((tmp_path / "s").rglob("*.replica"))
    assert kept
    for path in kept:
        fold, seed = map(int, re.findall(r"\d+", path.stem))
        tested = splits.parts(fold, seed) == "test"
        values = unfinished._read(path)["probabilities"].numpy()
        assert np.isnan(values[tested]).all()
        assert np.isfinite(values[~tested]).all()
    # of 13 replicas, those of the best setting of each fold so far, and of the one in training
    assert len(kept) < 13


def test_only_chosen_replicas_are_written_and_the_look_is_counted_once(listed: Sweep, folder: Path) -> None:
    rows = _table(folder / "predictions.csv")
    assert len(rows) == N_INSIDE * len(COHORT)
    assert {row["replica"] for row in rows} == {f"fold{f}-seed{s}" for f in range(3) for s in range(2)}
    looks = (folder.parent / "looks.jsonl").read_text().splitlines()
    assert len(looks) == 1
    assert listed.metrics["looks"] == 1


# ----------------------------------------------------------------------------------------------------------- resume


class Stop(Exception):
    """Ends a sweep from within."""


def _stop_at(done: int) -> Any:
    def stop(progress: SweepProgress) -> None:
        if progress.done >= done:
            raise Stop

    return stop


def _content(folder: Path) -> dict[str, Any]:
    """All files of a sweep, without times."""
    names = ("chosen.csv", "settings.csv", "best.yaml", "oof.csv", "predictions.csv", "splits.csv", "config.yaml")
    content: dict[str, Any] = {name: (folder / name).read_bytes() for name in names}
    content["trials"] = [{k: v for k, v in row.items() if k != "seconds"} for row in _table(folder / "trials.csv")]
    metrics = json.loads((folder / "metrics.json").read_text())
    content["metrics"] = {key: value for key, value in metrics.items() if key not in ("created", "looks")}
    return content


@pytest.mark.parametrize("kind", ["listed", "searched"])
@pytest.mark.parametrize("at", [17])
def test_a_stopped_sweep_goes_on_and_ends_the_same(
    request: pytest.FixtureRequest,
    store: MemoryStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    at: int,
) -> None:
    whole: Sweep = request.getfixturevalue(kind)
    space, options = (LISTS, OPTIONS) if kind == "listed" else (SEARCH, OPTIONS | {"trials": 9})
    trained = _count_trainings(monkeypatch)
    with pytest.raises(Stop):
        sweep(store, COHORT, space, tmp_path / "s", progress=_stop_at(at), **options)
    first = len(trained)
    # a line that a killed process has left
    with open(tmp_path / "s" / "unfinished" / "scores.jsonl", "a", encoding="utf-8") as file:
        file.write('{"key": "ab')
    seen: list[SweepProgress] = []
    again = sweep(store, COHORT, space, tmp_path / "s", progress=seen.append, **options)
    assert whole.folder is not None
    assert _content(tmp_path / "s") == _content(whole.folder)
    assert seen[-1].done <= seen[-1].total
    assert len(set(trained)) == len(trained) >= first
    assert not (tmp_path / "s" / "unfinished").exists()
    assert [trial.setting.values for trial in again.chosen] == [trial.setting.values for trial in whole.chosen]


def _count_trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is trained from now on, by settings and replica."""
    from mil.training import replicas

    trained = []
    original = replicas.train_replica

    def spy(bags: Any, labels: Any, replica: Any, *rest: Any, **keywords: Any) -> Any:
        found = original(bags, labels, replica, *rest, **keywords)
        trained.append((repr(replica.config), replica.name))
        return found

    monkeypatch.setattr(replicas, "train_replica", spy)
    return trained


def test_a_finished_or_foreign_folder_is_refused(
    listed: Sweep, store: MemoryStore, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"it holds finished results → give a new folder"):
        sweep(store, COHORT, LISTS, folder, **OPTIONS)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.yaml").write_text("folds: 3\n")
    with pytest.raises(RunError, match=r"it holds something else"):
        sweep(store, COHORT, LISTS, tmp_path, **OPTIONS)
    with pytest.raises(RunError, match=r"it is a file"):
        sweep(store, COHORT, LISTS, tmp_path / "notes.txt", **OPTIONS)


# ----------------------------------------------------------------------------------------------------------- search


def test_a_search_belongs_to_its_seed(searched: Sweep, store: MemoryStore) -> None:
    other = sweep(store, COHORT, SEARCH, trials=2, seed=1, **OPTIONS)
    # that the same seed asks for the same is seen where a search is stopped and goes on
    tried = [[(t.fold, t.number, t.setting.title) for t in found.trials if t.number < 2] for found in (searched, other)]
    assert len(set(tried[0] + tried[1])) == len(tried[0]) + len(tried[1])


def test_hopeless_trials_are_given_up_and_never_chosen(searched: Sweep) -> None:
    pruned = [trial for trial in searched.trials if trial.state == "pruned"]
    assert pruned
    assert all(len(trial.scores) < len(searched.splits.seeds) for trial in pruned)
    for trial in pruned:
        # the median of the first seed among those before it
        before = [t.scores[0].metrics["auroc"] for t in _of_fold(searched, trial.fold) if t.number < trial.number]
        assert trial.scores[0].metrics["auroc"] < np.median(before)
    assert all(trial.state == "complete" for trial in searched.chosen)
    assert searched.metrics["sweep"]["n_pruned"] == len(pruned)


def test_what_a_search_chose_is_averaged_over_all_folds(searched: Sweep, store: MemoryStore) -> None:
    assert {each.setting.title for each in searched.averages} == {trial.setting.title for trial in searched.chosen}
    best = searched.averages[0]
    run = cross_validate(store, COHORT, best.setting.config)
    scores = []
    for fold in range(3):
        parts = [
            (each, searched.splits.parts(fold, each.replica.seed)) for each in run.trained if each.replica.fold == fold
        ]
        within = [(each, part == "validation") for each, part in parts]
        scores.append(
            np.mean([validation_metrics(COHORT.labels[w], each.probabilities[w])["auroc"] for each, w in within])
        )
    assert best.score == pytest.approx(np.mean(scores))
    assert best.score == max(each.score for each in searched.averages)


def test_optunas_own_tools_read_the_study(searched: Sweep) -> None:
    import optuna

    assert searched.folder is not None
    file = str(searched.folder / "study.log")
    lock = optuna.storages.journal.JournalFileOpenLock(file)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(file, lock))
    study = optuna.load_study(study_name="fold1", storage=storage)
    assert len(study.trials) == 9
    best = max(t.mean("auroc") for t in _of_fold(searched, 1) if t.state == "complete")
    assert study.best_value == pytest.approx(best)


def test_without_optuna_a_search_is_refused_before_training(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "optuna":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtraError, match=r'optuna → .* → run pip install "tessera-mil\[sweep\]"'):
        sweep(store, COHORT, SEARCH, tmp_path / "s", **OPTIONS)
    assert not (tmp_path / "s").exists()
    assert sweep(store, COHORT, SEARCH, method="random", trials=2, **OPTIONS).metrics["sweep"]["n_settings"] == 2


# ---------------------------------------------------------------------------------------------------------- settings


def test_equal_scores_are_decided_by_log_loss_then_order() -> None:
    setting = Setting({}, TrainConfig())

    def trial(number: int, auroc: float | None, loss: float, state: str = "complete") -> Trial:
        return Trial(0, number, setting, str(number), (SeedScore({"auroc": auroc, "log_loss": loss}),), state)

    trials = [
        trial(0, 1.0, 0.5),
        trial(1, 1.0, 0.2),
        trial(2, 1.0, 0.2),
        trial(3, 1.0, 0.1, "pruned"),
        trial(4, None, 0),
    ]
    assert best_trial(trials, "auroc") is trials[1]
    assert best_trial(trials, "log_loss") is trials[4]
    assert best_trial(trials[3:4], "auroc") is None


def test_validation_metrics_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 3, 60), rng.dirichlet([1, 1, 1], 60)
    found, guessed = validation_metrics(labels, scores), scores.argmax(axis=1)
    assert found == pytest.approx(
        {
            "auroc": sk.roc_auc_score(labels, scores, multi_class="ovr"),
            "macro_f1": sk.f1_score(labels, guessed, average="macro"),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, guessed),
            "log_loss": sk.log_loss(labels, scores),
        }
    )
    assert validation_metrics(np.zeros(3, dtype=np.int64), scores[:3, :2])["auroc"] is None


def test_a_setting_that_diverges_costs_itself_alone(store: MemoryStore) -> None:
    found = sweep(store, COHORT, {"optimizer.lr": [1e-3, 1e30]}, **OPTIONS | {"scheduler": "constant"})
    states = {trial.setting.values["optimizer.lr"]: trial.state for trial in found.trials}
    assert states == {1e-3: "complete", 1e30: "failed"}
    assert [trial.setting.values["optimizer.lr"] for trial in found.chosen] == [1e-3] * 3
    (warning,) = (text for text in found.metrics["warnings"] if "1e+30" in text)
    assert "failed in 3 folds and was not chosen there" in warning
    with pytest.raises(RunError, match=r"got no setting that could be trained in fold 0 \(the first said: .*loss"):
        sweep(store, COHORT, {"optimizer.lr": [1e30, 1e31]}, **OPTIONS | {"scheduler": "constant"})


def test_best_yaml_is_a_whole_configuration_for_training(listed: Sweep, folder: Path) -> None:
    assert compose_config([], folder / "best.yaml") == listed.best.config
    text = (folder / "best.yaml").read_text(encoding="utf-8")
    assert text.startswith("# The setting of the best mean validation auroc")
    first = _table(folder / "settings.csv")[0]
    assert {key: first[key] for key in LISTS} == {k: str(v) for k, v in listed.best.values.items()}


@pytest.mark.parametrize(
    "texts",
    [
        ["head=abmil,mean", "head.dropout=0.3", "optimizer.lr=1e-4,1e-3"],
        ["recipe=fast,strong", "optimizer.weight_decay=interval(1e-4,1e-1)", "optimizer.betas=[0.9,0.99],[0.8,0.9]"],
        ["optimizer=adamw,sgd", "optimizer.lr=0.01,0.1", "epochs=int(interval(2,9))", "target='\"a: b\"'"],
    ],
)
def test_the_saved_configuration_gives_the_same_settings(tmp_path: Path, texts: list[str]) -> None:
    given = {"store": str(tmp_path / "a b.zarr"), "target": "x"} if "recipe" in texts[0] else {}
    config = compose_sweep(texts, None, given, method="random", trials=4, select="macro_f1", seed=3)
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    again = compose_sweep([], tmp_path / "config.yaml")
    assert (again.space, again.method, again.trials, again.select, again.seed) == (
        config.space,
        "random",
        4,
        "macro_f1",
        3,
    )
    assert [s.config for s in again.settings()] == [s.config for s in config.settings()]
    # what is given goes before the file: one dimension less, another metric
    key = texts[-1 if "=int" not in texts[2] else 0].partition("=")[0] if len(texts) < 4 else ""
    value = config.settings()[0].values.get(key)
    if value is not None and not isinstance(value, list):
        less = compose_sweep([f"{key}={value}"], tmp_path / "config.yaml", select="auroc")
        assert key not in {dimension.key for dimension in less.space}
        assert less.select == "auroc"


@pytest.mark.parametrize(
    ("texts", "options", "match"),
    [
        (["optimizer.lrr=1e-4,1e-3"], {}, r"unknown key optimizer.lrr → .* did you mean 'optimizer.lr'"),
        (["head=abmil,meen"], {}, r"unknown option head=meen → .* did you mean 'mean'"),
        (["optimizer.lr=1e-4,-1"], {}, r"got optimizer.lr=-1.0 → expected above 0"),
        (["optimizer.lr=interval(-1,1)"], {}, r"got optimizer.lr=-1.0 → expected above 0"),
        (["epochs=interval(1.5,3)"], {}, r"expected whole numbers → write epochs=interval\(2,3\)"),
        (["head=abmil,mean", "head.gated=true,false"], {}, r"unknown key head.gated"),
        (["epochs=3"], {}, r"got nothing to sweep → .* or use mil train"),
        (["epochs=3,4"], {"method": "gird"}, r"got method gird → .* did you mean 'grid'"),
        (["epochs=3,4"], {"select": "auc"}, r"got select auc → expected one of auroc, .* did you mean 'auroc'"),
        (["epochs=3,4"], {"trials": 3}, r"got trials 3 for a grid → a grid trains all of its 2 settings"),
        (["epochs=3,4"], {"method": "random", "trials": 0}, r"got trials 0 → expected a whole number of 1 or more"),
        (["l1=interval(0,1)"], {"method": "grid"}, r"got method grid with an interval of l1"),
        (["epochs=3,4", "track=[wandb]"], {}, r"got track=\['wandb'\] → a sweep tells no tracker"),
        (["epochs=3,4", "folds=1"], {}, r"got folds=1 → expected at least 2"),
    ],
)
def test_wrong_input_is_told_before_anything_is_trained(texts: list[str], options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        compose_sweep(texts, **options)


def test_a_drawn_setting_is_the_one_that_hydra_composes() -> None:
    texts = ["optimizer.lr=interval(1e-5,1e-2)", "optimizer.weight_decay=interval(0,0.1)", "l1=interval(0,1e-3)"]
    texts += [
        "head=mean,abmil",
        "head.dropout=interval(0,0.5)",
        "head.embed_dim=interval(4,9)",
        "standardize=train,none",
    ]
    config = compose_sweep([*texts, "augment=gentle"], trials=3)
    for values in draw_settings(config.space, 3, 0):
        composed = compose_config(["augment=gentle", *(override_text(key, value) for key, value in values.items())])
        assert config.setting(values).config == composed
    with pytest.raises(ConfigError, match=r"got optimizer.lr=-1.0"):
        config.setting(values | {"optimizer.lr": -1.0})


def test_a_key_is_swept_or_given_not_both() -> None:
    for values in ({"epochs": 3}, {"optimizer": {"lr": 1e-3}}, {"head": "abmil"}, {"head": {"name": "abmil"}}):
        with pytest.raises(ConfigError, match=r"both to sweep and with one value"):
            compose_sweep(
                values=values, space={"epochs": [2, 3], "optimizer.lr": [1e-3, 1e-2], "head": ["mean", "max"]}
            )
    config = compose_sweep(values={"head": {"dropout": 0.4}}, space={"head": ["mean", "max"]})
    assert [each.config.head.keywords["dropout"] for each in config.settings()] == [0.4, 0.4]


def test_defaults_follow_the_space() -> None:
    assert compose_sweep(["epochs=3,4"]).method == "grid"
    assert compose_sweep(["epochs=3,4"]).trials is None
    config = compose_sweep(["epochs=3,4", "l1=interval(0,1)"])
    assert (config.method, config.trials, config.select) == ("tpe", 20, "auroc")


def test_a_fold_whose_validation_parts_hold_one_class_cannot_choose_by_auroc(store: MemoryStore) -> None:
    few = COHORT.subset([*range(8), 10])
    with pytest.raises(SplitError, match=r"got select auroc, which the validation parts of fold \d cannot tell"):
        sweep(store, few, LISTS, **OPTIONS | {"seeds": 1, "validation_fraction": 0.15})
    # log-loss can
    assert sweep(store, few, LISTS, select="log_loss", **OPTIONS | {"seeds": 1, "validation_fraction": 0.15}).chosen


# ----------------------------------------------------------------------------------------------- tables and figures


def test_the_folder_is_read_by_comparisons(listed: Sweep, store: MemoryStore, folder: Path) -> None:
    read = read_outcomes(RunFolder.open(folder))
    np.testing.assert_allclose(read.predicted, listed.predictions.out_of_fold(), atol=1e-8)
    train(store, COHORT, head="mean", **OPTIONS).save(folder.parent / "mean")
    comparison = compare_runs([folder.parent / "mean", folder])
    assert comparison.rows[1].head == "sweep of head, optimizer.lr"
    assert comparison.rows[1].p_t_test is not None


def _trials(texts: list[str], score: Any, n: int = 60) -> tuple[Any, list[Trial]]:
    space, _ = parse_space(texts)
    rng, config = np.random.default_rng(0), TrainConfig()
    found = []
    for at in range(n):
        values = {dimension.key: dimension.draw(rng) for dimension in space}
        auroc = score(values, rng) + 0.3 * (at % 2)
        found.append(Trial(at % 2, at, Setting(values, config), str(at), (SeedScore({"auroc": auroc}),)))
    return space, found


def test_the_share_of_variance_is_that_of_a_one_way_analysis() -> None:
    space, trials = _trials(
        ["head=a,b,c", "l1=interval(1e-5,1e-1)", "ema=0.5,0.9"],
        lambda values, rng: 0.5 + 0.02 * "abc".index(values["head"]) + 0.02 * rng.normal(),
    )
    found = importances(space, trials, "auroc")
    assert found[0].dimension.key == "head"
    for each in found:
        groups = [each.y[(each.x >= level.low) & (each.x <= level.high)] for level in each.levels]
        assert [len(group) for group in groups] == [level.n for level in each.levels]
        n, k = len(each.y), len(groups)
        f = f_oneway(*groups).statistic
        expected = 1 - (n - 1) / (n - k + f * (k - 1))
        assert each.share == pytest.approx(max(0, expected))
        assert [level.median for level in each.levels] == pytest.approx([np.median(group) for group in groups])
    # folds are aligned
    assert found[0].y[::2].mean() == pytest.approx(found[0].y[1::2].mean())


def test_a_dimension_that_decides_all_explains_all() -> None:
    space, trials = _trials(["head=a,b", "ema=0.5,0.9"], lambda values, _: 0.2 * (values["head"] == "b"), n=200)
    by_key = {each.dimension.key: each.share for each in importances(space, trials, "auroc")}
    assert by_key["head"] == pytest.approx(1, abs=0.02)
    assert by_key["ema"] == pytest.approx(0, abs=0.02)
    space, trials = _trials(["head=a,b"], lambda *_: 0.5, n=8)
    assert importances(space, trials, "auroc")[0].share is None


def test_the_figure_is_drawn_with_odd_names() -> None:
    texts = ["head='<a&b>',\"$x_1$\"", "l1=interval(1e-5,1e-1)", "epochs=int(interval(3,4))", "ema=interval(0.2,0.3)"]
    space, trials = _trials(texts, lambda _, rng: rng.uniform(), n=20)
    svg = to_svg(importance_plot(importances(space, trials, "auroc"), "AUROC"))
    words = " ".join(ElementTree.fromstring(svg).itertext())
    for word in ("<a&b>", "$x_1$", "explains", "0.001", "validation AUROC"):
        assert word in words
    assert "mathdefault" not in words


def test_the_page_stands_alone_and_says_what_the_figures_judge(
    listed: Sweep, store: MemoryStore, tmp_path: Path
) -> None:
    hostile = replace(listed.cohort, target="<script>x</script>")
    found = replace(listed, cohort=hostile, metrics=listed.metrics | {"target": hostile.target, "synthetic": True})
    path = write_sweep_page(tmp_path, found)
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "SYNTHETIC DATA" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page
    assert f"{len(listed.splits.seeds)} seeds each" in page
    one = replace(listed.splits, codes=listed.splits.codes[:, :1], seeds=(0,))
    assert "folds, 1 seed each" in " ".join(write_sweep_page(tmp_path, replace(found, splits=one)).read_text().split())
    assert PROCEDURE in page.replace("&#39;", "'")
    value = listed.metrics["out_of_fold"]["auroc"]["value"]
    assert f"<td>{value:.3f}</td>" in page
    assert (tmp_path / "figures" / "sensitivity.svg").is_file()


def test_augmentation_and_views_are_swept_too(store: MemoryStore) -> None:
    both = replace(store, recipes={"tiny": FEATURES, "tiny@view-1": FEATURES})
    space = {"views": ["none", "sample"], "augment": ["none", "strong"]}
    found = sweep(both, COHORT, space, backbone="tiny", **OPTIONS | {"seeds": 1, "head": "mean"})
    by_title = {trial.setting.title: trial.scores[0].metrics for trial in _of_fold(found, 0)}
    # the view is the slide itself here
    assert by_title["views=none augment=none"] == by_title["views=sample augment=none"]
    assert by_title["views=none augment=none"] != by_title["views=none augment=strong"]


def test_a_best_value_at_the_end_is_told(listed: Sweep, store: MemoryStore) -> None:
    found = sweep(store, COHORT, {"optimizer.lr": [1e-7, 1e-5, 1e-2]}, **OPTIONS)
    assert found.best.values["optimizer.lr"] == 1e-2
    assert (
        "the best optimizer.lr, 0.01, is the highest that was tried: a better one may lie beyond"
        in (found.metrics["warnings"])
    )
