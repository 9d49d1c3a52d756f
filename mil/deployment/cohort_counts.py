"""What a cohort is made of, by the kind of its target: counts that a model carries in the place of its slides."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.arrays import FloatArray
from mil.cohort.cohort import Cohort
from mil.cohort.targets import MULTI_LABEL, REGRESSION, SURVIVAL
from mil.statistics.survival import kaplan_meier

Described = dict[str, dict[str, Any]]


def count_classes(cohort: Cohort) -> dict[str, dict[str, int]]:
    """Slides and patients of every class."""
    slides = Counter(cohort.labels.tolist())
    patients = Counter(label for _, label in set(zip(cohort.patient_ids, cohort.labels.tolist(), strict=True)))
    return {name: {"slides": slides[at], "patients": patients[at]} for at, name in enumerate(cohort.class_names)}


def describe_targets(cohort: Cohort) -> Described:
    """Other targets than classes by name.

    Returns:
        Of every label how many slides are `known`, `positive`, and the `patients` that are positive; of every number
        the `mean`, `deviation`, `lowest` and `highest`; of survival, by the event, its `patients`, `events`, the
        `longest` time and the `median`, at which half of the patients are without the event (None if they never are).
    """
    return _DESCRIBED[cohort.task](cohort.columns, np.asarray(cohort.values), np.array(cohort.patient_ids))


def _describe_labels(columns: Sequence[str], values: FloatArray, patients: npt.NDArray[np.str_]) -> Described:
    return {
        column: {
            "known": int(np.isfinite(known).sum()),
            "positive": int((known == 1).sum()),
            "patients": len(np.unique(patients[known == 1])),
        }
        for column, known in zip(columns, values.T, strict=True)
    }


def _describe_numbers(columns: Sequence[str], values: FloatArray, patients: npt.NDArray[np.str_]) -> Described:
    return {
        column: {
            "mean": float(known.mean()),
            "deviation": float(known.std()),
            "lowest": float(known.min()),
            "highest": float(known.max()),
        }
        for column, known in zip(columns, values.T, strict=True)
    }


def _describe_survival(columns: Sequence[str], values: FloatArray, patients: npt.NDArray[np.str_]) -> Described:
    _, first = np.unique(patients, return_index=True)
    times, events = values[first, 0], values[first, 1] == 1
    curve = kaplan_meier(times, events)
    # a product of shares: half of them may be a little more
    reached = curve.times[curve.alive <= 0.5 + 1e-9]
    median = float(reached[0]) if len(reached) else None
    facts = {"patients": len(times), "events": int(events.sum()), "longest": float(times.max()), "median": median}
    return {columns[1]: facts}


_DESCRIBED = {MULTI_LABEL: _describe_labels, REGRESSION: _describe_numbers, SURVIVAL: _describe_survival}
