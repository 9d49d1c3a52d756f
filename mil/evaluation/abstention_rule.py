"""Which slides a packed model of classes answers: a threshold chosen on validation slides, and judged on others."""

import math
from typing import Any, NamedTuple

import numpy as np

from mil.arrays import FloatArray, IntArray
from mil.cohort.targets import CLASSIFICATION
from mil.errors import RunError
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.statistics.abstention import choose_confidence


class Wish(NamedTuple):
    """When a model is to abstain; at most one is given, and without any it never does.

    Attributes:
        abstain_below: below this confidence.
        coverage: where this share of validation slides is still answered.
        accuracy: where this share of the answers on validation slides is right.
    """

    abstain_below: float | None = None
    coverage: float | None = None
    accuracy: float | None = None

    def check(self) -> None:
        """Refuse what contradicts itself or cannot be.

        Raises:
            RunError: two wishes, or one that is no share.
        """
        chosen = {name: value for name, value in self._asdict().items() if value is not None}
        if len(chosen) > 1:
            raise RunError(f"got {' and '.join(chosen)} → they say the same thing → give one")
        for name, value in chosen.items():
            if not 0 < value <= 1:
                raise RunError(f"got {name}={value} → expected a share above 0 and at most 1 → give 0.9, for example")

    def check_task(self, task: str) -> None:
        """Refuse a wish where there are no classes, whose probabilities tell how sure a model is.

        Raises:
            RunError: there are none.
        """
        chosen = [f"{name.replace('_', '-')}={value:g}" for name, value in self._asdict().items() if value is not None]
        if chosen and task != CLASSIFICATION:
            raise RunError(
                f"got {chosen[0]} for a run of task {task} → expected classes, whose probabilities tell from which "
                f"slides to abstain → leave --{chosen[0].partition('=')[0]} out"
            )

    def choose(self, labels: IntArray, probabilities: FloatArray) -> float | None:
        """The threshold that slides ask for; None where no confidence reaches the accuracy."""
        if self.coverage is not None:
            return choose_coverage(probabilities, self.coverage)
        return None if self.accuracy is None else choose_confidence(labels, probabilities, self.accuracy)


def choose_abstention(predictions: ReplicaPredictions, wish: Wish) -> dict[str, Any] | None:
    """The threshold, how it was chosen, and what it does on validation slides and out of fold; None without a wish.

    Raises:
        RunError: no confidence reaches the accuracy, or members of different folds were given a wish that is chosen
            by validation slides.
    """
    if wish == Wish():
        return None
    rows, values = predictions.mean_over("validation")
    labels = predictions.cohort.labels[rows]
    missing: str | None = None
    if wish.abstain_below is not None:
        below, by = wish.abstain_below, "given"
        cohort, scores = predictions.tested()
        out_of_fold = abstention_of(cohort.labels, scores, below)
    else:
        _require_shared_folds(predictions)
        below, by = _chosen(wish, labels, values)
        out_of_fold, missing = _by_fold(predictions, wish)
    return {
        "below": below,
        "chosen_by": by,
        "validation": abstention_of(labels, values, below),
        "out_of_fold": out_of_fold,
        "out_of_fold_missing": missing,
    }


def abstention_of(
    labels: IntArray, probabilities: FloatArray, below: float | FloatArray | None
) -> dict[str, Any] | None:
    """What abstaining below a confidence does to slides: shares answered and right; None without a threshold.

    Args:
        labels: [n].
        probabilities: [n, C].
        below: the threshold, or one for each slide [n].

    Returns:
        `below` (None where slides differ in it), `n_slides`, `n_answered`, `coverage`, `accuracy` of the answered (None
        if there are none) and `accuracy_of_all`.
    """
    if below is None:
        return None
    right = probabilities.argmax(axis=1) == labels
    answered = probabilities.max(axis=1) >= below
    return {
        "below": None if isinstance(below, np.ndarray) else below,
        "n_slides": len(labels),
        "n_answered": int(answered.sum()),
        "coverage": float(answered.mean()),
        "accuracy": float(right[answered].mean()) if answered.any() else None,
        "accuracy_of_all": float(right.mean()),
    }


def choose_coverage(probabilities: FloatArray, coverage: float) -> float:
    """The highest confidence that at least this share of slides [n, C] reaches.

    >>> choose_coverage(np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.5, 0.5]]), 0.75)
    0.6
    """
    ranked = np.sort(probabilities.max(axis=1))[::-1]
    # 0.9 of 10 is 9, whatever floats make of it
    needed = math.ceil(round(coverage * len(ranked), 9))
    return float(ranked[max(needed, 1) - 1])


def _chosen(wish: Wish, labels: IntArray, probabilities: FloatArray) -> tuple[float, str]:
    """The threshold by all validation slides, and what it was chosen for."""
    below = wish.choose(labels, probabilities)
    if below is None:
        raise RunError(
            f"got accuracy={wish.accuracy:g} → no confidence reaches it on the {len(labels)} validation slides → ask "
            f"for less"
        )
    if wish.coverage is not None:
        return below, f"coverage {wish.coverage:g} of validation slides"
    return below, f"accuracy {wish.accuracy:g} on validation slides"


def _require_shared_folds(predictions: ReplicaPredictions) -> None:
    if not predictions.share_folds():
        raise RunError(
            "got an ensemble whose members were tested in different folds → what validates in one is tested in "
            "another, so that a threshold would be judged on the slides that it was chosen on → give --abstain-below, "
            "or train the members with the same folds and split_seed"
        )


def _by_fold(predictions: ReplicaPredictions, wish: Wish) -> tuple[dict[str, Any] | None, str | None]:
    """What thresholds chosen in the same way do out of fold, each by the validation parts of one fold alone.

    All folds together validate on the slides that they test, so that the one threshold of the model cannot be judged
    on them. A fold's own validation parts hold no patient that it tests. A slide that several folds test meets the
    mean of their thresholds, as it meets the mean of their probabilities.

    Returns:
        The figures, or None where a fold can choose no threshold, and why.
    """
    tests, chosen = [], []
    for fold in predictions.folds.tolist():
        rows, values = predictions.mean_over("validation", fold)
        below = wish.choose(predictions.cohort.labels[rows], values)
        if below is None:
            return (
                None,
                f"no confidence reaches accuracy {wish.accuracy:g} on the {len(rows)} validation slides of fold {fold}",
            )
        tests.append(predictions.tests(fold))
        chosen.append(below)
    held = np.array(tests, dtype=np.float64)  # [folds, n]
    tested = held.any(axis=0)
    cohort, scores = predictions.tested()
    cuts = np.array(chosen) @ held[:, tested] / held[:, tested].sum(axis=0)
    return (abstention_of(cohort.labels, scores, cuts) or {}) | {"below_by_fold": chosen}, None
