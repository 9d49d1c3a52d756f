"""The area under the ROC curve with DeLong's standard error, for one head and for two on the same slides.

It needs no resampling. Like every test on finished predictions, it speaks of these trained heads on further patients,
not of training them again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from mil.arrays import BoolArray, FloatArray, IntArray
from mil.errors import EvaluationError, listed
from mil.statistics.bootstrap import check_confidence


class Area(NamedTuple):
    """An area under the ROC curve, or a difference of two, with its standard error."""

    value: float
    standard_error: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Normal interval: value ± z · standard error; not cut off at 0 and 1."""
        check_confidence(confidence)
        half = float(ndtri((1 + confidence) / 2)) * self.standard_error
        return self.value - half, self.value + half

    @property
    def p(self) -> float | None:
        """Two-sided p value of the value being 0; None where nothing varies and the value is not 0."""
        if self.standard_error > 0:
            return float(2 * ndtr(-abs(self.value) / self.standard_error))
        return 1.0 if self.value == 0 else None


def auroc_area(labels: npt.ArrayLike, scores: npt.ArrayLike, patient_ids: Sequence[str] | None = None) -> Area:
    """Area under the ROC curve of one score.

    Args:
        labels: [n] 0 or 1.
        scores: [n], higher for 1; tied scores count one half.
        patient_ids: [n]; slides of one patient are dependent. None takes every slide for a patient of its own, which
            is DeLong's case.

    Raises:
        EvaluationError: lengths or labels that do not fit, or fewer than two patients with slides of either label.

    References:
        DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated ROC curves", Biometrics
        1988; Obuchowski, "Nonparametric analysis of clustered ROC curve data", Biometrics 1997 (several slides per
        patient); Sun and Xu, IEEE Signal Processing Letters 2014 (by ranks, in n log n).
    """
    positive, (values,), patient_of = _checked(labels, [scores], patient_ids)
    return _area(_placements(positive, values), positive, patient_of)


def delong_test(
    labels: npt.ArrayLike,
    scores_a: npt.ArrayLike,
    scores_b: npt.ArrayLike,
    patient_ids: Sequence[str] | None = None,
) -> Area:
    """Difference A - B of two areas under the ROC curve on the same slides; its `p` is that of DeLong's test.

    Arguments, errors and references as in `auroc_area`.

    Example:
        >>> difference = delong_test([0, 0, 1, 1], [1, 2, 3, 4], [1, 3, 2, 4])
        >>> round(difference.value, 2)
        0.25
    """
    positive, (first, second), patient_of = _checked(labels, [scores_a, scores_b], patient_ids)
    # the variance is a quadratic form of the placements, so that of a difference is that form of their difference
    return _area(_placements(positive, first) - _placements(positive, second), positive, patient_of)


def _placements(positive: BoolArray, scores: FloatArray) -> FloatArray:
    """For each positive, the share of negatives below it; for each negative, the share of positives above it, [n]."""
    among_all = rankdata(scores)
    placed = np.empty(len(scores))
    placed[positive] = (among_all[positive] - rankdata(scores[positive])) / (~positive).sum()
    placed[~positive] = 1 - (among_all[~positive] - rankdata(scores[~positive])) / positive.sum()
    return placed


def _area(placed: FloatArray, positive: BoolArray, patient_of: IntArray) -> Area:
    """Mean placement and its standard error, slides summed within patients."""
    value = float(placed[positive].mean())
    variance, parts = 0.0, []
    for side in (positive, ~positive):
        pull = np.bincount(patient_of, np.where(side, placed - value, 0.0)) / side.sum()  # [P]
        variance += _unbiased(np.unique(patient_of[side]).size) * float(pull @ pull)
        parts.append(pull)
    variance += 2 * _unbiased(int(patient_of.max()) + 1) * float(parts[0] @ parts[1])
    return Area(value, float(np.sqrt(max(variance, 0.0))))


def _unbiased(n: int) -> float:
    return n / (n - 1)


def _checked(
    labels: npt.ArrayLike, scores: Sequence[npt.ArrayLike], patient_ids: Sequence[str] | None
) -> tuple[BoolArray, list[FloatArray], IntArray]:
    """Which slides are positive [n], the scores [n] each, and the number of every slide's patient [n]."""
    truth, values = np.asarray(labels), [np.asarray(each, dtype=np.float64) for each in scores]
    ids = np.arange(len(truth)) if patient_ids is None else np.array(patient_ids)
    if truth.ndim != 1 or any(each.shape != truth.shape for each in (*values, ids)):
        raise EvaluationError(
            f"got labels {truth.shape}, scores {listed(each.shape for each in values)} and {len(ids)} patients → "
            f"expected one of each per slide → pass the score of one class, [n]"
        )
    if not np.isin(truth, (0, 1)).all() or not all(np.isfinite(each).all() for each in values):
        raise EvaluationError(
            f"got labels {listed(np.unique(truth).tolist())} → expected 0 and 1, with finite scores → pass one class "
            f"against the others"
        )
    positive, patient_of = truth.astype(bool), np.unique(ids, return_inverse=True)[1]
    per_side = [np.unique(patient_of[side]).size for side in (positive, ~positive)]
    if min(per_side) < 2:
        raise EvaluationError(
            f"got {per_side[0]} patients with positive slides and {per_side[1]} with negative ones → expected two or "
            f"more of each → no variance can be told from fewer"
        )
    return positive, values, patient_of
