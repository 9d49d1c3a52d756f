"""Hyper-parameter importance: the share of the variance of validation scores between trials that each explains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.arrays import FloatArray
from mil.tuning.search_space import Dimension, value_name
from mil.tuning.trials import PRUNED, Trial

BINS = 4
"""Groups of equally many trials that an interval is divided into."""


@dataclass(frozen=True)
class Level:
    """The trials with one value of a list, or those within one part of an interval.

    Attributes:
        name: such as ``abmil``, or ``0.0001 to 0.0006``.
        low: lowest value; of a list the position.
        high: highest value.
        n: trials.
        median: of their aligned scores.
    """

    name: str
    low: float
    high: float
    n: int
    median: float


@dataclass(frozen=True, eq=False)
class Importance:
    """One dimension.

    Attributes:
        dimension: which.
        share: part of the variance of the aligned scores that it explains alone, 0 to 1; None where too few trials
            were made, or all scored the same.
        x: [m], value of each trial; of a list the position.
        y: [m], its score, folds aligned: the mean of its fold taken off and the mean of all put on, since folds differ
            more than settings do.
        whole: bool [m], False for trials that were pruned.
        levels: in the order of the values.
    """

    dimension: Dimension
    share: float | None
    x: FloatArray
    y: FloatArray
    whole: npt.NDArray[np.bool_]
    levels: tuple[Level, ...]


def importances(space: Sequence[Dimension], trials: Sequence[Trial], metric: str) -> list[Importance]:
    """Every dimension, those that explain most first.

    The share is epsilon squared of a one-way analysis of variance (Kelley, An unbiased correlation ratio measure, PNAS
    1935), which corrects the plain correlation ratio for the number of levels. Shares do not add up to one: what
    dimensions do together, and chance, are in none of them.

    Args:
        space: the dimensions.
        trials: of all folds; those without a score are left out.
        metric: what settings were chosen by.
    """
    scored = [trial for trial in trials if trial.mean(metric) is not None]
    y = _aligned(scored, metric)
    whole = np.array([trial.state != PRUNED for trial in scored], dtype=bool)
    found = []
    for dimension in space:
        values = [trial.setting.values[dimension.key] for trial in scored]
        x, group = _places(dimension, values)
        found.append(Importance(dimension, _share(y, group), x, y, whole, _levels(dimension, x, y, group)))
    return sorted(found, key=lambda each: -1.0 if each.share is None else each.share, reverse=True)


def _aligned(trials: Sequence[Trial], metric: str) -> FloatArray:
    scores = np.array([trial.mean(metric) for trial in trials], dtype=np.float64)
    folds = np.array([trial.fold for trial in trials])
    aligned = scores.copy()
    for fold in np.unique(folds):
        aligned[folds == fold] += scores.mean() - scores[folds == fold].mean()
    return aligned


def _places(dimension: Dimension, values: Sequence[Any]) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Where each trial stands on the axis, and the group it counts to, both [m]."""
    if dimension.interval is None:
        at = np.array([dimension.values.index(value) for value in values], dtype=np.int64)
        return at.astype(np.float64), at
    x = np.array(values, dtype=np.float64)
    different = np.unique(x)
    if len(different) <= BINS:
        return x, np.searchsorted(different, x).astype(np.int64)
    edges = np.quantile(x, np.linspace(0, 1, BINS + 1)[1:-1])
    return x, np.searchsorted(edges, x, side="left").astype(np.int64)


def _share(y: FloatArray, group: npt.NDArray[np.int64]) -> float | None:
    groups = [y[group == at] for at in np.unique(group)]
    n, k = len(y), len(groups)
    total = float(((y - y.mean()) ** 2).sum()) if n else 0.0
    # scores that are equal but for rounding
    if k < 2 or n <= k or total < 1e-18 * n:
        return None
    within = float(sum(((each - each.mean()) ** 2).sum() for each in groups))
    return max(0.0, 1 - (within / (n - k)) / (total / (n - 1)))


def _levels(dimension: Dimension, x: FloatArray, y: FloatArray, group: npt.NDArray[np.int64]) -> tuple[Level, ...]:
    found = []
    for at in np.unique(group):
        own = group == at
        low, high = float(x[own].min()), float(x[own].max())
        if dimension.interval is None:
            name = value_name(dimension.values[int(at)])
        else:
            name = value_name(low) if low == high else f"{low:.3g} to {high:.3g}"
        found.append(Level(name, low, high, int(own.sum()), float(np.median(y[own]))))
    return tuple(found)
