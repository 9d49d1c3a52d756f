"""Predictions of several runs about the same slides, in one order."""

from dataclasses import replace

import numpy as np

from mil.cohort.cohort import Cohort
from mil.errors import RunError, listed
from mil.evaluation.predictions import Outcomes


def aligned(first_name: str, first: Outcomes, name: str, other: Outcomes) -> Outcomes:
    """What another model says, with rows and classes or columns in the order of the first.

    Raises:
        RunError: other tasks or columns, other slides, patients or truths, or other folds for survival.
    """
    _require_same_target(first_name, first.cohort, name, other.cohort)
    _require_same_slides(first_name, first.cohort, name, other.cohort)
    if first.folds != other.folds or (first.folds and first.cohort.slide_ids != other.cohort.slide_ids):
        raise RunError(
            f"got {first_name} and {name} for survival, which were tested in different folds → expected the same "
            f"folds, as patients are compared within a fold alone → train both with the same folds and split_seed"
        )
    if first.folds:
        return other
    at = {slide_id: row for row, slide_id in enumerate(other.cohort.slide_ids)}
    rows = [at[slide_id] for slide_id in first.cohort.slide_ids]
    names = other.cohort.predicted_names
    columns = [names.index(each) for each in first.cohort.predicted_names]
    return replace(first, said=other.said[np.ix_(rows, columns)])


def _require_same_target(first_name: str, first: Cohort, name: str, other: Cohort) -> None:
    if first.task != other.task:
        raise RunError(
            f"got {first_name} of task {first.task} and {name} of task {other.task} → expected one task → compare "
            f"runs of one label table and target"
        )
    names, others = first.predicted_names, other.predicted_names
    if not len(first) or not first.is_predicted_like(other):
        what = "classes" if first.values is None else "columns"
        raise RunError(
            f"got {first_name} of the {what} {listed(names)} on {len(first)} slides and {name} of {listed(others)} → "
            f"expected the same → train both with one label table and target"
        )


def _require_same_slides(first_name: str, first: Cohort, name: str, other: Cohort) -> None:
    """Refuse a run of other slides, patients or labels, with the slides that differ."""
    facts, others = _facts(first, first.predicted_names), _facts(other, first.predicted_names)
    what = "class" if first.values is None else "target"
    differences = {
        f"only in {first_name}": [slide for slide in facts if slide not in others],
        f"only in {name}": [slide for slide in others if slide not in facts],
        "of another patient": [s for s in facts if s in others and facts[s][0] != others[s][0]],
        f"of another {what}": [s for s in facts if s in others and facts[s][1] != others[s][1]],
    }
    told = [f"{len(slides)} slides {what}: {listed(slides)}" for what, slides in differences.items() if slides]
    if told:
        raise RunError(
            f"got {first_name} and {name} of different slides ({'; '.join(told)}) → expected runs of the same slides, "
            f"patients and labels → train both with one label table and target, on stores with the same slides"
        )


def _facts(cohort: Cohort, names: tuple[str, ...]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Patient and truth of every slide, columns in this order; text, since an unknown label equals nothing."""
    truths: list[tuple[str, ...]]
    if cohort.values is None:
        truths = [(cohort.class_names[label],) for label in cohort.labels.tolist()]
    else:
        order = [cohort.columns.index(name) for name in names]
        truths = [tuple(map(str, row)) for row in cohort.values[:, order].tolist()]
    return dict(zip(cohort.slide_ids, zip(cohort.patient_ids, truths, strict=True), strict=True))
