"""How well numbers are predicted: errors, explained variance, correlations, over many weightings at once.

Shapes: n slides, K targets, B weightings of the slides (a bootstrap replicate counts how often each was drawn).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from mil.bootstrap import Spread
from mil.errors import EvaluationError
from mil.metrics import mean_defined, weightings

FloatArray = npt.NDArray[np.float64]
OF_A_UNIT = ("mae", "rmse")
"""Metrics in the unit of a target, of which several targets have no common mean."""
NONE = {"value": None, "low": None, "high": None}
METRICS = ("r2", "pearson", "spearman", "mae", "rmse")


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


def evaluate_regression(
    truth: npt.ArrayLike,
    predicted: npt.ArrayLike,
    patient_ids: Sequence[str],
    columns: Sequence[str],
    replicates: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Every metric with its interval over resampled patients, ready for `metrics.json`.

    Args:
        truth: [n, K].
        predicted: [n, K].
        patient_ids: [n].
        columns: [K], names of the targets.
        replicates: number of bootstrap resamples.
        seed: of the resamples.
        confidence: of the intervals.

    Returns:
        `n_slides`, `n_patients`, `replicates`, `confidence`; the mean over targets of every metric as {value, low,
        high} (None for those in a target's unit, where there are several); `targets` by name with the same; `warnings`.

    Raises:
        EvaluationError: shapes that do not fit, or values that are not finite.
    """
    values, said = (np.asarray(each, dtype=np.float64) for each in (truth, predicted))
    if values.shape != (len(patient_ids), len(columns)) or said.shape != values.shape or not len(values):
        raise EvaluationError(
            f"got values {values.shape} and predictions {said.shape} for {len(patient_ids)} patients and "
            f"{len(columns)} targets → expected [n, K] of one n, above 0 → give what one run predicted"
        )
    if not np.isfinite(values).all() or not np.isfinite(said).all():
        raise EvaluationError("got values that are not finite → expected numbers → leave out slides without a target")

    def statistic(weights: FloatArray) -> dict[str, FloatArray]:
        found = score(values, said, weights)
        means = {name: mean_defined(each) for name, each in found.items()}
        return means | {f"of_{name}": each for name, each in found.items()}

    spread = Spread.of(statistic, patient_ids, replicates, seed, confidence, "percentile", None)
    enough = len(set(patient_ids)) >= 2
    return {
        "n_slides": len(values),
        "n_patients": len(set(patient_ids)),
        "replicates": replicates,
        "confidence": confidence,
        **{name: spread.entry(name, enough) for name in METRICS if name not in OF_A_UNIT or len(columns) == 1},
        **{name: dict(NONE) for name in OF_A_UNIT if len(columns) > 1},
        "targets": {
            column: {name: spread.entry(f"of_{name}", enough, at) for name in METRICS}
            for at, column in enumerate(columns)
        },
        "warnings": [] if enough else ["all slides are of 1 patient: no interval is given"],
    }
