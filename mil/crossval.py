"""Cross-validated training: from a store and a cohort to out-of-fold metrics and a run folder."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from extract.store import Store, open_store, to_dict
from mil import statistics
from mil.bags import choose_entry, open_bags
from mil.checkpoint import CheckpointRecord, package_versions, save_checkpoint
from mil.cohort import Cohort, join_store, read_cohort
from mil.config import TrainConfig, compose_config
from mil.errors import ConfigError, RunError, listed
from mil.evaluation import resolve_device
from mil.files import Row, probability_text, write_atomically, write_csv
from mil.metrics import auroc, balanced_accuracy, confusion, macro_f1
from mil.replicas import OnProgress, train_replicas
from mil.splits import Splits, make_splits, write_splits
from mil.training import EpochRecord, PartArray, Replica, TrainedReplica

LEDGER = "looks.jsonl"
RUN_FILES = frozenset(
    "config.yaml splits.csv predictions.csv history.csv oof.csv metrics.json checkpoints figures report.html".split()  # noqa: SIM905
)
"""What a run folder holds, the report included; nothing else is ever deleted."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ReplicaPredictions:
    """What every replica says about every slide.

    Attributes:
        cohort: the n slides with patients and labels.
        replicas: the R replicas.
        parts: [R, n], the part that each slide was in.
        probabilities: float64 [R, n, C].

    Example:
        >>> run.predictions.out_of_fold().shape      # doctest: +SKIP
        (106, 2)
    """

    cohort: Cohort
    replicas: tuple[Replica, ...]
    parts: PartArray
    probabilities: FloatArray

    def out_of_fold(self) -> FloatArray:
        """Mean probability [n, C] over the replicas that had the slide in their test part."""
        tested = (self.parts == "test").astype(np.float64)  # [R, n]
        mean: FloatArray = np.einsum("rn,rnc->nc", tested, self.probabilities) / tested.sum(axis=0)[:, None]
        return mean

    def rows(self) -> Iterator[Row]:
        """Rows of ``predictions.csv``."""
        names, cohort = self.cohort.class_names, self.cohort
        yield ("slide_id", "patient_id", "replica", "fold", "seed", "split", "target", *(f"p_{name}" for name in names))
        for replica, parts, values in zip(self.replicas, self.parts, self.probabilities, strict=True):
            for at, slide_id in enumerate(cohort.slide_ids):
                target = names[cohort.labels[at]]
                who = (slide_id, cohort.patient_ids[at], replica.name, replica.fold, replica.seed)
                yield (*who, parts[at], target, *map(probability_text, values[at]))


@dataclass(frozen=True, eq=False)
class Run:
    """A finished training.

    Attributes:
        config: what was asked for, all defaults filled in.
        cohort: the slides that were used.
        splits: their parts.
        trained: the replicas, with their heads on the CPU.
        predictions: of every replica for every slide.
        metrics: the content of ``metrics.json``; its ``looks`` counts this run alone until it is saved, and then the
            saved runs of the same cohort beside it.
        entry: the features entry.
        recipes: feature and tile recipe as plain values.
        folder: where the run was saved, or None.

    Example:
        >>> run = train(store, cohort, head="abmil", folds=5, seeds=3)           # doctest: +SKIP
        >>> run.metrics["out_of_fold"]["macro_f1"]                               # doctest: +SKIP
        {'value': 0.71, 'low': 0.6, 'high': 0.8}
    """

    config: TrainConfig
    cohort: Cohort
    splits: Splits
    trained: tuple[TrainedReplica, ...]
    predictions: ReplicaPredictions
    metrics: dict[str, Any]
    entry: str
    recipes: tuple[dict[str, Any], dict[str, Any]]
    folder: Path | None = None

    def save(self, folder: str | Path, overwrite: bool = False) -> "Run":
        """Write the run folder and return the run with its ``folder``.

        The files are written beside the folder and renamed into place, so a folder that exists is whole. The look at
        the test folds is added to the ledger ``looks.jsonl`` beside the run folders, and counted in the metrics.

        Raises:
            RunError: ``folder`` exists and is not empty, unless ``overwrite``; or it cannot be written.
        """
        folder = Path(folder).absolute()
        check_folder(folder, overwrite)
        look = _Look.at(self, folder)
        saved = replace(self, folder=folder, metrics=self.metrics | {"looks": look.count_earlier() + 1})
        partial = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
        try:
            partial.mkdir(parents=True)
            _write_run(partial, saved)
            look.append()
            _put_in_place(partial, folder)
        except OSError as error:
            raise RunError(f"got {error} while writing {folder} → free some space or choose another --out") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return saved


def train(
    store: Store,
    cohort: Cohort,
    head: str | Mapping[str, Any] = "abmil",
    folds: int = 5,
    seeds: int | Sequence[int] = 3,
    progress: OnProgress | None = None,
    **options: Any,
) -> Run:
    """Train and evaluate one head by patient-grouped cross-validation.

    Args:
        store: holds the embeddings.
        cohort: slides, patients and labels; slides that the store lacks are left out and listed.
        head: its name, or a mapping with ``name`` and keywords.
        folds: number of folds.
        seeds: how many seeds per fold, or which.
        progress: called after each epoch and each replica.
        **options: any other field of `TrainConfig`: ``epochs=20``, ``optimizer={"lr": 1e-3}``.

    Raises:
        ConfigError: an unknown option or an impossible value.
        CohortError, SplitError, BagError, TrainingDivergedError: see `join_store`, `make_splits`, `open_bags`,
            `train_replicas`.
    """
    seeds = seeds if isinstance(seeds, int) else list(seeds)
    given = {"store": store.path, "target": cohort.target, "head": head, "folds": folds, "seeds": seeds}
    return _cross_validate(store, cohort, compose_config(values=given | options), progress)


def run_training(
    config: TrainConfig, out: str | Path, progress: OnProgress | None = None, overwrite: bool = False
) -> Run:
    """Train as a configuration says and write the run folder ``out``.

    Raises:
        ConfigError: store, labels or target is not given.
        RunError: ``out`` exists and is not empty, unless ``overwrite``.
        MilError, ExtractError: as in `train`.
    """
    missing = [name for name in ("store", "labels", "target") if getattr(config, name) is None]
    if missing or config.store is None or config.labels is None or config.target is None:
        raise ConfigError(
            f"got no {' and no '.join(missing)} → a training needs store, labels and target → give "
            f"{' '.join(f'--{name}' for name in missing)}, or name them in the config file"
        )
    # before the hours of training, not after
    check_folder(Path(out).absolute(), overwrite)
    cohort = read_cohort(config.labels, config.target, config.slide_column, config.patient_column)
    return _cross_validate(open_store(config.store), cohort, config, progress).save(out, overwrite)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a run folder that is taken or cannot be written; its parent is made.

    Raises:
        RunError: ``folder`` is a file, holds anything while ``overwrite`` is False, holds anything besides a finished
            run (which replacing would delete), or its parent takes no files.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"got {folder} as run folder → it is a file → give another folder with --out")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise RunError(
            f"got {folder} as run folder → it exists and is not empty → give another folder with --out, or add "
            f"--overwrite to replace it"
        )
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = names - RUN_FILES
    if foreign or (names and "metrics.json" not in names):
        what = f"besides a run it holds {listed(sorted(foreign))}" if foreign else "it holds no finished run"
        raise RunError(f"got {folder} to overwrite → {what} → only a run is replaced; give another folder with --out")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise RunError(f"got {folder} as run folder → {error} → give another folder with --out") from error


# ------------------------------------------------------------------------------------------------------- the training


def _cross_validate(store: Store, cohort: Cohort, config: TrainConfig, progress: OnProgress | None) -> Run:
    entry = choose_entry(store, config.backbone)
    device = resolve_device(config.device)
    cohort = join_store(cohort, store.slide_ids(entry))
    splits = make_splits(cohort, config.folds, config.split_seed, config.seeds, config.validation_fraction)
    bags = open_bags(store, cohort.slide_ids, entry, config.memory)
    replicas = [Replica(fold, seed, config) for fold in range(config.folds) for seed in config.seeds]
    parts = np.stack([splits.parts(replica.fold, replica.seed) for replica in replicas])
    trained = train_replicas(bags, cohort.labels, replicas, list(parts), len(cohort.class_names), device, progress)
    probabilities = np.stack([each.probabilities for each in trained])
    predictions = ReplicaPredictions(cohort, tuple(replicas), parts, probabilities)
    return Run(
        config=config,
        cohort=cohort,
        splits=splits,
        trained=tuple(trained),
        predictions=predictions,
        metrics=_metrics(config, splits, trained, predictions, entry)
        | {"synthetic": is_synthetic(store, cohort.slide_ids)},
        entry=entry,
        recipes=(to_dict(store.feature_recipe(entry)), to_dict(store.tile_recipe)),
    )


def is_synthetic(store: Store, slide_ids: Sequence[str]) -> bool:
    """Whether any slide was drawn by `extract.synthetic`; what is made of it must say so."""
    return any(store[slide_id].record.get("synthetic", False) for slide_id in slide_ids)


def _metrics(
    config: TrainConfig,
    splits: Splits,
    trained: Sequence[TrainedReplica],
    predictions: ReplicaPredictions,
    entry: str,
) -> dict[str, Any]:
    """The content of ``metrics.json``; the test parts are scored here, once."""
    cohort = predictions.cohort
    out_of_fold = statistics.evaluate(cohort.labels, predictions.out_of_fold(), cohort.patient_ids, cohort.class_names)
    return {
        "target": cohort.target,
        "class_names": list(cohort.class_names),
        "head": config.head.name,
        "entry": entry,
        "n_replicas": len(trained),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "cohort": {"attrition": [[reason, count, list(ids)] for reason, count, ids in cohort.attrition.rows()]},
        "warnings": [*splits.warnings, *out_of_fold["warnings"]],
        "looks": 1,
        "out_of_fold": out_of_fold,
        "per_replica": [
            _replica_metrics(each, parts, cohort) for each, parts in zip(trained, predictions.parts, strict=True)
        ],
    }


def _replica_metrics(trained: TrainedReplica, parts: PartArray, cohort: Cohort) -> dict[str, Any]:
    """Scores of one replica on its test part; None where a score is undefined."""
    test = parts == "test"
    labels, probabilities = cohort.labels[test], trained.probabilities[test]
    matrix = confusion(labels, probabilities.argmax(axis=1), len(cohort.class_names))
    scores = {
        "macro_f1": macro_f1(matrix)[0],
        "balanced_accuracy": balanced_accuracy(matrix)[0],
        "auroc": auroc(labels, probabilities)[0],
    }
    return {
        "replica": trained.replica.name,
        "fold": trained.replica.fold,
        "seed": trained.replica.seed,
        "best_epoch": trained.best_epoch,
        "epochs": len(trained.history),
        **{name: None if math.isnan(value) else float(value) for name, value in scores.items()},
        "seconds": round(trained.seconds, 3),
    }


# ------------------------------------------------------------------------------------------------------ the run folder


def _write_run(folder: Path, run: Run) -> None:
    """Write every file of a run into an empty folder."""
    (folder / "config.yaml").write_text(run.config.to_yaml(), encoding="utf-8")
    write_splits(folder / "splits.csv", run.splits, run.cohort)
    write_csv(folder / "predictions.csv", run.predictions.rows())
    write_csv(folder / "history.csv", _history_rows(run.trained))
    write_csv(folder / "oof.csv", _out_of_fold_rows(run.predictions))
    (folder / "checkpoints").mkdir()
    for each in run.trained:
        save_checkpoint(folder / "checkpoints" / f"{each.replica.name}.safetensors", each.head, _record(run, each))
    text = json.dumps(run.metrics, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "metrics.json", text.encode())


def _record(run: Run, trained: TrainedReplica) -> CheckpointRecord:
    return CheckpointRecord(
        head=run.config.head.name,
        keywords=dict(run.config.head.keywords),
        in_dim=trained.head.in_dim,
        class_names=run.cohort.class_names,
        target=run.cohort.target,
        entry=run.entry,
        feature_recipe=run.recipes[0],
        tile_recipe=run.recipes[1],
        replica=trained.replica.name,
        fold=trained.replica.fold,
        seed=trained.replica.seed,
        best_epoch=trained.best_epoch,
        config=run.config.to_dict(),
        versions=run.metrics["versions"],
    )


def _history_rows(trained: Iterable[TrainedReplica]) -> Iterator[Row]:
    names = list(EpochRecord.__dataclass_fields__)
    yield ("replica", "fold", "seed", *names)
    for each in trained:
        for record in each.history:
            values = [getattr(record, name) for name in names]
            yield (each.replica.name, each.replica.fold, each.replica.seed, *values)


def _out_of_fold_rows(predictions: ReplicaPredictions) -> Iterator[Row]:
    cohort, values = predictions.cohort, predictions.out_of_fold()
    names = cohort.class_names
    yield ("slide_id", "patient_id", "target", "predicted", *(f"p_{name}" for name in names))
    for at, slide_id in enumerate(cohort.slide_ids):
        truth, predicted = names[cohort.labels[at]], names[values[at].argmax()]
        yield (slide_id, cohort.patient_ids[at], truth, predicted, *map(probability_text, values[at]))


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename ``partial`` to ``folder``; an older folder is moved aside first and deleted last."""
    if not folder.exists():
        partial.rename(folder)
        return
    older = folder.with_name(f".{folder.name}.{uuid4().hex}.replaced")
    folder.rename(older)
    partial.rename(folder)
    shutil.rmtree(older)


@dataclass(frozen=True)
class _Look:
    """One look at the test folds of a cohort, as a line of the ledger.

    The ledger lies beside the run folders. It counts the runs that were saved there, for the same slides, patients and
    labels; looks elsewhere are not seen.
    """

    ledger: Path
    cohort_hash: str
    line: str

    @classmethod
    def at(cls, run: Run, folder: Path) -> "_Look":
        cohort = run.cohort
        names = [cohort.class_names[label] for label in cohort.labels.tolist()]
        rows = sorted(zip(cohort.slide_ids, cohort.patient_ids, names, strict=True))
        digest = sha256(json.dumps([cohort.target, rows]).encode()).hexdigest()
        fields = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "cohort": digest,
            "target": cohort.target,
            "head": run.config.head.name,
            "entry": run.entry,
            "run": str(folder),
        }
        return cls(folder.parent / LEDGER, digest, json.dumps(fields, ensure_ascii=False))

    def count_earlier(self) -> int:
        """Looks at this cohort that were recorded before."""
        if not self.ledger.is_file():
            return 0
        # a line's beginning may be lost with a full disk; what counts is that the cohort was looked at
        return sum(self.cohort_hash in line for line in self.ledger.read_text(encoding="utf-8").splitlines())

    def append(self) -> None:
        with open(self.ledger, "a", encoding="utf-8") as file:
            file.write(self.line + "\n")
