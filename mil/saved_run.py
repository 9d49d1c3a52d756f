"""A run folder, read back."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from mil.cohort import Attrition, Cohort
from mil.config import compose_config
from mil.errors import RunError
from mil.out_of_fold import read_out_of_fold
from mil.run import ReplicaPredictions
from mil.training import Replica


def read_predictions(folder: Path) -> ReplicaPredictions:
    """What every replica of a saved run says about every slide, nine significant digits.

    Raises:
        RunError: a file is missing, or does not hold what `mil train` writes.
        ConfigError: the configuration holds what this version does not know.
    """
    truth = read_out_of_fold(folder)
    config = compose_config(file=folder / "config.yaml")
    try:
        cohort, table = _read(folder / "predictions.csv", truth.metrics)
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
    found = ReplicaPredictions(cohort, replicas, np.array(parts, dtype=np.str_), probabilities)
    if set(found.tested()[0].slide_ids) != set(truth.slide_ids):
        raise RunError(
            f"got {folder} as run folder → its predictions.csv and oof.csv test different slides → bring both back "
            f"from a copy of the run, or train again"
        )
    return found


_Table = dict[tuple[int, int], dict[str, tuple[str, list[float]]]]


def _read(path: Path, metrics: dict[str, Any]) -> tuple[Cohort, _Table]:
    """All slides of the run, tested or not; part and probabilities by fold and seed, then by slide."""
    table: _Table = defaultdict(dict)
    slides: dict[str, tuple[str, str]] = {}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        header = next(rows)
        slide, fold, seed, part = (header.index(name) for name in ("slide_id", "fold", "seed", "split"))
        patient, target = header.index("patient_id"), header.index("target")
        for row in rows:
            key = int(row[fold]), int(row[seed])
            table[key][row[slide]] = (row[part], [float(cell) for cell in row[target + 1 :]])
            slides[row[slide]] = (row[patient], row[target])
    names = tuple(metrics["class_names"])
    labels = np.array([names.index(label) for _, label in slides.values()], dtype=np.int64)
    patients = tuple(who for who, _ in slides.values())
    n = len(slides)
    return Cohort(tuple(slides), patients, labels, names, metrics["target"], Attrition(n, n)), table
