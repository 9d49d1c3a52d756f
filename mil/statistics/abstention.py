"""Abstention: how much better a head is on the slides it is surest of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.arrays import BoolArray, FloatArray, IntArray
from mil.errors import EvaluationError, listed
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling, Spread
from mil.statistics.checks import check_scores, few_patients

COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of slides to answer at which the accuracy is told with an interval."""


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Scores of the slides of highest confidence, from the surest one to all; equal confidences come together.

    Attributes:
        confidence: [K], falling: what a slide needs to be answered.
        coverage: [K], share of slides that are answered, rising to 1.
        accuracy: [K], of these.
        balanced_accuracy: [K], of these; NaN while a class has no slide among them.
        area: under risk (1 - accuracy) against coverage, a step per slide; lower is better.
    """

    confidence: FloatArray
    coverage: FloatArray
    accuracy: FloatArray
    balanced_accuracy: FloatArray
    area: float


def risk_coverage(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> RiskCoverage:
    """The curve of a head that abstains where its highest probability is low.

    Args:
        labels: [n] class index.
        probabilities: [n, C].

    Raises:
        EvaluationError: they do not belong together.

    References:
        Geifman and El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017; Geifman, Uziel and
        El-Yaniv, "Bias-reduced uncertainty estimation", ICLR 2019 (the area).
    """
    truth, scores = _checked(labels, probabilities)
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == truth
    order, starts = _ranked(confidence)
    ends = np.r_[starts[1:], len(order)] - 1
    of_class = np.eye(scores.shape[1])[truth[order]]  # [n, C]
    answered = of_class.cumsum(axis=0)[ends]
    hits = (of_class * right[order, None]).cumsum(axis=0)[ends]
    here = np.unique(truth)
    recalls = np.divide(hits, answered, out=np.full(hits.shape, np.nan), where=answered > 0)[:, here]
    return RiskCoverage(
        confidence=confidence[order][ends],
        coverage=(ends + 1) / len(order),
        accuracy=hits.sum(axis=1) / (ends + 1),
        balanced_accuracy=recalls.mean(axis=1),
        area=float(_area(confidence, right, np.ones((1, len(truth))))[0]),
    )


def choose_confidence(labels: npt.ArrayLike, probabilities: npt.ArrayLike, accuracy: float) -> float | None:
    """The lowest confidence above which the slides are right in a share `accuracy`; None where there is none.

    To be chosen on validation slides and applied to others: "answer where the highest probability is at least this".

    Raises:
        EvaluationError: an impossible accuracy, or arguments that do not belong together.
    """
    if not 0 < accuracy <= 1:
        raise EvaluationError(
            f"got accuracy={accuracy} → expected a share above 0 and at most 1 → pass 0.95, for example"
        )
    curve = risk_coverage(labels, probabilities)
    reached = np.flatnonzero(curve.accuracy >= accuracy)
    return float(curve.confidence[reached[-1]]) if reached.size else None


def evaluate_abstention(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    patient_ids: Sequence[str],
    class_names: Sequence[str],
    resampling: Resampling = USUAL_RESAMPLING,
    coverages: Sequence[float] = COVERAGES,
) -> dict[str, Any]:
    """The curve, the area under it and the accuracy at some coverages, with intervals over resampled patients.

    The curve describes these slides: a confidence that reaches a coverage here is read from them, and a threshold for
    other slides is to be chosen on validation slides, see `choose_confidence`. Resamples keep the confidences.

    Args:
        labels: [n] class index.
        probabilities: [n, C].
        patient_ids: [n].
        class_names: [C].
        resampling: how intervals are made; stratified, it draws patients among those with the same set of classes.
        coverages: shares of slides that are to be answered, at the least.

    Returns:
        Plain values for JSON: `area` as {value, low, high}; `random_area`, what abstaining at random gives (the error
        of all slides); `coverages`, for each that was asked for {asked, confidence, coverage, n_slides, accuracy}, of
        which accuracy is {value, low, high}; `curve`, for every step {confidence, coverage, accuracy,
        balanced_accuracy}; `warnings`.

    Raises:
        EvaluationError: the arguments do not belong together, or a coverage is no share.
    """
    truth, scores = check_scores(labels, probabilities, patient_ids, len(class_names))
    _check_coverages(coverages)
    curve = risk_coverage(truth, scores)
    sure, right = scores.max(axis=1), scores.argmax(axis=1) == truth
    # 0.9 of 10 is 9, whatever floats make of it
    steps = np.searchsorted(curve.coverage, np.asarray(coverages) - 1e-9)
    answered = sure[:, None] >= curve.confidence[steps]  # [n, coverages]

    def score(weights: FloatArray) -> dict[str, FloatArray]:
        held, hits = weights @ answered, weights @ (answered & right[:, None])
        accuracy = np.divide(hits, held, out=np.full(held.shape, np.nan), where=held > 0)
        return {"area": _area(sure, right, weights), "accuracy": accuracy}

    spread = Spread.of(score, patient_ids, resampling, truth)
    patients = np.array(patient_ids)
    return {
        "area": spread.entry("area", len(set(patient_ids)) >= 2),
        "random_area": float(1 - right.mean()),
        "coverages": [
            {
                "asked": float(asked),
                "confidence": float(curve.confidence[step]),
                "coverage": float(curve.coverage[step]),
                "n_slides": int(answered[:, column].sum()),
                "accuracy": spread.entry("accuracy", len(set(patients[answered[:, column]])) >= 2, column),
            }
            for column, (asked, step) in enumerate(zip(coverages, steps.tolist(), strict=True))
        ],
        "curve": _steps(curve),
        "warnings": few_patients(class_names, truth, patient_ids),
    }


def _steps(curve: RiskCoverage) -> list[dict[str, float | None]]:
    """The steps of a curve as plain values."""
    names = ("confidence", "coverage", "accuracy", "balanced_accuracy")
    columns = [getattr(curve, name).tolist() for name in names]
    return [
        {name: None if np.isnan(value) else value for name, value in zip(names, row, strict=True)}
        for row in zip(*columns, strict=True)
    ]


def _check_coverages(coverages: Sequence[float]) -> None:
    if not all(0 < each <= 1 for each in coverages):
        raise EvaluationError(
            f"got the coverages {listed(coverages)} → expected shares above 0 and at most 1 → pass 0.9, for example"
        )


def _area(confidence: FloatArray, right: BoolArray, weights: FloatArray) -> FloatArray:
    """Mean over slides of the risk once they are answered, [B], under weights [B, n]."""
    order, starts = _ranked(confidence)
    steps = np.add.reduceat(weights[:, order], starts, axis=1)
    wrong = np.add.reduceat(weights[:, order] * ~right[order], starts, axis=1)
    answered = steps.cumsum(axis=1)
    risk = np.divide(wrong.cumsum(axis=1), answered, out=np.zeros(answered.shape), where=answered > 0)
    area: FloatArray = (steps * risk).sum(axis=1) / steps.sum(axis=1)
    return area


def _ranked(confidence: FloatArray) -> tuple[IntArray, IntArray]:
    """Slides from the surest down [n], and where among them each different confidence begins."""
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    return order, np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])


def _checked(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> tuple[IntArray, FloatArray]:
    n_classes = np.shape(probabilities)[-1] if np.ndim(probabilities) else 0
    return check_scores(labels, probabilities, [""] * np.size(labels), n_classes)
