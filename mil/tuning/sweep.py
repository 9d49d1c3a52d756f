"""Sweeps: settings chosen on validation parts inside every outer fold, and the choosing judged on its test part.

In each fold every setting is trained with all seeds on the training part, stopped early and scored on the validation
parts. The best one predicts the fold's test part; no other setting ever does. The out-of-fold figures are therefore
those of the procedure, the search included (nested; Cawley and Talbot, On Over-fitting in Model Selection, JMLR 2010),
where the figures of the best of many settings would be too good.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from extract.store import Store, open_store
from mil.arrays import FloatArray
from mil.bags.bags import place_bags
from mil.bags.devices import resolve_device
from mil.bags.duplicates import warn_of_duplicates
from mil.bags.stored import choose_entry, is_synthetic, needs_coords, open_bags
from mil.cohort.cohort import Cohort
from mil.cohort.joining import join_store
from mil.cohort.targets import CLASSIFICATION, SURVIVAL
from mil.config.preflight import missing_inputs, read_labels
from mil.errors import SplitError
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.experiments.crossval import check_target, split_plan
from mil.files import tell_full_disk, write_atomically
from mil.runs.folders import check_sweep_folder
from mil.splits.plan import split_cohort
from mil.splits.splits import Splits
from mil.tuning.choosing import average_settings, choose_trials, search_settings, train_listed, warn_of_edges
from mil.tuning.importance import importances
from mil.tuning.sweep_config import Setting, SweepConfig, compose_sweep
from mil.tuning.sweep_folder import STUDY, UNFINISHED, Sweep, sweep_metrics, write_sweep
from mil.tuning.tpe import require_optuna
from mil.tuning.trials import (
    OnSweepProgress,
    SweepData,
    TrialTrainer,
    describe_failures,
    score_validation,
)


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
            ``balanced_accuracy`` or ``log_loss``; of others see `mil.evaluation.headlines.HEADLINES`.
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
    cohort = read_labels(train)
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
    same = warn_of_duplicates(data.bags.moments, data.cohort.slide_ids, data.cohort.patient_ids)
    warnings = [*same, *_check_select(data, config.select)]
    with tell_full_disk(folder):
        write_atomically(folder / "config.yaml", config.to_yaml().encode())
    n_replicas = _count(config, settings, data.splits)
    trainer = TrialTrainer(data, folder / UNFINISHED, n_replicas, progress, config.shares_loss)
    if settings is not None:
        trials = train_listed(trainer, settings, config)
    else:
        trials = search_settings(trainer, config, folder / STUDY)
    chosen = choose_trials(trials, data.splits, config.select)
    averages = average_settings(trainer, trials, chosen, config)
    tested = [each for trial in chosen for each in trainer.test(trial)]
    parts = np.stack([data.splits.parts(each.replica.fold, each.replica.seed) for each in tested])
    values = np.stack([each.values for each in tested])
    found = Sweep(
        config=config,
        cohort=data.cohort,
        splits=data.splits,
        trials=tuple(trials),
        chosen=tuple(chosen),
        averages=tuple(averages),
        importances=tuple(importances(config.space, trials, config.select)),
        predictions=ReplicaPredictions(data.cohort, tuple(each.replica for each in tested), parts, values),
        metrics={},
        folder=folder,
    )
    warnings += [*describe_failures(trials), *warn_of_edges(config.space, averages[0].setting)]
    metrics = sweep_metrics(found, entry, warnings) | {"synthetic": is_synthetic(store, data.cohort.slide_ids)}
    return write_sweep(folder, replace(found, metrics=metrics), entry)


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
    lack = "hold one class each" if cohort.has_classes else "lack answers, numbers or events that differ"
    instead = "give --select log_loss, raise" if cohort.has_classes else "raise"
    for fold in range(data.splits.n_folds):
        undefined = []
        for seed in data.splits.seeds:
            within = cohort.subset(np.flatnonzero(data.splits.parts(fold, seed) == "validation"))
            if score_validation(Outcomes(within, _any_predictions(within)))[select] is None:
                undefined.append(seed)
        if len(undefined) == len(data.splits.seeds):
            raise SplitError(
                f"got select {select}, which the validation parts of fold {fold} cannot tell, since they {lack} → "
                f"{instead} validation_fraction, or lower folds"
            )
        if undefined:
            seeds = ", ".join(map(str, undefined))
            what = "one class" if cohort.has_classes else "too little"
            warnings.append(f"fold {fold} chose without seed {seeds}: {what} in the validation part, no {select}")
    return warnings


def _any_predictions(cohort: Cohort) -> FloatArray:
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
