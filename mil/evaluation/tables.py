"""Truth and prediction of slides as the tables of a run folder hold them (``oof.csv``, ``predictions.csv``)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mil.arrays import FloatArray
from mil.cohort.cohort import Attrition, Cohort
from mil.cohort.targets import CLASSIFICATION, KINDS, find_strata, target_columns
from mil.evaluation.outcomes import Outcomes
from mil.files import Row, probability_text


def truth_names(cohort: Cohort) -> tuple[str, ...]:
    """Columns of tables that hold the truth: ``target``, or one per column of other targets than classes."""
    return ("target",) if cohort.has_classes else tuple(f"target_{column}" for column in cohort.columns)


def truth_cells(cohort: Cohort, at: int) -> tuple[str, ...]:
    """What stands there for a slide; nothing where a label is unknown."""
    if cohort.has_classes:
        return (cohort.class_names[cohort.labels[at]],)
    return tuple("" if np.isnan(value) else f"{value:.9g}" for value in cohort.targets[at].tolist())


def out_of_fold_rows(cohort: Cohort, predicted: FloatArray) -> Iterator[Row]:
    """Rows of ``oof.csv``; of classes with the predicted one."""
    best = ("predicted",) if cohort.has_classes else ()
    yield ("slide_id", "patient_id", *truth_names(cohort), *best, *cohort.prediction_names)
    for at, slide_id in enumerate(cohort.slide_ids):
        best = (cohort.class_names[predicted[at].argmax()],) if cohort.has_classes else ()
        values = map(probability_text, predicted[at])
        yield (slide_id, cohort.patient_ids[at], *truth_cells(cohort, at), *best, *values)


def stated_cohort(metrics: Mapping[str, Any], rows: Sequence[tuple[str, str, Sequence[str]]] = ()) -> Cohort:
    """The slides of a run as its tables hold them.

    Args:
        metrics: the run's ``metrics.json``.
        rows: slide id, patient id and the cells of the truth, see `truth_names`.

    Raises:
        ValueError, KeyError: they are not what `mil train` writes.
    """
    task, target = metrics.get("task", CLASSIFICATION), metrics["target"]
    slide_ids, patients = tuple(row[0] for row in rows), tuple(row[1] for row in rows)
    attrition = Attrition(len(rows), len(rows))
    if task == CLASSIFICATION:
        names = tuple(metrics["class_names"])
        labels = np.array([names.index(cells[0]) for _, _, cells in rows], dtype=np.int64)
        return Cohort(slide_ids, patients, labels, names, target, attrition)
    columns = target_columns(task, target)
    cells = [[float(cell) if cell else np.nan for cell in cells] for _, _, cells in rows]
    values = np.array(cells, dtype=np.float64).reshape(len(rows), len(columns))
    strata, names = find_strata(task, columns, values, patients)
    return Cohort(slide_ids, patients, strata, names, target, attrition, task, values)


def stated_outcomes(rows: Sequence[Mapping[str, str]], metrics: Mapping[str, Any]) -> Outcomes:
    """Truth and predictions of rows of ``oof.csv``.

    Raises:
        ValueError, KeyError, TypeError: they are not what `mil train` writes.
    """
    truth = truth_names(stated_cohort(metrics))
    cells = [(row["slide_id"], row["patient_id"], [row[name] for name in truth]) for row in rows]
    cohort = stated_cohort(metrics, cells)
    names = cohort.prediction_names
    predicted = np.array([[float(row[name]) for name in names] for row in rows], dtype=np.float64)
    return Outcomes(cohort, predicted.reshape(len(rows), len(names)))


def value_names(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of what `decode` gives of other targets than classes, as columns of tables.

    Args:
        record: of the task, see `mil.training.tasks.Task`.
    """
    return KINDS[record["task"]].prediction_names(record["columns"])
