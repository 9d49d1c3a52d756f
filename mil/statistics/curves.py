"""ROC and precision-recall curves of one class against the others, with bands over resampled patients."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mil.arrays import BoolArray, FloatArray
from mil.statistics.bootstrap import patient_bootstrap

GRID = np.linspace(0, 1, 101)
REPLICATES = 500


class Curve(NamedTuple):
    """A curve and its pointwise band.

    Attributes:
        x: [points], false positive rate or recall, ascending.
        y: [points], true positive rate or precision.
        low: [101], lower end of the 95 % band on `GRID`; NaN where no resample has both sides.
        high: [101], its upper end.
    """

    x: FloatArray
    y: FloatArray
    low: FloatArray
    high: FloatArray


def roc_curve(positive: npt.ArrayLike, scores: npt.ArrayLike, patient_ids: Sequence[str], seed: int = 0) -> Curve:
    """The receiver operating characteristic; slides of one score are one step, drawn straight.

    Args:
        positive: bool [n].
        scores: [n], higher for the positive.
        patient_ids: [n].
        seed: of the 500 resamples.

    References:
        Fawcett, "An introduction to ROC analysis", Pattern Recognition Letters 2006 (curves averaged vertically).
    """
    steps = _Steps.of(positive, scores)
    up, across = steps.cumulate(np.ones((1, len(steps.order))))
    x, y = _share(across[0]), _share(up[0])

    def on_grid(weights: FloatArray) -> dict[str, FloatArray]:
        rises, runs = steps.cumulate(weights)
        rows = [np.interp(GRID, _share(run), _share(rise)) for rise, run in zip(rises, runs, strict=True)]
        return {"y": np.stack(rows)}

    return Curve(x, y, *_band(patient_bootstrap(on_grid, patient_ids, REPLICATES, seed)["y"]))


def precision_recall_curve(
    positive: npt.ArrayLike, scores: npt.ArrayLike, patient_ids: Sequence[str], seed: int = 0
) -> Curve:
    """Precision at every recall, without interpolation: that of the first threshold that reaches the recall.

    Arguments as in `roc_curve`.

    References:
        Davis and Goadrich, "The relationship between precision-recall and ROC curves", ICML 2006 (why points are not
        joined by straight lines).
    """
    steps = _Steps.of(positive, scores)
    up, across = steps.cumulate(np.ones((1, len(steps.order))))
    recall, precision = _share(up[0])[1:], _precision(up[0], across[0])[1:]

    def on_grid(weights: FloatArray) -> dict[str, FloatArray]:
        rises, runs = steps.cumulate(weights)
        return {"y": np.stack([_precision_at(GRID, rise, run) for rise, run in zip(rises, runs, strict=True)])}

    return Curve(recall, precision, *_band(patient_bootstrap(on_grid, patient_ids, REPLICATES, seed)["y"]))


class _Steps(NamedTuple):
    """Slides by falling score: their order, which are positive, and where a new score begins."""

    order: npt.NDArray[np.int64]
    positive: BoolArray
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, positive: npt.ArrayLike, scores: npt.ArrayLike) -> "_Steps":
        values = np.asarray(scores, dtype=np.float64)
        order = np.argsort(-values, kind="stable")
        ranked = values[order]
        starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        return cls(order, np.asarray(positive, dtype=bool)[order], starts)

    def cumulate(self, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Weight of the positive and of the negative above every threshold, [B, steps + 1], from none to all."""
        ranked = weights[:, self.order]
        sums = [np.add.reduceat(ranked * side, self.starts, axis=1) for side in (self.positive, ~self.positive)]
        zero = np.zeros((len(weights), 1))
        up, across = (np.hstack([zero, each.cumsum(axis=1)]) for each in sums)
        return up, across


def _share(cumulated: FloatArray) -> FloatArray:
    """Parts of the total; NaN where there is none."""
    share: FloatArray = cumulated / cumulated[-1] if cumulated[-1] > 0 else np.full_like(cumulated, np.nan)
    return share


def _precision(up: FloatArray, across: FloatArray) -> FloatArray:
    total = up + across
    precision: FloatArray = np.divide(up, total, out=np.ones_like(up), where=total > 0)
    return precision


def _precision_at(recalls: FloatArray, up: FloatArray, across: FloatArray) -> FloatArray:
    if up[-1] == 0:
        return np.full(len(recalls), np.nan)
    # a hair less, so that rounding does not push a recall that is reached beyond its threshold
    at = np.searchsorted(_share(up), recalls - 1e-12)
    return _precision(up, across)[np.maximum(at, 1)]


def _band(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The middle 95 % [101] of curves [B, 101], without the undefined."""
    defined = values[np.isfinite(values).all(axis=1)]
    if not len(defined):
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    low, high = np.quantile(defined, [0.025, 0.975], axis=0)
    return low, high
