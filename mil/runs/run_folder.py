"""The folder of a finished run, sweep or ensemble, read back: the one reader of ``metrics.json``."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mil.arrays import FloatArray
from mil.cohort.cohort import Cohort
from mil.cohort.targets import CLASSIFICATION
from mil.errors import CohortError, RunError
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.evaluation.tables import stated_cohort, truth_names
from mil.files import read_csv_dicts, read_csv_rows, read_json
from mil.training.replica import ReplicaId

METRICS = "metrics.json"
_KINDS: dict[str, type | tuple[type, ...]] = {
    "target": str,
    "task": str,
    "class_names": list,
    "head": str,
    "entry": str,
    "created": str,
    "key": str,
    "versions": dict,
    "split": dict,
    "cohort": dict,
    "sweep": dict,
    "warnings": list,
    "looks": int,
    "n_replicas": int,
    "synthetic": bool,
    "out_of_fold": dict,
    "calibration": (dict, type(None)),
    "seed_macro_f1": list,
    "per_replica": list,
}
"""What stands in ``metrics.json``, and as what; older runs lack some."""


@dataclass(frozen=True, eq=False)
class RunFolder:
    """A folder of results, opened by its ``metrics.json``.

    Attributes:
        path: where it lies.
        metrics: what ``metrics.json`` holds; of the keys that are known the types are right.

    Example:
        >>> RunFolder.open(Path("runs/abmil")).metrics["out_of_fold"]["auroc"]   # doctest: +SKIP
        {'value': 0.81, 'low': 0.74, 'high': 0.88}
    """

    path: Path
    metrics: dict[str, Any]

    @classmethod
    def open(cls, path: Path, *needed: str) -> "RunFolder":
        """Read ``metrics.json``.

        Args:
            path: the folder.
            needed: keys that must be there.

        Raises:
            RunError: there is none, it is not what is written here, or lacks a key.
        """
        try:
            metrics = read_json(path / METRICS)
        except (OSError, ValueError) as error:
            raise RunError(
                f"got {path} as run folder → its {METRICS} cannot be read ({_what(error)}) → give the --out folder of "
                f"a finished mil train"
            ) from error
        found = metrics if isinstance(metrics, dict) else {}
        missing = [key for key in needed if key not in found]
        if missing or found is not metrics:
            raise RunError(
                f"got {path / METRICS} without {', '.join(missing) or 'any key'} → expected what mil train writes → "
                f"give the --out folder of a finished mil train, or train again with this version of tessera-mil"
            )
        for key, kind in _KINDS.items():
            if key in found and not isinstance(found[key], kind):
                raise RunError(
                    f"got {path / METRICS} with {key} {str(found[key])[:60]!r} → expected {_kind_name(kind)} → bring "
                    f"it back from a copy of the run, or train again"
                )
        return cls(path, found)

    @classmethod
    def find(cls, path: Path) -> "RunFolder | None":
        """The same, or None where there is none that can be read."""
        try:
            return cls.open(path)
        except RunError:
            return None

    @property
    def task(self) -> str:
        """The kind of its target; the oldest runs know classes alone."""
        return str(self.metrics.get("task", CLASSIFICATION))

    @property
    def replica_names(self) -> tuple[str, ...]:
        """Of the replicas that were trained.

        Raises:
            RunError: ``metrics.json`` does not tell.
        """
        try:
            return tuple(str(each["replica"]) for each in self.metrics["per_replica"])
        except (KeyError, TypeError) as error:
            raise RunError(
                f"got {self.path / METRICS} without replicas ({_what(error)}) → expected what mil train writes → "
                f"bring it back from a copy of the run"
            ) from error

    def require_target(self) -> Cohort:
        """Task, target and classes, as a cohort without slides.

        Raises:
            RunError: ``metrics.json`` does not tell.
        """
        try:
            return stated_cohort(self.metrics)
        except (CohortError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"got {self.path} as run folder → its {METRICS} cannot be read ({_what(error)}) → give the --out "
                f"folder of a finished mil train"
            ) from error

    def predictions(self) -> ReplicaPredictions:
        """What every replica of a run or a sweep predicts of every slide, nine significant digits.

        Raises:
            RunError: a file is missing, or does not hold what is written here.
        """
        known = self.require_target()
        tested = set(read_values(self.path / "oof.csv", ())[0])
        try:
            cohort, table = _read(self.path / "predictions.csv", self.metrics, known)
            keys = list(table)
            parts = [[table[key][slide][0] for slide in cohort.slide_ids] for key in keys]
            values = [[table[key][slide][1] for slide in cohort.slide_ids] for key in keys]
            shape = len(keys), len(cohort), len(cohort.prediction_names)
            predicted = np.array(values, dtype=np.float64).reshape(shape)
        except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
            raise _unreadable(self.path / "predictions.csv", error) from error
        replicas = tuple(ReplicaId(fold, seed) for fold, seed in keys)
        head = str(self.metrics.get("head", ""))
        found = ReplicaPredictions(cohort, replicas, np.array(parts, dtype=np.str_), predicted, head=head)
        if set(found.tested()[0].slide_ids) != tested:
            raise RunError(
                f"got {self.path} as run folder → its predictions.csv and oof.csv test different slides → bring both "
                f"back from a copy of the run, or train again"
            )
        return found


def read_predictions(folder: Path) -> ReplicaPredictions:
    """See `RunFolder.predictions`; of a run, whose replicas have one configuration.

    Raises:
        RunError: a sweep.
    """
    run = RunFolder.open(folder)
    if "sweep" in run.metrics:
        raise RunError(
            f"got {folder}, a sweep, whose folds have settings of their own → expected a run of mil train → train one "
            f"with --config {folder / 'best.yaml'}"
        )
    return run.predictions()


def read_values(path: Path, names: Sequence[str]) -> tuple[list[str], FloatArray]:
    """Slide ids [n] and columns of numbers [n, names] of a table of a run or an ensemble.

    Raises:
        RunError: it cannot be read, or lacks a column.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            table = read_csv_dicts(file)
        values = np.array([[float(row[name]) for name in names] for row in table])
        return [row["slide_id"] for row in table], values.reshape(len(table), len(names))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


_Table = dict[tuple[int, int], dict[str, tuple[str, list[float]]]]


def _read(path: Path, metrics: dict[str, Any], known: Cohort) -> tuple[Cohort, _Table]:
    """All slides of the run, tested or not; part and prediction of each by fold and seed, then by slide."""
    table: _Table = defaultdict(dict)
    slides: dict[str, tuple[str, Sequence[str]]] = {}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = read_csv_rows(file)
        header = next(rows)
        slide, fold, seed, part = (header.index(name) for name in ("slide_id", "fold", "seed", "split"))
        patient, truth = header.index("patient_id"), [header.index(name) for name in truth_names(known)]
        values = [header.index(name) for name in known.prediction_names]
        for row in rows:
            key = int(row[fold]), int(row[seed])
            table[key][row[slide]] = (row[part], [float(row[at]) for at in values])
            slides[row[slide]] = (row[patient], [row[at] for at in truth])
    return stated_cohort(metrics, [(slide_id, *rest) for slide_id, rest in slides.items()]), table


def _unreadable(path: Path, error: Exception) -> RunError:
    return RunError(
        f"got {path.parent} as run folder → its {path.name} cannot be read ({_what(error)}) → bring it back from a "
        f"copy of the run, or train again"
    )


def _what(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) else f"{type(error).__name__} {error}"


def _kind_name(kind: type | tuple[type, ...]) -> str:
    names = {str: "text", list: "a list", dict: "a mapping", int: "a whole number", bool: "true or false"}
    return names[kind[0] if isinstance(kind, tuple) else kind]
