"""A run folder, read back."""

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mil.arrays import FloatArray
from mil.cohort.cohort import Cohort
from mil.config.compose import compose_config
from mil.errors import RunError
from mil.evaluation.predictions import ReplicaPredictions
from mil.evaluation.tables import stated_cohort, stated_said, stated_task, truth_names
from mil.training.replica import Replica


def read_predictions(folder: Path) -> ReplicaPredictions:
    """What every replica of a saved run says about every slide, nine significant digits.

    Of other targets than classes the records of the tasks hold no more than task and columns, which name the values.

    Raises:
        RunError: a file is missing, or does not hold what `mil train` writes; or a sweep.
        ConfigError: the configuration holds what this version does not know.
    """
    metrics = _read_metrics(folder)
    if "sweep" in metrics:
        raise RunError(
            f"got {folder}, a sweep, whose folds have settings of their own → expected a run of mil train → train one "
            f"with --config {folder / 'best.yaml'}"
        )
    tested = set(read_values(folder / "oof.csv", ())[0])
    config = compose_config(file=folder / "config.yaml")
    try:
        cohort, table = _read(folder / "predictions.csv", metrics)
        keys = list(table)
        parts = [[table[key][slide][0] for slide in cohort.slide_ids] for key in keys]
        values = [[table[key][slide][1] for slide in cohort.slide_ids] for key in keys]
        said = np.array(values, dtype=np.float64).reshape(len(keys), len(cohort), len(stated_said(cohort)))
    except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
        raise _unreadable(folder / "predictions.csv", error) from error
    replicas = tuple(Replica(fold, seed, config) for fold, seed in keys)
    tasks = () if cohort.values is None else (stated_task(cohort),) * len(keys)
    found = ReplicaPredictions(cohort, replicas, np.array(parts, dtype=np.str_), said, tasks)
    if set(found.tested()[0].slide_ids) != tested:
        raise RunError(
            f"got {folder} as run folder → its predictions.csv and oof.csv test different slides → bring both back "
            f"from a copy of the run, or train again"
        )
    return found


def read_values(path: Path, names: Sequence[str]) -> tuple[list[str], FloatArray]:
    """Slide ids [n] and columns of numbers [n, names] of a table of a run or an ensemble.

    Raises:
        RunError: it cannot be read, or lacks a column.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            table = list(csv.DictReader(file))
        values = np.array([[float(row[name]) for name in names] for row in table])
        return [row["slide_id"] for row in table], values.reshape(len(table), len(names))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _read_metrics(folder: Path) -> dict[str, Any]:
    """``metrics.json``, which says what the tables hold."""
    try:
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        stated_cohort(metrics)
        return metrics
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"got {folder} as run folder → its metrics.json cannot be read ({_what(error)}) → give the --out folder of "
            f"a finished mil train"
        ) from error


_Table = dict[tuple[int, int], dict[str, tuple[str, list[float]]]]


def _read(path: Path, metrics: dict[str, Any]) -> tuple[Cohort, _Table]:
    """All slides of the run, tested or not; part and what is said of it by fold and seed, then by slide."""
    known = stated_cohort(metrics)
    table: _Table = defaultdict(dict)
    slides: dict[str, tuple[str, Sequence[str]]] = {}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        header = next(rows)
        slide, fold, seed, part = (header.index(name) for name in ("slide_id", "fold", "seed", "split"))
        patient, truth = header.index("patient_id"), [header.index(name) for name in truth_names(known)]
        said = range(truth[-1] + 1, truth[-1] + 1 + len(stated_said(known)))
        for row in rows:
            key = int(row[fold]), int(row[seed])
            table[key][row[slide]] = (row[part], [float(row[at]) for at in said])
            slides[row[slide]] = (row[patient], [row[at] for at in truth])
    return stated_cohort(metrics, [(slide_id, *rest) for slide_id, rest in slides.items()]), table


def _unreadable(path: Path, error: Exception) -> RunError:
    return RunError(
        f"got {path.parent} as run folder → its {path.name} cannot be read ({_what(error)}) → bring it back from a "
        f"copy of the run, or train again"
    )


def _what(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) else f"{type(error).__name__} {error}"
