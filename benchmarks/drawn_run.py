"""A finished run with drawn numbers in place of a training, for what is measured on run folders."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mil.cohort.cohort import Attrition, Cohort
from mil.config.compose import compose_config
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.evaluation.tables import out_of_fold_rows
from mil.files import Row, write_csv, write_json
from mil.splits.folds import make_splits
from mil.statistics.calibration import evaluate_calibration
from mil.statistics.classification import evaluate
from mil.training.replica import Replica

EPOCHS = 20


def draw_predictions(
    patients: int, folds: int = 5, seeds: int = 3, classes: int = 4, seed: int = 0
) -> ReplicaPredictions:
    """What replicas of a middling head might say of one slide of every patient."""
    labels = (np.arange(patients) % classes).astype(np.int64)
    names = tuple(f"class {at + 1}" for at in range(classes))
    ids = tuple(f"slide {at:05d}" for at in range(patients))
    cohort = Cohort(
        ids, tuple(f"p{at:05d}" for at in range(patients)), labels, names, "subtype", Attrition(patients, patients)
    )
    splits = make_splits(cohort, folds, 0, tuple(range(seeds)), 0.2)
    config = compose_config(["head=mean", f"folds={folds}", f"seeds={seeds}"])
    replicas = tuple(Replica(fold, each, config) for fold in range(folds) for each in range(seeds))
    parts = np.stack([splits.parts(replica.fold, replica.seed) for replica in replicas])
    logits = np.random.default_rng(seed).normal(size=(len(replicas), patients, classes)) + 1.5 * np.eye(classes)[labels]
    shares = np.exp(logits)
    return ReplicaPredictions(cohort, replicas, parts, shares / shares.sum(axis=-1, keepdims=True))


def write_drawn_run(folder: Path, predictions: ReplicaPredictions) -> Path:
    """Write all that a report reads into a new folder, and return it."""
    folder.mkdir(parents=True)
    write_csv(folder / "predictions.csv", predictions.rows())
    write_csv(folder / "oof.csv", out_of_fold_rows(*predictions.tested()))
    write_csv(folder / "splits.csv", _split_rows(predictions))
    write_csv(folder / "history.csv", _history_rows(predictions))
    (folder / "config.yaml").write_text(predictions.replicas[0].config.to_yaml(), encoding="utf-8")
    write_json(folder / "metrics.json", _metrics(predictions))
    return folder


def _split_rows(predictions: ReplicaPredictions) -> Iterator[Row]:
    yield ("fold", "seed", "slide_id", "patient_id", "split")
    cohort = predictions.cohort
    for replica, parts in zip(predictions.replicas, predictions.parts, strict=True):
        for slide, patient, part in zip(cohort.slide_ids, cohort.patient_ids, parts, strict=True):
            yield (replica.fold, replica.seed, slide, patient, part)


def _history_rows(predictions: ReplicaPredictions) -> Iterator[Row]:
    yield ("replica", "fold", "seed", "epoch", "train_loss", "validation_loss")
    for replica in predictions.replicas:
        for epoch in range(1, EPOCHS + 1):
            loss = 1.4 / epoch
            yield (replica.name, replica.fold, replica.seed, epoch, loss, loss + 0.02 * epoch)


def _metrics(predictions: ReplicaPredictions) -> dict[str, object]:
    cohort, probabilities = predictions.tested()
    slides = (cohort.labels, probabilities, cohort.patient_ids, cohort.class_names)
    scores = {"macro_f1": 0.7, "balanced_accuracy": 0.7, "auroc": 0.9}
    return {
        "target": cohort.target,
        "class_names": list(cohort.class_names),
        "head": "mean",
        "entry": "drawn",
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {},
        "cohort": {"attrition": []},
        "warnings": [],
        "looks": 1,
        "synthetic": True,
        "out_of_fold": evaluate(*slides),
        "calibration": evaluate_calibration(*slides),
        "per_replica": [
            {
                "replica": each.name,
                "fold": each.fold,
                "seed": each.seed,
                "best_epoch": 5,
                "epochs": EPOCHS,
                "seconds": 1.0,
            }
            | scores
            for each in predictions.replicas
        ],
    }
