"""Comparing what two heads say about the same slides: permutation and t tests, and p values of several comparisons."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtr, stdtrit

from mil.arrays import FloatArray
from mil.errors import EvaluationError, listed
from mil.statistics import metrics
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling, Spread, check_confidence
from mil.statistics.checks import check_scores, patients_per_class
from mil.statistics.classification import SUMMARY_METRICS, class_scores, headline, is_claimable


def permutation_test(
    labels: npt.ArrayLike,
    probabilities_a: npt.ArrayLike,
    probabilities_b: npt.ArrayLike,
    patient_ids: Sequence[str],
    metric: str = "macro_f1",
    resamples: int = 2000,
    seed: int = 0,
) -> float:
    """Two-sided p value of the metric's difference A - B, were A and B to be exchanged patient by patient.

    Under the null hypothesis both say the same of a patient, all slides of the patient together. Up to 2 ** P <=
    `resamples` all exchanges are made, else as many are drawn (`scipy.stats.permutation_test`).

    Args:
        labels: [n] class index.
        probabilities_a: [n, C].
        probabilities_b: [n, C].
        patient_ids: [n], of P patients.
        metric: one of `mil.statistics.classification.SUMMARY_METRICS`.
        resamples: exchanges to draw.
        seed: of the draws.

    Raises:
        EvaluationError: an unknown metric, or arguments of different lengths.

    References:
        Good, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 2005; Field and Welsh, JRSS B 2007, on
        drawing clusters rather than their members.
    """
    truth = np.asarray(labels)
    scores = [np.asarray(values, dtype=np.float64) for values in (probabilities_a, probabilities_b)]
    if metric not in SUMMARY_METRICS or not len(truth) == len(scores[0]) == len(scores[1]) == len(patient_ids):
        raise EvaluationError(
            f"got metric {metric!r}, {len(truth)} labels, {len(scores[0])} and {len(scores[1])} rows of probabilities "
            f"and {len(patient_ids)} patients → expected one of {', '.join(SUMMARY_METRICS)} and equal numbers → pass "
            f"one row per slide"
        )
    return exchange_test(lambda swaps: _score(metric, truth, scores, swaps), patient_ids, resamples, seed)


def exchange_test(
    score: Callable[[FloatArray], FloatArray], patient_ids: Sequence[str], resamples: int = 2000, seed: int = 0
) -> float:
    """`permutation_test` for any metric of n slides.

    Args:
        score: the metric [B] of what A says where swaps [B, n] are 0, and of what B says where they are 1.
        patient_ids: [n].
        resamples: exchanges to draw.
        seed: of the draws.
    """
    from scipy.stats import permutation_test as exchange

    patients, patient_of = np.unique(np.array(patient_ids), return_inverse=True)
    if len(patients) < 2:
        return 1.0

    def difference(exchanged: FloatArray, _: FloatArray, axis: int) -> FloatArray:
        swaps = np.moveaxis(np.atleast_2d(exchanged), axis, -1)[..., patient_of]
        found = score(swaps) - score(1 - swaps)
        return found if exchanged.ndim > 1 else found[0]

    # a patient whose pair is (0, 1) keeps its predictions, one whose pair is (1, 0) has them exchanged
    result = exchange(
        (np.zeros(len(patients)), np.ones(len(patients))),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=256,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _score(metric: str, labels: npt.NDArray[Any], scores: Sequence[FloatArray], swaps: FloatArray) -> FloatArray:
    """The metric [B] of the first scores where swaps [B, n] are 0, and of the second where they are 1."""
    first, second = scores
    n_classes = first.shape[1]
    wanted = headline(metric)
    if wanted.of_areas is not None:
        mixed = (np.where(row[:, None] > 0, second, first) for row in swaps)
        return np.array([wanted.of_areas(metrics.class_auroc(labels, each))[0] for each in mixed])
    assert wanted.of_confusion is not None
    matrix = metrics.confusion(labels, first.argmax(axis=1), n_classes, 1 - swaps)
    matrix += metrics.confusion(labels, second.argmax(axis=1), n_classes, swaps)
    return wanted.of_confusion(matrix)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of several comparisons: below 0.05 together, they err in any with at most 5 %.

    References:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = highest
    return adjusted


class TTest(NamedTuple):
    """A mean difference with its interval and the two-sided p value of its being 0."""

    difference: float
    low: float
    high: float
    p: float


def corrected_t_test(differences: Sequence[float], test_to_train: float, confidence: float = 0.95) -> TTest:
    """Student's t test on differences between test parts of one cohort, whose training parts overlap.

    Overlap makes the differences of J test parts alike, so that their own spread says too little; the variance of
    their mean is taken as (1 / J + n_test / n_train) · s² instead of s² / J. It speaks of training the heads again,
    unlike tests on finished predictions.

    Args:
        differences: [J], one per test part. Seeds that share a test part are no further parts: average them first.
        test_to_train: slides of a test part over those of its training part, such as 0.25 for five folds.
        confidence: of the interval.

    Raises:
        EvaluationError: fewer than two differences, one that is not finite, or an impossible share.

    References:
        Nadeau and Bengio, "Inference for the generalization error", Machine Learning 2003; Bouckaert and Frank,
        PAKDD 2004, for repeated folds.
    """
    check_confidence(confidence)
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all() or not 0 <= test_to_train < np.inf:
        raise EvaluationError(
            f"got differences {listed(differences)} and test_to_train={test_to_train} → expected two or more finite "
            f"ones and a share of 0 or more → pass one difference per test fold"
        )
    mean, freedom = float(values.mean()), values.size - 1
    error = float(values.std(ddof=1)) * math.sqrt(1 / values.size + test_to_train)
    half = float(stdtrit(freedom, (1 + confidence) / 2)) * error
    if error > 0:
        return TTest(mean, mean - half, mean + half, float(2 * stdtr(freedom, -abs(mean) / error)))
    return TTest(mean, mean, mean, 1.0 if mean == 0 else 0.0)


class PairedDifference(NamedTuple):
    """Metric of A minus metric of B on the same slides, with its interval (None where none can be claimed)."""

    difference: float
    low: float | None
    high: float | None


def paired_difference(
    labels: npt.ArrayLike,
    probabilities_a: npt.ArrayLike,
    probabilities_b: npt.ArrayLike,
    patient_ids: Sequence[str],
    metric: str = "macro_f1",
    resampling: Resampling = USUAL_RESAMPLING,
) -> PairedDifference:
    """Difference A - B of a summary metric on the same slides, with both scored on the same resamples of patients.

    Args:
        labels: [n] class index.
        probabilities_a: [n, C].
        probabilities_b: [n, C].
        patient_ids: [n].
        metric: one of `SUMMARY_METRICS`.
        resampling: how intervals are made; stratified, it draws patients among those with the same set of classes.

    Raises:
        EvaluationError: an unknown metric, or arguments that do not belong together.
    """
    spread = difference_spread(
        labels,
        probabilities_a,
        probabilities_b,
        patient_ids,
        metric,
        resampling,
    )
    truth = np.asarray(labels).astype(np.int64)
    patients = patients_per_class(truth, patient_ids, np.shape(probabilities_a)[-1])
    entry = spread.entry(metric, is_claimable(metric, patients))
    return PairedDifference(float(spread.value[metric]), entry["low"], entry["high"])


def difference_spread(
    labels: npt.ArrayLike,
    probabilities_a: npt.ArrayLike,
    probabilities_b: npt.ArrayLike,
    patient_ids: Sequence[str],
    metric: str = "macro_f1",
    resampling: Resampling = USUAL_RESAMPLING,
) -> Spread:
    """The replicates behind `paired_difference`, under the name of the metric; same arguments and errors."""
    headline(metric)
    n_classes = np.shape(probabilities_a)[-1]
    truth, scores_a = check_scores(labels, probabilities_a, patient_ids, n_classes)
    _, scores_b = check_scores(labels, probabilities_b, patient_ids, n_classes)

    def difference(weights: FloatArray | None) -> dict[str, FloatArray]:
        return {metric: class_scores(truth, scores_a, weights)[metric] - class_scores(truth, scores_b, weights)[metric]}

    return Spread.of(difference, patient_ids, resampling, truth)


def paired_t_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, low and high of paired differences from independent repeats, such as data seeds, by Student's t.

    Not for folds or training seeds of one cohort: these share slides and are not independent.

    Raises:
        EvaluationError: fewer than two repeats, or a difference that is not finite.
    """
    check_confidence(confidence)
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise EvaluationError(
            f"got differences {listed(differences)} → expected two or more finite ones → repeat with more data seeds"
        )
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size)
    half = float(stdtrit(values.size - 1, (1 + confidence) / 2)) * error
    return mean, mean - half, mean + half


def minimum_detectable_difference(
    labels: npt.ArrayLike,
    probabilities_a: npt.ArrayLike,
    probabilities_b: npt.ArrayLike,
    patient_ids: Sequence[str],
    metric: str = "macro_f1",
    power: float = 0.8,
    significance: float = 0.05,
    resampling: Resampling = USUAL_RESAMPLING,
) -> float | None:
    """Difference of a metric that cohorts of this size detect in a share `power` of cases, see `detectable`.

    The standard error is that of the paired difference of these two heads over resampled patients. The assumption is
    that two heads which differ by more, or by less, would err together as often as these two do.

    Args:
        labels: [n] class index.
        probabilities_a: [n, C].
        probabilities_b: [n, C].
        patient_ids: [n].
        metric: one of `mil.statistics.classification.SUMMARY_METRICS`.
        power: share of such cohorts in which the test finds the difference.
        significance: of the two-sided test.
        resampling: how intervals are made.

    Returns:
        The difference, 0 or more. None where no standard error can be told: a single patient, or two heads whose
        difference is the same in all resamples, such as equal ones.

    Raises:
        EvaluationError: an unknown metric, impossible shares, or arguments that do not belong together.
    """
    spread = difference_spread(labels, probabilities_a, probabilities_b, patient_ids, metric, resampling)
    differences = spread.resampled[metric]
    differences = differences[~np.isnan(differences)]
    if len(set(patient_ids)) < 2 or differences.size < 2 or np.ptp(differences) == 0:
        return None
    return detectable(float(differences.std(ddof=1)), power, significance)


def detectable(standard_error: float, power: float = 0.8, significance: float = 0.05) -> float:
    """True difference that a two-sided z test finds in a share `power` of cases.

    It is (z[1 - significance / 2] + z[power]) · standard error, 2.8 standard errors by default.

    Raises:
        EvaluationError: a share that is not between 0 and 1.

    Example:
        >>> round(detectable(0.05), 3)
        0.14
    """
    if not (0 < power < 1 and 0 < significance < 1):
        raise EvaluationError(
            f"got power={power}, significance={significance} → expected shares between 0 and 1 → pass 0.8 and 0.05, "
            f"for example"
        )
    return float(ndtri(1 - significance / 2) + ndtri(power)) * standard_error
