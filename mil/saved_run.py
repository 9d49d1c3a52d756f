"""A run folder, read back."""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mil.cohort import Attrition, Cohort
from mil.config import compose_config
from mil.errors import RunError
from mil.out_of_fold import read_out_of_fold, said_names, truth_names
from mil.run import ReplicaPredictions
from mil.targets import CLASSIFICATION, find_strata, target_columns
from mil.training import Replica

FloatArray = npt.NDArray[np.float64]


def read_predictions(folder: Path) -> ReplicaPredictions:
    """What every replica of a saved run says about every slide, nine significant digits.

    Of other targets than classes the records of the tasks hold no more than task and columns, which name the values.

    Raises:
        RunError: a file is missing, or does not hold what `mil train` writes.
        ConfigError: the configuration holds what this version does not know.
    """
    facts = _read_facts(folder)
    tested = set(read_out_of_fold(folder).slide_ids if facts.classes else read_values(folder / "oof.csv", ())[0])
    config = compose_config(file=folder / "config.yaml")
    try:
        cohort, table = _read(folder / "predictions.csv", facts)
        keys = list(table)
        parts = [[table[key][slide][0] for slide in cohort.slide_ids] for key in keys]
        values = [[table[key][slide][1] for slide in cohort.slide_ids] for key in keys]
        said = np.array(values, dtype=np.float64).reshape(len(keys), len(cohort), len(facts.said))
    except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
        raise _unreadable(folder / "predictions.csv", error) from error
    replicas = tuple(Replica(fold, seed, config) for fold, seed in keys)
    tasks = () if facts.classes else (facts.record,) * len(keys)
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


class _Facts(NamedTuple):
    """What ``metrics.json`` says of the target."""

    task: str
    target: str
    class_names: tuple[str, ...]

    @property
    def classes(self) -> bool:
        return self.task == CLASSIFICATION

    @property
    def record(self) -> dict[str, Any]:
        return {"task": self.task, "columns": list(target_columns(self.task, self.target))}

    @property
    def said(self) -> tuple[str, ...]:
        """Columns that hold what a replica says."""
        return said_names(self.cohort(), None if self.classes else self.record)

    @property
    def truth(self) -> tuple[str, ...]:
        """Columns that hold the truth."""
        return truth_names(self.cohort())

    def cohort(self, rows: Sequence[tuple[str, str, Sequence[str]]] = ()) -> Cohort:
        """Slides of id, patient and the cells of the truth."""
        ids, patients = tuple(row[0] for row in rows), tuple(row[1] for row in rows)
        attrition = Attrition(len(rows), len(rows))
        if self.classes:
            labels = np.array([self.class_names.index(cells[0]) for _, _, cells in rows], dtype=np.int64)
            return Cohort(ids, patients, labels, self.class_names, self.target, attrition)
        columns = target_columns(self.task, self.target)
        known = [[float(cell) if cell else math.nan for cell in cells] for _, _, cells in rows]
        values = np.array(known, dtype=np.float64).reshape(len(rows), len(columns))
        labels, strata = find_strata(self.task, columns, values, patients)
        return Cohort(ids, patients, labels, strata, self.target, attrition, self.task, values)


def _read_facts(folder: Path) -> _Facts:
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return _Facts(metrics.get("task", CLASSIFICATION), metrics["target"], tuple(metrics["class_names"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"got {folder} as run folder → its metrics.json cannot be read ({_what(error)}) → give the --out folder of "
            f"a finished mil train"
        ) from error


_Table = dict[tuple[int, int], dict[str, tuple[str, list[float]]]]


def _read(path: Path, facts: _Facts) -> tuple[Cohort, _Table]:
    """All slides of the run, tested or not; part and what is said of it by fold and seed, then by slide."""
    table: _Table = defaultdict(dict)
    slides: dict[str, tuple[str, Sequence[str]]] = {}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        header = next(rows)
        slide, fold, seed, part = (header.index(name) for name in ("slide_id", "fold", "seed", "split"))
        patient, truth = header.index("patient_id"), [header.index(name) for name in facts.truth]
        said = range(truth[-1] + 1, truth[-1] + 1 + len(facts.said))
        for row in rows:
            key = int(row[fold]), int(row[seed])
            table[key][row[slide]] = (row[part], [float(row[at]) for at in said])
            slides[row[slide]] = (row[patient], [row[at] for at in truth])
    return facts.cohort([(slide_id, *rest) for slide_id, rest in slides.items()]), table


def _unreadable(path: Path, error: Exception) -> RunError:
    return RunError(
        f"got {path.parent} as run folder → its {path.name} cannot be read ({_what(error)}) → bring it back from a "
        f"copy of the run, or train again"
    )


def _what(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) else f"{type(error).__name__} {error}"
