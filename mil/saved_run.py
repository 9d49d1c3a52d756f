"""A run folder, read back."""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from mil.cohort import Attrition, Cohort
from mil.config import compose_config
from mil.errors import RunError
from mil.out_of_fold import OutOfFold, read_out_of_fold
from mil.run import ReplicaPredictions
from mil.training import Replica


def read_predictions(folder: Path) -> ReplicaPredictions:
    """What every replica of a saved run says about every slide, nine significant digits.

    Raises:
        RunError: a file is missing, or does not hold what `mil train` writes.
        ConfigError: the configuration holds what this version does not know.
    """
    truth = read_out_of_fold(folder)
    cohort = _cohort(truth)
    config = compose_config(file=folder / "config.yaml")
    try:
        table = _read(folder / "predictions.csv")
        keys = list(table)
        parts = [[table[key][slide][0] for slide in cohort.slide_ids] for key in keys]
        values = [[table[key][slide][1] for slide in cohort.slide_ids] for key in keys]
        probabilities = np.array(values, dtype=np.float64).reshape(len(keys), len(cohort), len(cohort.class_names))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        what = error.strerror if isinstance(error, OSError) else f"{type(error).__name__} {error}"
        raise RunError(
            f"got {folder} as run folder → its predictions.csv cannot be read ({what}) → bring it back from a copy of "
            f"the run, or train again"
        ) from error
    replicas = tuple(Replica(fold, seed, config) for fold, seed in keys)
    return ReplicaPredictions(cohort, replicas, np.array(parts, dtype=np.str_), probabilities)


def _cohort(truth: OutOfFold) -> Cohort:
    n = len(truth.slide_ids)
    return Cohort(
        truth.slide_ids, truth.patient_ids, truth.labels, truth.class_names, truth.metrics["target"], Attrition(n, n)
    )


def _read(path: Path) -> dict[tuple[int, int], dict[str, tuple[str, list[float]]]]:
    """Part and probabilities by fold and seed, then by slide."""
    table: dict[tuple[int, int], dict[str, tuple[str, list[float]]]] = defaultdict(dict)
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        header = next(rows)
        slide, fold, seed, part = (header.index(name) for name in ("slide_id", "fold", "seed", "split"))
        first = header.index("target") + 1
        for row in rows:
            key = int(row[fold]), int(row[seed])
            table[key][row[slide]] = (row[part], [float(cell) for cell in row[first:]])
    return table
