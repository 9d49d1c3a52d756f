"""Operating points: the threshold of one class's probability, chosen on validation parts and scored out of fold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.arrays import BoolArray, FloatArray, IntArray
from mil.errors import EvaluationError, did_you_mean, listed
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.evaluation.temperature import warn_of_validation
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling, Spread
from mil.statistics.checks import few_patients

DEFAULT = 0.5
"""The threshold of a replica whose validation part lacks positive or negative slides."""


@dataclass(frozen=True)
class Threshold:
    """Positive is what scores `value` or more; sensitivity and specificity on the slides it was chosen by."""

    value: float
    sensitivity: float
    specificity: float


def choose_threshold(
    positive: npt.ArrayLike,
    scores: npt.ArrayLike,
    sensitivity: float | None = None,
    specificity: float | None = None,
) -> Threshold:
    """The threshold that reaches a target, or by default the one of the highest Youden index.

    Thresholds lie midway between neighbouring scores. Where several are as good, the lowest is taken.

    Args:
        positive: [n] 0 or 1.
        scores: [n], higher for 1.
        sensitivity: at least this share of positives is found, with the best specificity.
        specificity: at least this share of negatives is left alone, with the best sensitivity.

    Raises:
        EvaluationError: two targets, an impossible one, no positives or no negatives, or lengths that do not fit.

    References:
        Youden, "Index for rating diagnostic tests", Cancer 1950: sensitivity + specificity - 1.
    """
    truth, values = _checked(positive, scores)
    check_targets(sensitivity, specificity)
    distinct = np.unique(values)
    low, high = distinct[:-1], distinct[1:]
    midway = low + (high - low) / 2
    cuts = np.r_[distinct[0], np.where(midway > low, midway, high), np.nextafter(distinct[-1], np.inf)]
    found = 1 - np.searchsorted(np.sort(values[truth]), cuts) / truth.sum()
    spared = np.searchsorted(np.sort(values[~truth]), cuts) / (~truth).sum()
    if sensitivity is not None:
        worth = np.where(found >= sensitivity, spared, -1.0)
    elif specificity is not None:
        worth = np.where(spared >= specificity, found, -1.0)
    else:
        # rounded, so that equal sums of different terms are equal
        worth = np.round(found + spared, 12)
    at = int(worth.argmax())
    return Threshold(float(cuts[at]), float(found[at]), float(spared[at]))


def one_vs_rest_thresholds(labels: npt.ArrayLike, probabilities: FloatArray, **target: float) -> list[Threshold]:
    """A threshold for every class against the others, of labels [n] and probabilities [n, C]; see `choose_threshold`.

    A slide may reach the thresholds of several classes or of none: the prediction stays that of highest probability.
    """
    truth = np.asarray(labels)
    return [choose_threshold(truth == at, probabilities[:, at], **target) for at in range(probabilities.shape[1])]


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """What thresholds chosen on validation parts do on test parts.

    Attributes:
        class_name: the positive class.
        predicted: bool [n], whether half or more of the replicas that tested the slide call it positive; False for
            slides that no fold tests.
        thresholds: [R], each of its own replica's validation part.
        sensitivity: {value, low, high} out of fold, interval over patients.
        specificity: likewise.
        warnings: what a reader must know.
    """

    class_name: str
    predicted: BoolArray
    thresholds: tuple[float, ...]
    sensitivity: dict[str, Any]
    specificity: dict[str, Any]
    warnings: tuple[str, ...]


def operate(
    predictions: ReplicaPredictions,
    class_name: str | None = None,
    sensitivity: float | None = None,
    specificity: float | None = None,
    resampling: Resampling = USUAL_RESAMPLING,
) -> OperatingPoint:
    """Choose a threshold on the validation part of every replica and score its test part with it.

    Args:
        predictions: replicas with their parts.
        class_name: the positive class; by default the second of two.
        sensitivity: target, see `choose_threshold`.
        specificity: target.
        resampling: how the intervals are made.

    Raises:
        EvaluationError: no such class, none given for three or more, or an impossible target.
    """
    cohort = predictions.cohort
    index = _positive_class(cohort.class_names, class_name)
    truth = cohort.labels == index
    check_targets(sensitivity, specificity)
    thresholds, unchosen = _choose_thresholds(predictions, index, sensitivity, specificity)
    votes = predictions.values[..., index] >= np.array(thresholds)[:, None]  # [R, n]
    tested = predictions.parts == "test"
    was_tested = tested.any(axis=0)
    # slides that no fold tests, which fixed splits may have, are not scored and count as negative
    predicted = was_tested & ((votes & tested).sum(axis=0) * 2 >= tested.sum(axis=0))
    names = (f"not {cohort.class_names[index]}", cohort.class_names[index])
    scored = np.flatnonzero(was_tested)
    patients = [cohort.patient_ids[row] for row in scored]
    rates = _rates(truth[scored], predicted[scored], patients, cohort.labels[scored], resampling)
    warnings = [
        *_warn_of_default(names[1], unchosen, len(thresholds)),
        *warn_of_validation(predictions),
        *few_patients(names, truth[scored].astype(np.int64), patients),
    ]
    return OperatingPoint(names[1], predicted, tuple(thresholds), *rates, tuple(warnings))


def operate_one_vs_rest(
    predictions: ReplicaPredictions,
    sensitivity: float | None = None,
    specificity: float | None = None,
    resampling: Resampling = USUAL_RESAMPLING,
) -> list[OperatingPoint]:
    """The operating point of every class against the others; arguments and errors as in `operate`."""
    names = predictions.cohort.class_names
    return [operate(predictions, name, sensitivity, specificity, resampling) for name in names]


def check_targets(sensitivity: float | None, specificity: float | None) -> None:
    """Refuse two targets, or one that is no share.

    Raises:
        EvaluationError: see above.
    """
    given = [target for target in (sensitivity, specificity) if target is not None]
    if len(given) > 1 or not all(0 < target <= 1 for target in given):
        raise EvaluationError(
            f"got sensitivity={sensitivity}, specificity={specificity} → expected one of them, above 0 and at most 1, "
            f"or none for the highest Youden index → pass sensitivity=0.95, for example"
        )


def _choose_thresholds(
    predictions: ReplicaPredictions, index: int, sensitivity: float | None, specificity: float | None
) -> tuple[list[float], int]:
    """The threshold of every replica from its validation part, and how many had nothing to choose by."""
    truth = predictions.cohort.labels == index
    thresholds, unchosen = [], 0
    for parts, values in zip(predictions.parts, predictions.values[..., index], strict=True):
        validates = parts == "validation"
        if truth[validates].any() and not truth[validates].all():
            thresholds.append(choose_threshold(truth[validates], values[validates], sensitivity, specificity).value)
        else:
            thresholds.append(DEFAULT)
            unchosen += 1
    return thresholds, unchosen


def _rates(
    truth: BoolArray, predicted: BoolArray, patient_ids: Sequence[str], labels: IntArray, resampling: Resampling
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sensitivity and specificity as {value, low, high}; no interval for a side of fewer than two patients."""
    sides = np.stack([truth, ~truth], axis=1).astype(np.float64)  # [n, 2]
    right = sides * (predicted == truth)[:, None]

    def score(weights: FloatArray) -> dict[str, FloatArray]:
        held, hits = weights @ sides, weights @ right
        return {"rate": np.divide(hits, held, out=np.full(held.shape, np.nan), where=held > 0)}

    spread = Spread.of(score, patient_ids, resampling, labels)
    patients = np.array(patient_ids)
    found = [spread.entry("rate", len(set(patients[sides[:, at] > 0])) >= 2, at) for at in range(2)]
    return found[0], found[1]


def _warn_of_default(class_name: str, unchosen: int, total: int) -> list[str]:
    if not unchosen:
        return []
    return [
        f"{unchosen} of {total} replicas validate on no slide of class {class_name!r}, or on no other: their threshold "
        f"is {DEFAULT:g}"
    ]


def _positive_class(class_names: Sequence[str], class_name: str | None) -> int:
    if class_name is None and len(class_names) == 2:
        return 1
    if class_name not in class_names:
        hint = did_you_mean(class_name, class_names) if class_name is not None else ""
        raise EvaluationError(
            f"got the positive class {class_name!r} → expected one of {listed(class_names)} → {hint}name it"
        )
    return class_names.index(class_name)


def _checked(positive: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[BoolArray, FloatArray]:
    truth, values = np.asarray(positive), np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != values.shape or not np.isfinite(values).all():
        raise EvaluationError(
            f"got labels {truth.shape} and scores {values.shape} → expected one finite score per slide → pass the "
            f"probability of the positive class, [n]"
        )
    if not np.isin(truth, (0, 1)).all() or truth.all() or not truth.any():
        raise EvaluationError(
            f"got the labels {listed(np.unique(truth).tolist())} → expected positive (1) and negative (0) slides → "
            f"choose the threshold on slides of both"
        )
    return truth.astype(bool), values
