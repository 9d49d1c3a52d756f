"""Comparing what two heads say about the same slides: permutation and t tests, and p values of several comparisons."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from mil.errors import EvaluationError, listed
from mil.statistics import metrics
from mil.statistics.bootstrap import check_confidence
from mil.statistics.classification import SUMMARY_METRICS

FloatArray = npt.NDArray[np.float64]


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
    if metric == "auroc":
        mixed = [np.where(row[:, None] > 0, second, first) for row in swaps]
        return np.array([metrics.auroc(labels, each)[0] for each in mixed])
    matrix = metrics.confusion(labels, first.argmax(axis=1), n_classes, 1 - swaps)
    matrix += metrics.confusion(labels, second.argmax(axis=1), n_classes, swaps)
    result: FloatArray = getattr(metrics, metric)(matrix)
    return result


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
