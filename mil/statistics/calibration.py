"""Whether probabilities mean what they say: reliability bins, calibration errors, Brier score, log-likelihood.

A *bin* holds slides of similar probability; calibrated, the share of them that belong to the class is that probability.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.arrays import FloatArray, IntArray
from mil.errors import EvaluationError, did_you_mean, listed
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling, Spread
from mil.statistics.checks import FEW_PATIENTS, check_scores, few_patients

BINNINGS = ("width", "mass")
CALIBRATED_DRAWS = 500


def brier(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean squared distance of probabilities [n, C] from the truth, summed over classes: 0 to 2, lower is better.

    References:
        Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 1950. With two
        classes it is twice the score that looks at one of them.
    """
    return float(_brier(*_checked(labels, probabilities)).mean())


def log_likelihood_loss(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean negative log-likelihood of the true classes, in nats; probabilities below 2e-308 count as that."""
    return float(_log_loss(*_checked(labels, probabilities)).mean())


def expected_calibration_error(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = 10, by: str = "width"
) -> float:
    """Mean distance between the confidence in the predicted class and how often it is right, over bins of slides.

    It is biased upwards: of few slides, even calibrated ones do not hit the mean of their bin. See
    `error_if_calibrated`.

    Args:
        labels: [n] class index.
        probabilities: [n, C].
        bins: number of bins.
        by: "width", bins of equal width from 0 to 1, or "mass", bins of equally many slides (equal values together).

    References:
        Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015;
        Nixon et al., "Measuring calibration in deep learning", CVPR workshops 2019 (equal mass, one class at a time).
    """
    truth, scores = _checked(labels, probabilities)
    confidence, right = _top(truth, scores)
    return float(_error(confidence, right[None], assign_bins(confidence, bins, by))[0])


def classwise_calibration_errors(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = 10, by: str = "width"
) -> FloatArray:
    """The calibration error of every class's own probability [C]; their mean is the classwise ECE.

    Arguments as in `expected_calibration_error`.
    """
    truth, scores = _checked(labels, probabilities)
    columns = range(scores.shape[1])
    binned = [assign_bins(scores[:, at], bins, by) for at in columns]
    return np.array([_error(scores[:, at], (truth == at)[None], binned[at])[0] for at in columns])


def error_if_calibrated(
    probabilities: npt.ArrayLike, bins: int = 10, by: str = "width", seed: int = 0
) -> tuple[float, float]:
    """Mean and 95 % quantile of the expected calibration error, were the probabilities [n, C] exactly right.

    Labels are drawn from the probabilities, slide by slide; slides of one patient, which resemble each other, have
    larger errors. An error below the quantile shows no miscalibration.
    """
    scores = np.asarray(probabilities, dtype=np.float64)
    confidence = scores.max(axis=1)
    right = np.random.default_rng(seed).random((CALIBRATED_DRAWS, len(scores))) < confidence
    errors = _error(confidence, right, assign_bins(confidence, bins, by))
    return float(errors.mean()), float(np.quantile(errors, 0.95))


def evaluate_calibration(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    patient_ids: Sequence[str],
    class_names: Sequence[str],
    bins: int = 10,
    by: str = "width",
    resampling: Resampling = USUAL_RESAMPLING,
) -> dict[str, Any]:
    """Every measure of calibration, plain values for `metrics.json`; intervals are over resampled patients.

    The calibration errors have no interval, as resampling adds to their upward bias; `ece_if_calibrated` is what to
    compare them with. The arguments are those of `expected_calibration_error` and `evaluate`.

    Returns:
        `brier` and `nll` as {value, low, high}; `ece`; `ece_if_calibrated` as {mean, high}; `classwise_ece`, the mean
        of `classes` by name; `reliability`, for every bin that holds slides {n, n_patients, confidence, accuracy}, of
        which accuracy is {value, low, high}; `warnings`.

    Raises:
        EvaluationError: the arguments do not belong together, or are no probabilities.
    """
    check_scores(labels, probabilities, patient_ids, len(class_names))
    truth, scores = _checked(labels, probabilities)
    top, right = _top(truth, scores)
    bin_of = assign_bins(top, bins, by)
    losses = {"brier": _brier(truth, scores), "nll": _log_loss(truth, scores)}
    inside = _inside(bin_of)

    def score(weights: FloatArray) -> dict[str, FloatArray]:
        means = {name: (weights @ loss) / weights.sum(axis=1) for name, loss in losses.items()}
        held, hits = weights @ inside, weights @ (inside * right[:, None])  # [B, bins]
        return {**means, "accuracy": np.divide(hits, held, out=np.full(held.shape, np.nan), where=held > 0)}

    spread = Spread.of(score, patient_ids, resampling, truth)
    reliability = _describe_bins(spread, top, bin_of, np.array(patient_ids))
    of_classes = classwise_calibration_errors(truth, scores, bins, by)
    mean, high = error_if_calibrated(scores, bins, by, resampling.seed)
    return {
        **{name: spread.entry(name, len(set(patient_ids)) >= 2) for name in losses},
        "ece": expected_calibration_error(truth, scores, bins, by),
        "ece_if_calibrated": {"mean": mean, "high": high},
        "classwise_ece": float(of_classes.mean()),
        "classes": dict(zip(class_names, of_classes.tolist(), strict=True)),
        "reliability": reliability,
        "warnings": few_patients(class_names, truth, patient_ids) + _warn_of_bins(reliability),
    }


def assign_bins(values: FloatArray, bins: int = 10, by: str = "width") -> IntArray:
    """The bin of every value [n], from 0; a value on an edge belongs to the bin below it.

    Raises:
        EvaluationError: fewer than one bin, or an unknown binning.
    """
    if by not in BINNINGS or bins < 1:
        raise EvaluationError(
            f"got bins={bins}, by={by!r} → expected 1 or more, by one of {listed(BINNINGS)} → "
            f"{did_you_mean(by, BINNINGS)}pass bins=10, by='width', for example"
        )
    shares = np.linspace(0, 1, bins + 1)
    edges = shares if by == "width" else np.unique(np.quantile(values, shares))
    return np.searchsorted(edges[1:-1], values, side="left").astype(np.int64)


def _describe_bins(
    spread: Spread, confidence: FloatArray, bin_of: IntArray, patients: npt.NDArray[Any]
) -> list[dict[str, Any]]:
    """The bins that hold slides, from low to high confidence."""
    described = []
    for column, at in enumerate(np.unique(bin_of).tolist()):
        held = bin_of == at
        n_patients = len(np.unique(patients[held]))
        described.append(
            {
                "n": int(held.sum()),
                "n_patients": n_patients,
                "confidence": float(confidence[held].mean()),
                "accuracy": spread.entry("accuracy", n_patients >= 2, column),
            }
        )
    return described


def _warn_of_bins(reliability: Sequence[dict[str, Any]]) -> list[str]:
    few = sum(each["n_patients"] < FEW_PATIENTS for each in reliability)
    if not few:
        return []
    return [
        f"{few} of {len(reliability)} reliability bins hold slides of fewer than {FEW_PATIENTS} patients: what they "
        f"show is chance"
    ]


def _top(labels: IntArray, probabilities: FloatArray) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Confidence in the predicted class [n], and whether it is right [n]."""
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels


def _inside(bin_of: IntArray) -> FloatArray:
    """1 where a slide is in a bin, [n, bins that hold slides]."""
    inside: FloatArray = (bin_of[:, None] == np.unique(bin_of)).astype(np.float64)
    return inside


def _error(values: FloatArray, happened: npt.NDArray[np.bool_], bin_of: IntArray) -> FloatArray:
    """Mean over slides of the distance between means of `happened` [B, n] and `values` [n] in their bin, [B]."""
    gaps: FloatArray = np.abs((happened - values) @ _inside(bin_of)).sum(axis=1) / len(values)
    return gaps


def _brier(labels: IntArray, probabilities: FloatArray) -> FloatArray:
    squares: FloatArray = ((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(axis=1)
    return squares


def _log_loss(labels: IntArray, probabilities: FloatArray) -> FloatArray:
    of_truth = probabilities[np.arange(len(labels)), labels]
    losses: FloatArray = -np.log(np.maximum(of_truth, np.finfo(np.float64).tiny))
    return losses


def _checked(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> tuple[IntArray, FloatArray]:
    """Labels [n] and probabilities [n, C], rows of which sum to one."""
    n_classes = np.shape(probabilities)[-1] if np.ndim(probabilities) else 0
    truth, scores = check_scores(labels, probabilities, [""] * np.size(labels), n_classes)
    bad = (scores < 0).any(axis=1) | (np.abs(scores.sum(axis=1) - 1) > 1e-4)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise EvaluationError(
            f"got {scores[at].tolist()} in row {at} → expected probabilities that sum to one → take the softmax of "
            f"logits first"
        )
    return truth, scores


def evaluate_label_calibration(
    truth: FloatArray, chances: FloatArray, patient_ids: Sequence[str], columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """`mil.statistics.calibration.evaluate_calibration` of every label as two classes, no and yes, by its name.

    Labels without a known answer are left out.

    Args:
        truth: [n, L] of 0, 1 and NaN (unknown).
        chances: [n, L], probability of yes.
        patient_ids: [n].
        columns: [L], names of the labels.
    """
    patients = np.array(patient_ids)
    found = {}
    for at, column in enumerate(columns):
        known = np.isfinite(truth[:, at])
        if known.any():
            yes, answers = chances[known, at], truth[known, at].astype(np.int64)
            both = np.stack([1 - yes, yes], axis=1)
            found[column] = evaluate_calibration(answers, both, patients[known].tolist(), (f"no {column}", column))
    return found
