"""Sweeps: settings chosen on validation parts inside every outer fold, and the choosing judged on its test part.

In each fold every setting is trained with all seeds on the training part, stopped early and scored on the validation
parts. The best one predicts the fold's test part; no other setting ever does. The out-of-fold figures are therefore
those of the procedure, the search included (nested; Cawley and Talbot, On Over-fitting in Model Selection, JMLR 2010),
where the figures of the best of many settings would be too good.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.store import Store, open_store
from mil.bags.bags import choose_entry, needs_coords, open_bags, place_bags
from mil.bags.forward import resolve_device
from mil.cohort.cohort import Cohort, join_store, read_cohort
from mil.cohort.targets import CLASSIFICATION, SURVIVAL
from mil.config.preflight import missing_inputs
from mil.config.train import TrainConfig
from mil.errors import RunError, SplitError
from mil.evaluation.headlines import LOWER_IS_BETTER, tie_breaker
from mil.evaluation.predictions import Outcomes
from mil.evaluation.scoring import evaluate_out_of_fold
from mil.evaluation.tables import out_of_fold_rows
from mil.experiments.crossval import check_target, is_synthetic, split_plan
from mil.files import Row, write_atomically, write_csv
from mil.runs.folders import check_sweep_folder
from mil.runs.look_ledger import Look
from mil.runs.run import ReplicaPredictions
from mil.splits.plan import split_cohort
from mil.splits.splits import Splits, write_splits
from mil.training.checkpoint import package_versions
from mil.training.resume import discard_unfinished
from mil.tuning.importance import Sensitivity, sensitivities
from mil.tuning.search_space import Dimension, override_text, value_name
from mil.tuning.sweep_config import CHOSEN, Setting, SweepConfig, compose_sweep
from mil.tuning.tpe import TpeStudy, forget_studies, require_optuna
from mil.tuning.trials import (
    COMPLETE,
    PRUNED,
    OnSweepProgress,
    SweepData,
    Trial,
    TrialTrainer,
    best_trial,
    describe_failures,
    rank_of,
    score_validation,
)

PROCEDURE = (
    "The out-of-fold figures judge the whole procedure, the search included: the test slides of each fold were "
    "predicted by the setting that the fold's own validation parts chose. They are the figures of no single setting."
)
UNFINISHED, STUDY = "unfinished", "study.log"
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SettingAverage:
    """A setting that was trained in every fold.

    Attributes:
        setting: which.
        score: mean over folds of the mean validation score over seeds.
        loss: the same of the loss, which decides between equal scores; of classes it is the log-loss. None where
            settings differ in their loss.
        n_chosen: folds that chose it.
    """

    setting: Setting
    score: float
    loss: float | None
    n_chosen: int


@dataclass(frozen=True, eq=False)
class Sweep:
    """A finished sweep.

    Attributes:
        config: what was asked for.
        cohort: the slides that were used.
        splits: their parts.
        trials: every setting in every fold that tried it.
        chosen: one trial a fold.
        averages: settings that were trained in all folds, the best first.
        sensitivities: the dimensions, those that explain most of the validation score first.
        predictions: of the chosen settings' replicas alone.
        metrics: the content of ``metrics.json``.
        folder: where it was written, or None.

    Example:
        >>> found = sweep(store, cohort, {"optimizer.lr": [1e-4, 1e-3]})         # doctest: +SKIP
        >>> found.best.values, found.metrics["out_of_fold"]["auroc"]["value"]    # doctest: +SKIP
        ({'optimizer.lr': 0.001}, 0.83)
    """

    config: SweepConfig
    cohort: Cohort
    splits: Splits
    trials: tuple[Trial, ...]
    chosen: tuple[Trial, ...]
    averages: tuple[SettingAverage, ...]
    sensitivities: tuple[Sensitivity, ...]
    predictions: ReplicaPredictions
    metrics: dict[str, Any]
    folder: Path | None = None

    @property
    def best(self) -> Setting:
        """The setting with the best mean over the validation parts of all folds: the one to train for new slides."""
        return self.averages[0].setting


def sweep(
    store: Store,
    cohort: Cohort,
    space: Mapping[str, Any],
    out: str | Path | None = None,
    *,
    method: str | None = None,
    trials: int | None = None,
    select: str | None = None,
    seed: int | None = None,
    progress: OnSweepProgress | None = None,
    **options: Any,
) -> Sweep:
    """Choose settings on validation parts within every fold, and judge the choosing on the test parts.

    Args:
        store: holds the embeddings.
        cohort: slides, patients and labels; slides that the store lacks are left out and listed.
        space: a list of values for each key, such as ``{"head": ["abmil", "mean"]}``, or an interval as text, such as
            ``{"optimizer.lr": "interval(1e-5, 1e-2)"}``.
        out: folder of the sweep; one that was stopped goes on from what it holds. None keeps nothing.
        method: ``grid``, ``random`` or ``tpe``; None takes a grid where all dimensions are lists, and tpe else.
        trials: settings per fold, for random and tpe; None takes 20.
        select: a metric of the task, by default its first: of classes ``auroc`` (the default), ``macro_f1``,
            ``balanced_accuracy`` or ``log_loss``; of others see `mil.cohort.targets.HEADLINES`.
        seed: of random draws and of the search.
        progress: called as replicas and epochs are done.
        **options: any other field of `TrainConfig`, for all settings: ``folds=5, seeds=3, epochs=20``.

    Raises:
        ConfigError: an unknown key, value or option, or nothing to sweep.
        MissingExtraError: tpe without Optuna.
        CohortError, SplitError, BagError: as in `mil.train`. A setting whose loss diverges costs itself alone.
        RunError: ``out`` holds something else than an unfinished sweep, or every setting failed.

    Example:
        >>> mil.sweep(store, cohort, {"optimizer.lr": [1e-4, 1e-3]}, out="sweeps/lr")       # doctest: +SKIP
    """
    values = {"store": str(store.path), "target": cohort.target, "task": cohort.task} | options
    config = compose_sweep(values=values, space=space, method=method, trials=trials, select=select, seed=seed)
    if out is not None:
        return _sweep(store, cohort, config, Path(out).absolute(), progress)
    with tempfile.TemporaryDirectory() as folder:
        return replace(_sweep(store, cohort, config, Path(folder), progress), folder=None)


def run_sweep(config: SweepConfig, out: str | Path, progress: OnSweepProgress | None = None) -> Sweep:
    """Sweep as a configuration says, into the folder ``out``.

    Raises:
        ConfigError: store, labels or target is not given.
        MilError, ExtractError: as in `sweep`.
    """
    train = config.train
    if train.store is None or train.labels is None or train.target is None:
        raise missing_inputs(train.to_dict(), "a sweep")
    cohort = read_cohort(train.labels, train.target, train.slide_column, train.patient_column, task=train.task)
    return _sweep(open_store(train.store), cohort, config, Path(out).absolute(), progress)


def _sweep(store: Store, cohort: Cohort, config: SweepConfig, folder: Path, progress: OnSweepProgress | None) -> Sweep:
    # what can be refused is refused before the hours of training
    for each in config.checked:
        check_target(each, cohort)
    settings = config.settings() if config.method != "tpe" else None
    if settings is None:
        require_optuna()
    check_sweep_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entry = choose_entry(store, config.train.backbone)
    data = _open(store, cohort, config, entry)
    warnings = _check_select(data, config.select)
    write_atomically(folder / "config.yaml", config.to_yaml().encode())
    n_replicas = _count(config, settings, data.splits)
    trainer = TrialTrainer(data, folder / UNFINISHED, n_replicas, progress, config.shares_loss)
    if settings is not None:
        trials = _train_listed(trainer, settings, config)
    else:
        trials = _search(trainer, config, folder / STUDY)
    chosen = _choose(trials, data.splits, config.select)
    averages = _average(trainer, trials, chosen, config)
    tested = [each for trial in chosen for each in trainer.test(trial)]
    parts = np.stack([data.splits.parts(each.replica.fold, each.replica.seed) for each in tested])
    scores = np.stack([each.probabilities for each in tested])
    found = Sweep(
        config=config,
        cohort=data.cohort,
        splits=data.splits,
        trials=tuple(trials),
        chosen=tuple(chosen),
        averages=tuple(averages),
        sensitivities=tuple(sensitivities(config.space, trials, config.select)),
        predictions=ReplicaPredictions(
            data.cohort, tuple(each.replica for each in tested), parts, scores, tuple(each.task for each in tested)
        ),
        metrics={},
        folder=folder,
    )
    warnings += [*describe_failures(trials), *_warn_of_edges(config.space, averages[0].setting)]
    metrics = _metrics(found, entry, warnings) | {"synthetic": is_synthetic(store, data.cohort.slide_ids)}
    return _write(folder, replace(found, metrics=metrics), entry)


# --------------------------------------------------------------------------------------------------------- preparing


def _open(store: Store, cohort: Cohort, config: SweepConfig, entry: str) -> SweepData:
    train = config.train
    device = resolve_device(train.device)
    cohort = join_store(cohort, store.slide_ids(entry))
    splits = split_cohort(cohort, split_plan(train))
    positions = any(needs_coords(each.head.keywords) for each in config.checked)
    views = any(each.views == "sample" for each in config.checked)
    bags = open_bags(store, cohort.slide_ids, entry, train.memory, positions, views)
    return SweepData(place_bags(bags, device) if train.memory == "auto" else bags, cohort, splits, device)


def _check_select(data: SweepData, select: str) -> list[str]:
    """Refuse a metric that a fold cannot choose by; warn of validation parts that cannot tell it.

    Raises:
        SplitError: no validation part of a fold has the classes, labels, numbers or events for the metric.
    """
    cohort, warnings = data.cohort, []
    lack = "hold one class each" if cohort.values is None else "lack answers, numbers or events that differ"
    instead = "give --select log_loss, raise" if cohort.values is None else "raise"
    for fold in range(data.splits.n_folds):
        undefined = []
        for seed in data.splits.seeds:
            within = cohort.subset(np.flatnonzero(data.splits.parts(fold, seed) == "validation"))
            if score_validation(Outcomes(within, _any_said(within)))[select] is None:
                undefined.append(seed)
        if len(undefined) == len(data.splits.seeds):
            raise SplitError(
                f"got select {select}, which the validation parts of fold {fold} cannot tell, since they {lack} → "
                f"{instead} validation_fraction, or lower folds"
            )
        if undefined:
            seeds = ", ".join(map(str, undefined))
            what = "one class" if cohort.values is None else "too little"
            warnings.append(f"fold {fold} chose without seed {seeds}: {what} in the validation part, no {select}")
    return warnings


def _any_said(cohort: Cohort) -> FloatArray:
    """Predictions that differ, [n, values], as some metrics need."""
    n_values = {CLASSIFICATION: len(cohort.class_names), SURVIVAL: 1}.get(cohort.task, len(cohort.columns))
    return np.random.default_rng(0).random((len(cohort), n_values))


def _count(config: SweepConfig, settings: Sequence[Setting] | None, splits: Splits) -> int:
    """Replicas at most."""
    inside = splits.n_folds * len(splits.seeds)
    if settings is not None:
        return len(settings) * inside
    # a search ends with the chosen settings in all other folds
    return ((config.trials or 0) + splits.n_folds - 1) * inside


# ---------------------------------------------------------------------------------------------------------- searching


def _train_listed(trainer: TrialTrainer, settings: Sequence[Setting], config: SweepConfig) -> list[Trial]:
    """Train every setting of a list in every fold."""
    splits = trainer.data.splits
    pairs = [(fold, seed) for fold in range(splits.n_folds) for seed in splits.seeds]
    trials = []
    for number, setting in enumerate(settings):
        trainer.train(setting, pairs, f"setting {number + 1} of {len(settings)}: {setting.title}")
        for fold in range(splits.n_folds):
            trial = trainer.trial(fold, number, setting, splits.seeds)
            trainer.keep_if_best(trial, config.select)
            trials.append(trial)
    return sorted(trials, key=lambda trial: (trial.fold, trial.number))


def _search(trainer: TrialTrainer, config: SweepConfig, file: Path) -> list[Trial]:
    """Search settings in every fold by what that fold's validation parts have shown."""
    forget_studies(file)
    trials: list[Trial] = []
    for fold in range(trainer.data.splits.n_folds):
        seed = int(np.random.default_rng((config.seed, fold)).integers(2**31))
        study = TpeStudy(config.space, f"fold{fold}", file, seed, config.select not in LOWER_IS_BETTER)
        known: dict[str, Trial] = {}
        for number in range(config.trials or 0):
            trial = _next_trial(trainer, study, config, fold, number, known)
            if trial is not None:
                known[trial.key] = trial
                trainer.keep_if_best(trial, config.select)
        trials += known.values()
    return trials


def _next_trial(
    trainer: TrialTrainer, study: TpeStudy, config: SweepConfig, fold: int, number: int, known: Mapping[str, Trial]
) -> Trial | None:
    """Train what the search asks for; None where that was tried before."""
    token, values = study.ask()
    setting = config.setting(values)
    earlier = known.get(trainer.key(setting.config))
    what = f"fold {fold}, trial {number + 1} of {config.trials}: {setting.title}"
    if earlier is not None:
        trainer.skip(len(trainer.data.splits.seeds), what)
        study.tell(token, earlier.mean(config.select), earlier.state == PRUNED)
        return None
    trial = _train_until_hopeless(trainer, study, token, config.select, (fold, number, setting), what)
    study.tell(token, trial.mean(config.select), trial.state == PRUNED)
    return trial


def _train_until_hopeless(
    trainer: TrialTrainer, study: TpeStudy, token: Any, select: str, of: tuple[int, int, Setting], what: str
) -> Trial:
    """Train a setting seed by seed, until it fails or falls behind the median of earlier ones."""
    fold, number, setting = of
    seeds = trainer.data.splits.seeds
    for step in range(len(seeds)):
        trainer.train(setting, [(fold, seeds[step])], what)
        trial = trainer.trial(fold, number, setting, seeds[: step + 1])
        score, rest = trial.mean(select), len(seeds) - step - 1
        if trial.state != COMPLETE or not rest:
            trainer.skip(rest, what)
            return trial
        if score is not None and study.is_hopeless(token, step, score):
            trainer.skip(rest, what)
            return trainer.trial(fold, number, setting, seeds[: step + 1], PRUNED)
    raise RuntimeError("a trial has seeds")


def _choose(trials: Sequence[Trial], splits: Splits, select: str) -> list[Trial]:
    """The best trial of each fold.

    Raises:
        RunError: every setting failed in some fold.
    """
    chosen = []
    for fold in range(splits.n_folds):
        own = [trial for trial in trials if trial.fold == fold]
        best = best_trial(own, select)
        if best is None:
            reason = next((trial.reason for trial in own if trial.reason), "no score")
            raise RunError(
                f"got no setting that could be trained in fold {fold} (the first said: {reason}) → expected one at "
                f"least → sweep other values, such as lower learning rates, with a new --out"
            )
        chosen.append(best)
    return chosen


def _average(
    trainer: TrialTrainer, trials: Sequence[Trial], chosen: Sequence[Trial], config: SweepConfig
) -> list[SettingAverage]:
    """Settings by their mean over all folds, the best first.

    A search tries other settings in every fold; what it chose in one is trained in the others here, for this average
    alone: the choices of the folds stand.
    """
    splits = trainer.data.splits
    candidates = {trial.key: trial.setting for trial in (trials if config.method != "tpe" else chosen)}
    kept = {(trial.key, trial.fold) for trial in chosen}
    found = []
    for key, setting in candidates.items():
        pairs = [(fold, seed) for fold in range(splits.n_folds) for seed in splits.seeds if (key, fold) not in kept]
        if config.method == "tpe":
            trainer.train(setting, pairs, f"chosen setting in the other folds: {setting.title}")
        own = [trainer.trial(fold, 0, setting, splits.seeds) for fold in range(splits.n_folds)]
        score, loss = _mean_of([trial.mean(config.select) for trial in own]), _mean_of([trial.loss for trial in own])
        n_chosen = sum((key, fold) in kept for fold in range(splits.n_folds))
        if score is not None:
            found.append(SettingAverage(setting, score, loss, n_chosen))
    if not found:
        raise RunError(
            "got no setting that could be trained in every fold → expected one at least → sweep other values, such as "
            "lower learning rates, with a new --out"
        )
    return sorted(found, key=lambda each: rank_of(each.score, each.loss, config.select))


def _mean_of(values: Sequence[float | None]) -> float | None:
    """None where one is missing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


# ------------------------------------------------------------------------------------------------------------ results


def _warn_of_edges(space: Sequence[Dimension], best: Setting) -> Iterator[str]:
    """Numbers whose best is at an end of what was tried: a better one may lie beyond."""
    for dimension in space:
        value = best.values[dimension.key]
        end = dimension.end_of(value)
        if end:
            text = f"the best {dimension.key}, {value_name(value)}, is the {end} that was tried"
            yield f"{text}: a better one may lie beyond"


def _metrics(found: Sweep, entry: str, warnings: Sequence[str]) -> dict[str, Any]:
    """The content of ``metrics.json``; the test parts are scored here, once."""
    config = found.config
    cohort = found.cohort
    out_of_fold = evaluate_out_of_fold(found.predictions)
    validation = [trial.mean(config.select) for trial in found.chosen]
    section = {
        "method": config.method,
        "select": config.select,
        "seed": config.seed,
        "space": {dimension.key: dimension.plain() for dimension in config.space},
        "n_settings": len({trial.key for trial in found.trials}),
        "n_trials": len(found.trials),
        "n_pruned": sum(trial.state == PRUNED for trial in found.trials),
        "chosen": [dict(trial.setting.values) for trial in found.chosen],
        "chosen_validation": float(np.mean([score for score in validation if score is not None])),
        "best": dict(found.best.values),
        "best_validation": found.averages[0].score,
        "explained": {each.dimension.key: each.share for each in found.sensitivities},
        "note": PROCEDURE,
    }
    return {
        "target": cohort.target,
        "task": cohort.task,
        "class_names": list(cohort.class_names) if cohort.values is None else [],
        "head": f"sweep of {', '.join(dimension.key for dimension in config.space)}",
        "entry": entry,
        "n_replicas": len(found.predictions.replicas),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "split": found.splits.record.to_dict(),
        "cohort": {"attrition": [[reason, count, list(ids)] for reason, count, ids in cohort.attrition.rows()]},
        "warnings": [*found.splits.warnings, *out_of_fold["warnings"], *warnings],
        "looks": 1,
        "out_of_fold": out_of_fold,
        "sweep": section,
    }


def _write(folder: Path, found: Sweep, entry: str) -> Sweep:
    """Write what a sweep found; ``metrics.json``, which says that it is whole, comes last."""
    look = Look.at(folder, found.cohort, found.metrics["head"], entry)
    found = replace(found, metrics=found.metrics | {"looks": look.count_earlier() + 1})
    write_splits(folder / "splits.csv", found.splits, found.cohort)
    write_csv(folder / "trials.csv", _trial_rows(found))
    write_csv(folder / "chosen.csv", _chosen_rows(found))
    write_csv(folder / "settings.csv", _setting_rows(found))
    write_atomically(folder / "best.yaml", best_yaml(found).encode())
    write_csv(folder / "predictions.csv", found.predictions.rows())
    write_csv(folder / "oof.csv", out_of_fold_rows(*found.predictions.tested(), found.predictions.task))
    look.append()
    text = json.dumps(found.metrics, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "metrics.json", text.encode())
    discard_unfinished(folder / UNFINISHED)
    return found


def best_yaml(found: Sweep) -> str:
    """The best setting as a whole configuration for `mil train`, with a word on what it may be used for."""
    best, select = found.averages[0], found.config.select
    config: TrainConfig = best.setting.config
    head = [
        f"The setting of the best mean validation {select}, {best.score:.4g}, over all folds: {best.setting.title}",
        CHOSEN,
        "What it scores out of fold on this cohort is too good; the honest figure is that of the sweep.",
    ]
    return "".join(f"# {line}\n" for line in head) + config.to_yaml()


def _cells(setting: Setting) -> list[str]:
    """The values of a setting as an override has them."""
    return [override_text(key, value).partition("=")[2] for key, value in setting.values.items()]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _trial_rows(found: Sweep) -> Iterator[Row]:
    select, seeds = found.config.select, found.splits.seeds
    keys = [dimension.key for dimension in found.config.space]
    seed_columns = [f"{select}_seed{seed}" for seed in seeds]
    loss = f"mean_{tie_breaker(found.cohort.task)}"
    yield ("fold", "trial", *keys, "state", f"mean_{select}", *seed_columns, loss, "seconds", "reason")
    for trial in found.trials:
        scores = [_number(score.metrics.get(select)) for score in trial.scores]
        scores += [""] * (len(seeds) - len(scores))
        means = [_number(trial.mean(select)), _number(trial.loss)]
        where = (trial.fold, trial.number, *_cells(trial.setting), trial.state)
        yield (*where, means[0], *scores, means[1], f"{trial.seconds:.3f}", trial.reason)


def _chosen_rows(found: Sweep) -> Iterator[Row]:
    select = found.config.select
    yield ("fold", "trial", *(dimension.key for dimension in found.config.space), f"validation_{select}")
    for trial in found.chosen:
        yield (trial.fold, trial.number, *_cells(trial.setting), _number(trial.mean(select)))


def _setting_rows(found: Sweep) -> Iterator[Row]:
    """Settings that were trained in all folds, the best first."""
    keys = [dimension.key for dimension in found.config.space]
    loss = f"mean_validation_{tie_breaker(found.cohort.task)}"
    yield (*keys, f"mean_validation_{found.config.select}", loss, "folds_that_chose_it")
    for each in found.averages:
        yield (*_cells(each.setting), _number(each.score), _number(each.loss), each.n_chosen)
