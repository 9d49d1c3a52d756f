"""How well numbers are predicted: errors, explained variance, correlations, over many weightings at once.

Shapes: n slides, K targets, B weightings of the slides (a bootstrap replicate counts how often each was drawn).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from mil.arrays import FloatArray
from mil.cohort.targets import REGRESSION, find_strata
from mil.errors import EvaluationError
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling, Spread
from mil.statistics.checks import FEW_PATIENTS, check_values, warn_of_strata
from mil.statistics.metrics import Headline, mean_defined, weightings

HEADLINES = (
    Headline("r2", "R²", proper=True, guess=0.0),
    Headline("pearson", "Pearson's correlation", "Pearson", proper=True, guess=0.0),
    Headline("spearman", "Spearman's correlation", "Spearman", proper=True, guess=0.0, of_replicas=False, brief=False),
    Headline("mae", "Mean absolute error", "MAE", lower_is_better=True, of_a_unit=True, brief=False),
    Headline(
        "rmse",
        "Root mean squared error",
        "RMSE",
        lower_is_better=True,
        of_a_unit=True,
        of_replicas=False,
        brief=False,
    ),
)
METRICS = tuple(each.name for each in HEADLINES)
OF_A_UNIT = tuple(each.name for each in HEADLINES if each.of_a_unit)
"""Metrics in the unit of a target, of which several targets have no common mean."""


def determination(truth: FloatArray, predicted: FloatArray, weights: npt.ArrayLike | None = None) -> FloatArray:
    """R², 1 - Σ w (y - ŷ)² / Σ w (y - ȳ)², [B, K]; NaN where y does not vary. Arguments as in `score`."""
    return _score(truth, predicted, weightings(weights, len(truth)))["r2"]


def score(truth: FloatArray, predicted: FloatArray, weights: npt.ArrayLike | None = None) -> dict[str, FloatArray]:
    """Every metric of `METRICS`, each [B, K].

    Spearman's correlation ranks all slides once, so that a replicate weighs ranks and does not draw new ones.

    Args:
        truth: [n, K].
        predicted: [n, K].
        weights: [B, n]; None weighs every slide once (B = 1).
    """
    every = weightings(weights, len(truth))
    found = _score(truth, predicted, every)
    ranks = [rankdata(values, axis=0) for values in (truth, predicted)]
    pearson, spearman = _correlation(truth, predicted, every), _correlation(ranks[0], ranks[1], every)
    return found | {"pearson": pearson, "spearman": spearman}


def _score(truth: FloatArray, predicted: FloatArray, every: FloatArray) -> dict[str, FloatArray]:
    total = every.sum(axis=1, keepdims=True)
    # around the plain mean, which keeps digits
    around = truth - truth.mean(axis=0)
    spread = every @ around**2 / total - (every @ around / total) ** 2
    squared = every @ (truth - predicted) ** 2 / total
    r2: FloatArray = np.full(squared.shape, np.nan)
    np.divide(squared, spread, out=r2, where=spread > _noise(around))
    absolute = every @ np.abs(truth - predicted) / total
    return {"r2": 1 - r2, "mae": absolute, "rmse": np.sqrt(squared)}


def _correlation(first: FloatArray, second: FloatArray, every: FloatArray) -> FloatArray:
    """Pearson's, [B, K]; NaN where one does not vary."""
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    total = every.sum(axis=1, keepdims=True)
    mean_1, mean_2 = every @ first / total, every @ second / total
    together = every @ (first * second) / total - mean_1 * mean_2
    alone_1, alone_2 = every @ first**2 / total - mean_1**2, every @ second**2 / total - mean_2**2
    result: FloatArray = np.full(together.shape, np.nan)
    defined = (alone_1 > _noise(first)) & (alone_2 > _noise(second))
    np.divide(together, np.sqrt(np.maximum(alone_1 * alone_2, 0)), out=result, where=defined)
    return result.clip(-1, 1)


def _noise(values: FloatArray) -> FloatArray:
    """What rounding leaves of a variance that is zero, [K]."""
    noise: FloatArray = 1e-12 * (values**2).mean(axis=0)
    return noise


def summarise(
    truth: FloatArray, predicted: FloatArray, weights: npt.ArrayLike | None = None, only: str | None = None
) -> dict[str, FloatArray]:
    """The mean over targets of every metric, each [B]; NaN for several targets in a unit of their own.

    Arguments as in `score`, and the one that is needed.
    """
    if only in ("r2", *OF_A_UNIT):
        # a test asks for it thousands of times, and correlations would take most of the time
        return _means(_score(truth, predicted, weightings(weights, len(truth))))
    return _means(score(truth, predicted, weights))


def _means(found: dict[str, FloatArray]) -> dict[str, FloatArray]:
    means = {name: mean_defined(each) for name, each in found.items()}
    several = found["r2"].shape[1] > 1
    return means | {name: np.full_like(means[name], np.nan) for name in OF_A_UNIT if several}


def evaluate_regression(
    truth: npt.ArrayLike,
    predicted: npt.ArrayLike,
    patient_ids: Sequence[str],
    columns: Sequence[str],
    resampling: Resampling = USUAL_RESAMPLING,
) -> dict[str, Any]:
    """Every metric with its interval over resampled patients, ready for `metrics.json`.

    Args:
        truth: [n, K].
        predicted: [n, K].
        patient_ids: [n].
        columns: [K], names of the targets.
        resampling: how intervals are made; stratified, it draws patients among those in the same quarter of the first
            target.

    Returns:
        `n_slides`, `n_patients`, `replicates`, `confidence`; the mean over targets of every metric as {value, low,
        high} (None for those in a target's unit, where there are several); `targets` by name with the same; `warnings`.

    Raises:
        EvaluationError: shapes that do not fit, or values that are not finite.
    """
    values, numbers = check_values(truth, predicted, patient_ids, columns, "targets")
    if not np.isfinite(values).all():
        raise EvaluationError("got values that are not finite → expected numbers → leave out slides without a target")

    def statistic(weights: FloatArray) -> dict[str, FloatArray]:
        found = score(values, numbers, weights)
        return _means(found) | {f"of_{name}": each for name, each in found.items()}

    strata, names = find_strata(REGRESSION, columns, values, patient_ids)
    spread = Spread.of(statistic, patient_ids, resampling, strata)
    n_patients = len(set(patient_ids))
    enough = n_patients >= 2
    return {
        "n_slides": len(values),
        "n_patients": n_patients,
        **resampling.describe(),
        **{name: spread.entry(name, enough) for name in METRICS},
        "targets": {
            column: {name: spread.entry(f"of_{name}", enough, at) for name in METRICS}
            for at, column in enumerate(columns)
        },
        "warnings": [
            *_warn_of_few(n_patients),
            *(warn_of_strata(strata, patient_ids, names, "stratum") if resampling.stratified else ()),
        ],
    }


def _warn_of_few(n_patients: int) -> list[str]:
    if n_patients >= FEW_PATIENTS:
        return []
    what = "the intervals are too narrow to be trusted" if n_patients >= 2 else "no interval is given"
    return [f"all slides are of {n_patients} patient(s): {what}"]
