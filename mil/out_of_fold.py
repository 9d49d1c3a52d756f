"""Out-of-fold predictions as a run folder holds them (``oof.csv``): what comparisons between runs read."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.cohort import Cohort
from mil.errors import RunError, listed
from mil.files import Row, probability_text

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """What a run said of n slides while it had not seen them.

    Attributes:
        slide_ids: [n].
        patient_ids: [n].
        labels: int64 [n].
        class_names: [C].
        probabilities: float64 [n, C], nine significant digits.
        metrics: the run's ``metrics.json``.
    """

    slide_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    probabilities: FloatArray
    metrics: dict[str, Any]


def out_of_fold_rows(cohort: Cohort, probabilities: FloatArray) -> Iterator[Row]:
    """Rows of ``oof.csv``."""
    names = cohort.class_names
    yield ("slide_id", "patient_id", "target", "predicted", *(f"p_{name}" for name in names))
    for at, slide_id in enumerate(cohort.slide_ids):
        truth, predicted = names[cohort.labels[at]], names[probabilities[at].argmax()]
        yield (slide_id, cohort.patient_ids[at], truth, predicted, *map(probability_text, probabilities[at]))


def read_out_of_fold(folder: Path) -> OutOfFold:
    """The out-of-fold predictions of a run folder.

    Raises:
        RunError: a file is missing, or does not hold what `mil train` writes.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with open(folder / "oof.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
            table = list(csv.DictReader(file))
        names = tuple(metrics["class_names"])
        labels = np.array([names.index(row["target"]) for row in table], dtype=np.int64)
        values = np.array([[float(row[f"p_{name}"]) for name in names] for row in table])
        columns = [tuple(row[name] for row in table) for name in ("slide_id", "patient_id")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = error.strerror if isinstance(error, OSError) else f"{type(error).__name__} {error}"
        raise RunError(
            f"got {folder} as run folder → its metrics.json and oof.csv cannot be read ({what}) → give the --out "
            f"folder of a finished mil train"
        ) from error
    return OutOfFold(columns[0], columns[1], labels, names, values.reshape(len(table), len(names)), metrics)


def require_same_slides(runs: Iterable[tuple[str, OutOfFold]]) -> None:
    """Refuse runs that cannot be compared slide by slide.

    Raises:
        RunError: other slides, patients, labels or classes.
    """
    (first_name, first), *others = runs
    expected = _identity(first)
    for name, run in others:
        differing = sorted({row[0] for row in set(_identity(run)) ^ set(expected)})
        if differing:
            raise RunError(
                f"got {first_name} and {name}, which differ in slide, patient or label of {listed(differing)} → "
                f"expected runs of the same slides, patients and labels → train both with one label table and target, "
                f"on stores with the same slides"
            )


def _identity(run: OutOfFold) -> list[tuple[str, str, str]]:
    names = [run.class_names[label] for label in run.labels.tolist()]
    return sorted(zip(run.slide_ids, run.patient_ids, names, strict=True))
