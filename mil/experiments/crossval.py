"""Cross-validated training: from a store and a cohort to out-of-fold metrics."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from extract.store import Store, open_store, to_dict
from mil.bags.bags import Bags, place_bags
from mil.bags.devices import resolve_device
from mil.bags.duplicates import warn_of_duplicates
from mil.bags.stored import choose_entry, is_synthetic, needs_coords, open_bags
from mil.cohort.cohort import Cohort
from mil.cohort.joining import join_store
from mil.cohort.targets import target_columns
from mil.config.compose import compose_config
from mil.config.preflight import missing_inputs, read_labels
from mil.config.train import TrainConfig
from mil.errors import ConfigError
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.evaluation.scoring import score_replica
from mil.experiments.tracking import Tracking
from mil.experiments.warm_start import check_initial
from mil.runs.run import Run, check_folder
from mil.splits.plan import SplitPlan, split_cohort
from mil.splits.splits import Splits
from mil.statistics.calibration import evaluate_calibration
from mil.training.checkpoint import load_checkpoint, package_versions, require_recipes
from mil.training.replica import Replica, TrainedReplica
from mil.training.replicas import OnProgress, Progress, train_replicas
from mil.training.resume import UnfinishedTraining, discard_unfinished, training_key, unfinished_folder
from mil.training.tasks import count_outputs


def train(
    store: Store,
    cohort: Cohort,
    head: str | Mapping[str, Any] | None = None,
    folds: int = 5,
    seeds: int | Sequence[int] = 3,
    progress: OnProgress | None = None,
    **options: Any,
) -> Run:
    """Train and evaluate one head by patient-grouped cross-validation.

    Args:
        store: holds the embeddings.
        cohort: slides, patients and labels; slides that the store lacks are left out and listed.
        head: its name, or a mapping with ``name`` and keywords; by default ABMIL, or that of a ``recipe=``.
        folds: number of folds.
        seeds: how many seeds per fold, or which.
        progress: called after each epoch and each replica.
        **options: any other field of `TrainConfig`: ``epochs=20``, ``optimizer={"lr": 1e-3}``. Trackers are told of
            curves and metrics, not of files.

    Raises:
        ConfigError: an unknown option or an impossible value.
        CohortError, SplitError, BagError, TrainingDivergedError: see `join_store`, `make_splits`, `open_bags`,
            `train_replicas`.
    """
    seeds = seeds if isinstance(seeds, int) else list(seeds)
    given = {"store": store.path, "target": cohort.target, "task": cohort.task, "folds": folds, "seeds": seeds}
    chosen = {} if head is None else {"head": head}
    config = compose_config(values=given | chosen | options)
    with _tracked(config, f"{config.head.name} on {cohort.target}", Path.cwd()) as tracking:
        run = cross_validate(store, cohort, config, _told(tracking, progress))
        tracking.log_metrics(run.metrics)
    return run


def run_training(
    config: TrainConfig,
    out: str | Path,
    progress: OnProgress | None = None,
    overwrite: bool = False,
    complete: Callable[[Path], None] | None = None,
) -> Run:
    """Train as a configuration says and write the run folder ``out``.

    What is done is kept in `unfinished_folder`, so that the same call goes on after one that was stopped or killed:
    replicas that were finished are not trained again, another goes on from its last saved epoch, and the numbers are
    those of a training in one go.

    Args:
        config: what to train; the tools of its ``track`` are told.
        out: the run folder.
        progress: called after each epoch and each replica.
        overwrite: replace an earlier run there.
        complete: adds files to the run folder before it is put in its place, such as a report.

    Raises:
        ConfigError: store, labels or target is not given.
        RunError: ``out`` exists and is not empty, unless ``overwrite``.
        MilError, ExtractError: as in `train`.
    """
    if config.store is None or config.labels is None or config.target is None:
        raise missing_inputs(vars(config), "a training")
    # before the hours of training, not after
    folder = Path(out).absolute()
    check_folder(folder, overwrite)
    unfinished = unfinished_folder(folder)
    cohort = read_labels(config)
    with _tracked(config, folder.name, folder.parent) as tracking:
        run = cross_validate(open_store(config.store), cohort, config, _told(tracking, progress), unfinished)
        run = run.save(folder, overwrite, complete)
        discard_unfinished(unfinished)
        tracking.log_metrics(run.metrics)
        tracking.log_files(folder)
    return run


@contextmanager
def _tracked(config: TrainConfig, name: str, folder: Path) -> Iterator[Tracking]:
    """The trackers of a training, told of its end however it ends."""
    tracking = Tracking(config.track, name, config.to_dict(), folder, config.track_files)
    try:
        yield tracking
    except BaseException:
        tracking.close(failed=True)
        raise
    tracking.close()


def _told(tracking: Tracking, progress: OnProgress | None) -> OnProgress:
    """Progress that trackers hear of too."""

    def tell(step: Progress) -> None:
        if step.record is not None:
            tracking.log_epoch(step.replica.name, step.record)
        if progress is not None:
            progress(step)

    return tell


def cross_validate(
    store: Store,
    cohort: Cohort,
    config: TrainConfig,
    progress: OnProgress | None = None,
    unfinished: Path | None = None,
    bags: Bags | None = None,
) -> Run:
    """Train every fold and seed of a configuration, and score the test folds once.

    Args:
        store: holds the embeddings.
        cohort: slides, patients and labels; slides that the store lacks are left out and listed.
        config: what to train; its `store` and `labels` are not read, its `task` and `target` are those of the cohort.
        progress: called after each epoch and each replica.
        unfinished: folder that keeps what is done until the run is saved; a training that was stopped goes on from it.
        bags: those of the cohort's slides, where they are open already.

    Raises:
        MilError, ExtractError: as in `train`.
    """
    check_target(config, cohort)
    entry = choose_entry(store, config.backbone)
    device = resolve_device(config.device)
    if config.init is not None:
        where = f"entry {entry!r} of {store.path}"
        require_recipes(load_checkpoint(config.init)[1], store.feature_recipe(entry), store.tile_recipe, where)
    cohort = join_store(cohort, store.slide_ids(entry))
    cautions = check_initial(config, cohort.slide_ids, cohort.patient_ids)
    splits = split_cohort(cohort, split_plan(config))
    if bags is None:
        positions, views = needs_coords(config.head.keywords), config.views == "sample"
        bags = open_bags(store, cohort.slide_ids, entry, config.memory, positions, views)
    bags = place_bags(bags, device) if config.memory == "auto" else bags
    cautions += tuple(warn_of_duplicates(bags.moments, cohort.slide_ids, cohort.patient_ids))
    replicas = [Replica(fold, seed, config) for fold in range(splits.n_folds) for seed in config.seeds]
    parts = np.stack([splits.parts(replica.fold, replica.seed) for replica in replicas])
    key = training_key(config, cohort, splits, bags, device)
    kept = UnfinishedTraining(unfinished, key) if unfinished is not None else None
    n_outputs = count_outputs(config, cohort)
    trained = train_replicas(
        bags, cohort.targets, replicas, list(parts), n_outputs, device, progress, kept, cohort.patient_ids
    )
    predictions = ReplicaPredictions(cohort, tuple(replicas), parts, np.stack([each.values for each in trained]))
    return Run(
        config=config,
        cohort=cohort,
        splits=splits,
        trained=tuple(trained),
        predictions=predictions,
        metrics=_metrics(config, splits, trained, predictions, entry, cautions)
        | {"synthetic": is_synthetic(store, cohort.slide_ids), "key": key},
        entry=entry,
        recipes=(to_dict(store.feature_recipe(entry)), to_dict(store.tile_recipe)),
    )


def check_target(config: TrainConfig, cohort: Cohort) -> None:
    """Refuse a configuration of another target than the cohort's.

    Raises:
        ConfigError: as said.
    """
    named = target_columns(config.task, config.target or "")
    if config.task != cohort.task or (not cohort.has_classes and named != cohort.columns):
        raise ConfigError(
            f"got task={config.task} target={config.target} for a cohort of task {cohort.task}, target {cohort.target} "
            f"→ expected the same → read the cohort with task={config.task!r}, or set task={cohort.task}"
        )


def split_plan(config: TrainConfig) -> SplitPlan:
    """How a configuration splits."""
    return SplitPlan(
        method=config.split,
        folds=config.folds,
        repeats=config.repeats,
        split_seed=config.split_seed,
        seeds=config.seeds,
        validation_fraction=config.validation_fraction,
        sites=config.sites,
        column=config.split_column,
        file=config.split_file,
        table=config.labels,
        slide_column=config.slide_column,
    )


def _metrics(
    config: TrainConfig,
    splits: Splits,
    trained: Sequence[TrainedReplica],
    predictions: ReplicaPredictions,
    entry: str,
    cautions: Sequence[str],
) -> dict[str, Any]:
    """The content of ``metrics.json``; the test parts are scored here, once."""
    cohort = predictions.cohort
    out_of_fold = predictions.outcomes().evaluate()
    return {
        "target": cohort.target,
        "task": config.task,
        "class_names": list(cohort.stated_classes),
        "head": config.head.name,
        "entry": entry,
        "n_replicas": len(trained),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "split": splits.record.to_dict(),
        "cohort": {"attrition": [[reason, count, list(ids)] for reason, count, ids in cohort.attrition.rows()]},
        "warnings": [*cautions, *splits.warnings, *out_of_fold["warnings"]],
        "looks": 1,
        "out_of_fold": out_of_fold,
        **(_of_classes(predictions) if cohort.has_classes else {}),
        "per_replica": [_replica_metrics(each, predictions, at) for at, each in enumerate(trained)],
    }


def _of_classes(predictions: ReplicaPredictions) -> dict[str, Any]:
    """What only classes have: calibration, and the macro-F1 of each seed alone."""
    cohort, probabilities = predictions.tested()
    calibration = evaluate_calibration(cohort.labels, probabilities, cohort.patient_ids, cohort.class_names)
    return {"calibration": calibration, "seed_macro_f1": list(predictions.seed_scores("macro_f1"))}


def _replica_metrics(trained: TrainedReplica, predictions: ReplicaPredictions, at: int) -> dict[str, Any]:
    """Scores of one replica on its test part, and what it cost."""
    parts = predictions.parts[at]
    return {
        "replica": trained.replica.name,
        "fold": trained.replica.fold,
        "seed": trained.replica.seed,
        "best_epoch": trained.best_epoch,
        "epochs": len(trained.history),
        **score_replica(predictions, at),
        "seconds": round(trained.seconds, 3),
        "parameters": trained.parameters,
        "training_bags": int((parts == "train").sum()),
        "inference_ms_per_slide": round(1000 * trained.inference_seconds / len(parts), 3),
        "peak_bytes": trained.peak_bytes,
    }
