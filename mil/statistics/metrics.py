"""Classification metrics over many weightings at once, so that a bootstrap is one call.

A *weighting* gives every slide a weight; a bootstrap replicate is the weighting that counts how often each slide was
drawn. Shapes: n slides, C classes, B weightings. Every function returns one value per weighting, and NaN where a
value is undefined (nothing to divide by). Averages over classes leave undefined classes out, as scikit-learn does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mil.arrays import FloatArray, IntArray


@dataclass(frozen=True)
class Headline:
    """A metric that runs are told, ranked and compared by: a new one is one entry in the `HEADLINES` of its task.

    Attributes:
        name: its key in ``metrics.json`` and in tables.
        title: as figures and tables show it.
        proper: whether the title begins with a name or an abbreviation, which stays large within a sentence.
        short: the same where a table has no room, or empty.
        of_confusion: for classes, the metric [B] from confusion matrices [B, C, C]; or
        of_areas: the metric [B] from the areas under the ROC curves of the classes [B, C].
        of_every_class: for classes, whether it needs slides of all of them.
        lower_is_better: whether it is an error.
        of_a_unit: whether it has the unit of its target, so that several targets have no common mean.
        guess: what a draw gives, or always the mean; of the numbers of slides of the classes where it depends on them.
        of_replicas: whether it is told of every replica, whose test part is small, and drawn with its spread.
        brief: whether it is among those that are shown where there is little room.
        ranks: whether boards have a column for it, and settings can be chosen by it.
        usual_choice: whether settings are chosen by it unless another is named; the first of the task, if none is.
    """

    name: str
    title: str
    short: str = ""
    proper: bool = False
    of_confusion: Callable[[FloatArray], FloatArray] | None = None
    of_areas: Callable[[FloatArray], FloatArray] | None = None
    of_every_class: bool = True
    lower_is_better: bool = False
    of_a_unit: bool = False
    guess: float | Callable[[Sequence[int]], float] | None = None
    of_replicas: bool = True
    brief: bool = True
    ranks: bool = True
    usual_choice: bool = False

    def guessed(self, supports: Sequence[int] = ()) -> float | None:
        """What guessing gives, of classes with these numbers of slides."""
        return self.guess(supports) if callable(self.guess) else self.guess


class OneVsAll(NamedTuple):
    """Weight of true and false positives and negatives, one class against all others, each [B, C]."""

    tp: FloatArray
    fp: FloatArray
    fn: FloatArray
    tn: FloatArray


def confusion(
    labels: IntArray, predicted: IntArray, n_classes: int, weights: npt.ArrayLike | None = None
) -> FloatArray:
    """Weight of every (true, predicted) pair of classes.

    Args:
        labels: [n] class index, 0 to C - 1.
        predicted: [n] class index.
        n_classes: C.
        weights: [B, n], 0 or more; None weighs every slide once (B = 1).

    Returns:
        [B, C, C]; rows are true classes, columns predicted ones.
    """
    cells = np.zeros((len(labels), n_classes * n_classes))
    cells[np.arange(len(labels)), labels * n_classes + predicted] = 1.0
    return (weightings(weights, len(labels)) @ cells).reshape(-1, n_classes, n_classes)


def one_vs_all(matrix: FloatArray) -> OneVsAll:
    """True and false positives and negatives of every class, from a confusion matrix [B, C, C]."""
    tp = np.diagonal(matrix, axis1=1, axis2=2)
    fn = matrix.sum(axis=2) - tp
    fp = matrix.sum(axis=1) - tp
    return OneVsAll(tp, fp, fn, matrix.sum(axis=(1, 2))[:, None] - tp - fp - fn)


def recall(counts: OneVsAll) -> FloatArray:
    """TP / (TP + FN), [B, C]; NaN for a class without slides."""
    return _ratio(counts.tp, counts.tp + counts.fn)


def precision(counts: OneVsAll) -> FloatArray:
    """TP / (TP + FP), [B, C]; NaN for a class that is never predicted."""
    return _ratio(counts.tp, counts.tp + counts.fp)


def f1(counts: OneVsAll) -> FloatArray:
    """2 TP / (2 TP + FP + FN), [B, C]; NaN for a class that neither occurs nor is predicted."""
    return _ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn)


def macro_f1(matrix: FloatArray) -> FloatArray:
    """Mean F1 of the classes that occur or are predicted, [B], from a confusion matrix [B, C, C].

    With two classes it is the mean over both, not the F1 of the positive class.
    """
    return mean_defined(f1(one_vs_all(matrix)))


def balanced_accuracy(matrix: FloatArray) -> FloatArray:
    """Mean recall of the classes that occur, [B], from a confusion matrix [B, C, C]."""
    return mean_defined(recall(one_vs_all(matrix)))


def accuracy(matrix: FloatArray) -> FloatArray:
    """Weight on the diagonal over all weight, [B], from a confusion matrix [B, C, C]."""
    return _ratio(np.trace(matrix, axis1=1, axis2=2), matrix.sum(axis=(1, 2)))


def class_auroc(labels: IntArray, probabilities: FloatArray, weights: npt.ArrayLike | None = None) -> FloatArray:
    """Area under the ROC curve of every class against all others; tied scores count one half, exactly.

    Args:
        labels: [n] class index.
        probabilities: [n, C] score of every class; only the order within a column matters.
        weights: [B, n], 0 or more; None weighs every slide once (B = 1).

    Returns:
        [B, C]; NaN where a class or its complement has no weight.
    """
    every = weightings(weights, len(labels))
    columns = [binary_auroc(labels == index, probabilities[:, index], every) for index in range(probabilities.shape[1])]
    return np.stack(columns, axis=1)


def auroc(labels: IntArray, probabilities: FloatArray, weights: npt.ArrayLike | None = None) -> FloatArray:
    """Area under the ROC curve, [B]: of class 1 when there are two, else the mean of one class against all others.

    Arguments as in `class_auroc`. The mean is over the classes that have slides on both sides.
    """
    return mean_auroc(class_auroc(labels, probabilities, weights))


def mean_auroc(areas: FloatArray) -> FloatArray:
    """The summary [B] of per-class areas [B, C]: that of class 1 when there are two, else the mean of the defined."""
    return areas[:, 1] if areas.shape[1] == 2 else mean_defined(areas)


def binary_auroc(positive: npt.NDArray[np.bool_], scores: FloatArray, weightings: FloatArray) -> FloatArray:
    """P(score of a positive > score of a negative) + P(equal) / 2 under every weighting, [B]."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    # Slides of one score form one step of the curve, whatever their order.
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    sorted_weights = weightings[:, order]
    up = np.add.reduceat(sorted_weights * positive[order], starts, axis=1)
    across = np.add.reduceat(sorted_weights, starts, axis=1) - up
    below = np.cumsum(across, axis=1) - across
    area = np.einsum("bs,bs->b", up, below + across / 2)
    return _ratio(area, up.sum(axis=1) * across.sum(axis=1))


def weightings(weights: npt.ArrayLike | None, n: int) -> FloatArray:
    """Weights [B, n] as float64; None weighs each of n slides once."""
    return np.ones((1, n)) if weights is None else np.atleast_2d(np.asarray(weights, dtype=np.float64))


def _ratio(part: FloatArray, whole: FloatArray) -> FloatArray:
    result: FloatArray = np.full(part.shape, np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


def mean_defined(values: FloatArray) -> FloatArray:
    """Mean over classes [B, C] -> [B] without the NaN ones; NaN when all are."""
    defined = np.isfinite(values)
    return _ratio(np.where(defined, values, 0.0).sum(axis=1), defined.sum(axis=1).astype(np.float64))
