"""What evaluations share: the check of their arguments, and warnings of too few patients."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mil.arrays import BoolArray, FloatArray, IntArray
from mil.errors import EvaluationError, listed
from mil.statistics.bootstrap import patient_strata


def check_values(
    truth: npt.ArrayLike, predicted: npt.ArrayLike, patient_ids: Sequence[str], columns: Sequence[str], what: str
) -> tuple[FloatArray, FloatArray]:
    """Truth and predictions, both [n, K] of float64.

    Args:
        truth: [n, K].
        predicted: [n, K].
        patient_ids: [n].
        columns: [K].
        what: names the columns, such as ``labels``.

    Raises:
        EvaluationError: they are not of one shape, there is no slide, or a prediction is not finite.
    """
    values, predictions = (np.asarray(each, dtype=np.float64) for each in (truth, predicted))
    if values.shape != (len(patient_ids), len(columns)) or predictions.shape != values.shape or not len(values):
        raise EvaluationError(
            f"got values {values.shape} and predictions {predictions.shape} for {len(patient_ids)} patients and "
            f"{len(columns)} {what} → expected [n, {what}] of one n, above 0 → give what one run predicted"
        )
    if not np.isfinite(predictions).all():
        at = int(np.flatnonzero(~np.isfinite(predictions).all(axis=1))[0])
        raise EvaluationError(
            f"got predictions {predictions[at].tolist()} in row {at} → expected finite numbers → find out what "
            f"the head gave for this slide"
        )
    return values, predictions


# Below this many patients the percentile interval of a class rests on a handful of different resamples.
FEW_PATIENTS = 5


def few_patients(class_names: Sequence[str], labels: npt.ArrayLike, patient_ids: Sequence[str]) -> list[str]:
    """Warnings of the classes that too few patients have for an interval, a threshold or a test to mean much.

    Args:
        class_names: [C].
        labels: [n] class index.
        patient_ids: [n].
    """
    return describe_few_patients(class_names, patients_per_class(np.asarray(labels), patient_ids, len(class_names)))


def check_scores(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, patient_ids: Sequence[str], n_classes: int
) -> tuple[IntArray, FloatArray]:
    """Labels [n] and probabilities [n, C] that belong together.

    Raises:
        EvaluationError: they do not, or hold values that cannot be scored.
    """
    truth, scores = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if truth.ndim != 1 or not len(truth) or scores.shape != (len(truth), n_classes) or len(patient_ids) != len(truth):
        raise EvaluationError(
            f"got labels {truth.shape}, probabilities {scores.shape}, {len(patient_ids)} patient ids, {n_classes} "
            f"classes → expected [n], [n, classes] and n of them, n > 0 → pass one row per slide"
        )
    if n_classes < 2 or truth.dtype.kind not in "iu" or truth.min() < 0 or truth.max() >= n_classes:
        raise EvaluationError(
            f"got labels {listed(np.unique(truth).tolist())} for {n_classes} classes → expected class "
            f"indices from 0 to {n_classes - 1} of two or more classes → index the class names"
        )
    if not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise EvaluationError(
            f"got probabilities {scores[at].tolist()} in row {at} → expected finite values → find out what the head "
            f"gave for this slide"
        )
    return truth.astype(np.int64), scores


def patients_per_class(labels: IntArray, patient_ids: Sequence[str], n_classes: int) -> BoolArray:
    """Whether each class occurs in each patient, bool [C, P]."""
    patients, patient_of = np.unique(np.array(patient_ids), return_inverse=True)
    occurs = np.zeros((n_classes, len(patients)), dtype=bool)
    occurs[labels, patient_of] = True
    return occurs


def describe_few_patients(class_names: Sequence[str], patients: BoolArray) -> list[str]:
    """A warning for every class that one patient or none stands for.

    Args:
        class_names: [C].
        patients: [C, patients], whether each has a slide of the class.
    """
    messages = []
    for name, count in zip(class_names, patients.sum(axis=1).tolist(), strict=True):
        if count == 0:
            messages.append(f"class {name!r} has no slides here: its metrics are undefined and not in the averages")
        elif count < 2:
            messages.append(
                f"class {name!r} has 1 patient: no interval is given for it, nor for metrics that average over classes"
            )
        elif count < FEW_PATIENTS:
            messages.append(f"class {name!r} has {count} patients: its intervals are too narrow to be trusted")
    if patients.shape[1] < 2:
        messages.append("all slides are of 1 patient: no interval is given")
    return messages


def warn_of_strata(
    labels: IntArray, patient_ids: Sequence[str], class_names: Sequence[str], noun: str = "class"
) -> list[str]:
    """Warnings of patients who are drawn among themselves alone, and so are in every resample.

    Args:
        labels: [n], class or stratum of every slide.
        patient_ids: [n].
        class_names: names of the classes or strata.
        noun: what they are.
    """
    patients = patients_per_class(labels, patient_ids, len(class_names))
    alone = [members[0] for members in patient_strata(patient_ids, labels) if len(members) == 1]
    messages = []
    for patient in alone:
        classes = listed(name for name, occurs in zip(class_names, patients[:, patient], strict=True) if occurs)
        messages.append(
            f"1 patient alone has slides of {classes} and of no other {noun}: by strata, every resample holds it once, "
            f"and its part of the uncertainty is missing"
        )
    return messages
