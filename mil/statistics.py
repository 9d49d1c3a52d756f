"""How sure a number is: bootstrap intervals over patients, paired differences, and repeats of an experiment.

Slides of one patient resemble each other, so that patients, not slides, are drawn with replacement: all P of them at
once, without strata, each with all its slides. A replicate that misses a class cannot tell macro-averaged metrics or
those of the class; it is left out of their intervals and counted.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from mil import metrics
from mil.errors import EvaluationError, did_you_mean, listed

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

SUMMARY_METRICS = ("macro_f1", "balanced_accuracy", "auroc", "accuracy")
CLASS_METRICS = ("tp", "fp", "fn", "tn", "f1", "recall", "precision", "auroc")
COUNTS = ("tp", "fp", "fn", "tn")
# Below this many patients the percentile interval of a class rests on a handful of different resamples.
FEW_PATIENTS = 5
# Replicates are scored in pieces of at most this many weights, so that memory does not grow with the cohort.
WEIGHTS_AT_ONCE = 4_000_000


class PairedDifference(NamedTuple):
    """Metric of A minus metric of B on the same slides, with its interval (None where none can be claimed)."""

    difference: float
    low: float | None
    high: float | None


def patient_bootstrap(
    statistic: Callable[[FloatArray], dict[str, FloatArray]],
    patient_ids: Sequence[str],
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, FloatArray]:
    """Values of a statistic under resampling of patients with replacement.

    Args:
        statistic: takes weights [B, n], how often each slide was drawn, and returns named arrays [B, ...].
        patient_ids: [n], the patient of every slide. The draws do not depend on the order of the slides.
        replicates: number of resamples.
        seed: of the draws; two statistics with the same seed see the same resamples.

    Returns:
        The named arrays, [replicates, ...].

    References:
        Field and Welsh, "Bootstrapping clustered data", JRSS B 2007 (the cluster bootstrap); percentile intervals
        after Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.
    """
    if replicates < 1:
        raise EvaluationError(f"got replicates={replicates} → expected 1 or more → pass 2000, for example")
    patients, patient_of = np.unique(np.array(patient_ids), return_inverse=True)
    rng = np.random.default_rng(seed)
    at_once = max(1, WEIGHTS_AT_ONCE // len(patient_of))
    pieces = []
    for start in range(0, replicates, at_once):
        size, total = min(at_once, replicates - start), len(patients)
        drawn = rng.integers(total, size=(size, total)) + total * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * total).reshape(size, total).astype(np.float64)
        pieces.append(statistic(times[:, patient_of]))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def percentile_interval(values: FloatArray, confidence: float = 0.95) -> tuple[float, float] | None:
    """The middle `confidence` of replicate values [B], without the undefined (NaN) ones; None if all are."""
    _check_confidence(confidence)
    defined = values[~np.isnan(values)]
    if defined.size == 0:
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def evaluate(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    patient_ids: Sequence[str],
    class_names: Sequence[str],
    replicates: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Every metric with its patient-level bootstrap interval, ready for `metrics.json` (undefined values are None).

    The prediction is the class of highest probability. No interval is given where it would rest on a class of fewer
    than two patients; a class of fewer than five gets a warning.

    Args:
        labels: [n] class index.
        probabilities: [n, C].
        patient_ids: [n].
        class_names: [C].
        replicates: number of bootstrap resamples.
        seed: of the resamples.
        confidence: of the intervals, such as 0.95.

    Returns:
        `n_slides`, `n_patients`, `replicates`, `confidence`; `macro_f1`, `balanced_accuracy`, `auroc`, `accuracy` as
        {value, low, high}; `confusion` (rows are true classes); `classes` by name with `support`, `n_patients` and
        {value, low, high} of `tp`, `fp`, `fn`, `tn` (one class against all others), `f1`, `recall`, `precision`,
        `auroc`; `dropped`, the replicates left out of each summary metric; `warnings`.

    Raises:
        EvaluationError: the arguments do not belong together, or hold values that cannot be scored.
    """
    _check_confidence(confidence)
    truth, scores = _checked(labels, probabilities, patient_ids, len(class_names))
    patients = _patients_per_class(truth, patient_ids, len(class_names))

    def score(weights: FloatArray | None) -> dict[str, FloatArray]:
        return _score(truth, scores, weights)

    value = {name: array[0] for name, array in score(None).items()}
    spread = patient_bootstrap(score, patient_ids, replicates, seed)
    summary = {
        name: _with_interval(value[name], spread[name], confidence, _is_claimable(name, patients, patient_ids))
        for name in SUMMARY_METRICS
    }
    dropped = {name: int(np.isnan(spread[name]).sum()) for name in SUMMARY_METRICS}
    return {
        "n_slides": len(truth),
        "n_patients": len(set(patient_ids)),
        "replicates": replicates,
        "confidence": confidence,
        **summary,
        "confusion": value["confusion"].astype(int).tolist(),
        "classes": {
            name: _describe_class(index, value, spread, confidence, patients, patient_ids)
            for index, name in enumerate(class_names)
        },
        "dropped": dropped,
        "warnings": _warn(class_names, patients, len(set(patient_ids)), dropped, replicates),
    }


def paired_difference(
    labels: npt.ArrayLike,
    probabilities_a: npt.ArrayLike,
    probabilities_b: npt.ArrayLike,
    patient_ids: Sequence[str],
    metric: str = "macro_f1",
    replicates: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Difference A - B of a summary metric on the same slides, with both scored on the same resamples of patients.

    Args:
        labels: [n] class index.
        probabilities_a: [n, C].
        probabilities_b: [n, C].
        patient_ids: [n].
        metric: one of `SUMMARY_METRICS`.
        replicates: number of bootstrap resamples.
        seed: of the resamples.
        confidence: of the interval.

    Raises:
        EvaluationError: an unknown metric, or arguments that do not belong together.
    """
    if metric not in SUMMARY_METRICS:
        raise EvaluationError(
            f"got metric {metric!r} → expected one of {listed(SUMMARY_METRICS)} → "
            f"{did_you_mean(metric, SUMMARY_METRICS)}choose one of these"
        )
    n_classes = np.shape(probabilities_a)[-1]
    truth, scores_a = _checked(labels, probabilities_a, patient_ids, n_classes)
    _, scores_b = _checked(labels, probabilities_b, patient_ids, n_classes)

    def difference(weights: FloatArray | None) -> dict[str, FloatArray]:
        return {metric: _score(truth, scores_a, weights)[metric] - _score(truth, scores_b, weights)[metric]}

    patients = _patients_per_class(truth, patient_ids, n_classes)
    spread = patient_bootstrap(difference, patient_ids, replicates, seed)[metric]
    claimable = _is_claimable(metric, patients, patient_ids)
    low, high = (percentile_interval(spread, confidence) if claimable else None) or (None, None)
    return PairedDifference(float(difference(None)[metric][0]), low, high)


def paired_t_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, low and high of paired differences from independent repeats, such as data seeds, by Student's t.

    Not for folds or training seeds of one cohort: these share slides and are not independent.

    Raises:
        EvaluationError: fewer than two repeats, or a difference that is not finite.
    """
    _check_confidence(confidence)
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise EvaluationError(
            f"got differences {listed(differences)} → expected two or more finite ones → repeat with more data seeds"
        )
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size)
    half = float(stdtrit(values.size - 1, (1 + confidence) / 2)) * error
    return mean, mean - half, mean + half


def _score(labels: IntArray, probabilities: FloatArray, weights: FloatArray | None) -> dict[str, FloatArray]:
    """All metrics under every weighting: summaries [B], those of classes [B, C], the confusion [B, C, C]."""
    n_classes = probabilities.shape[1]
    matrix = metrics.confusion(labels, probabilities.argmax(axis=1), n_classes, weights)
    counts = metrics.one_vs_all(matrix)
    areas = metrics.class_auroc(labels, probabilities, weights)
    present = matrix.sum(axis=2) > 0
    complete = present[:, np.unique(labels)].all(axis=1)
    summaries = {
        "macro_f1": metrics.macro_f1(matrix),
        "balanced_accuracy": metrics.balanced_accuracy(matrix),
        "auroc": metrics.mean_auroc(areas),
    }
    of_classes = {
        "f1": metrics.f1(counts),
        "recall": metrics.recall(counts),
        "precision": metrics.precision(counts),
        "auroc": areas,
    }
    return {
        "confusion": matrix,
        "accuracy": metrics.accuracy(matrix),
        **{name: np.where(complete, values, np.nan) for name, values in summaries.items()},
        **{f"class_{name}": values for name, values in counts._asdict().items()},
        **{f"class_{name}": np.where(present, values, np.nan) for name, values in of_classes.items()},
    }


def _describe_class(
    index: int,
    value: dict[str, FloatArray],
    spread: dict[str, FloatArray],
    confidence: float,
    patients: BoolArray,
    patient_ids: Sequence[str],
) -> dict[str, Any]:
    """The entry of one class in the result of `evaluate`."""
    entry: dict[str, Any] = {
        "support": int(value["confusion"][index].sum()),
        "n_patients": int(patients[index].sum()),
    }
    others = np.delete(patients, index, axis=0).any(axis=0).sum()
    for name in CLASS_METRICS:
        claimable = entry["n_patients"] >= 2 and (others >= 2 or name != "auroc")
        key = f"class_{name}"
        entry[name] = _with_interval(value[key][index], spread[key][:, index], confidence, claimable)
        if name in COUNTS:
            entry[name]["value"] = int(entry[name]["value"])
    return entry


def _with_interval(
    value: np.float64, spread: FloatArray, confidence: float, claimable: bool
) -> dict[str, float | None]:
    interval = percentile_interval(spread, confidence) if claimable and not np.isnan(value) else None
    low, high = interval or (None, None)
    return {"value": None if np.isnan(value) else float(value), "low": low, "high": high}


def _patients_per_class(labels: IntArray, patient_ids: Sequence[str], n_classes: int) -> BoolArray:
    """Whether each class occurs in each patient, bool [C, P]."""
    patients, patient_of = np.unique(np.array(patient_ids), return_inverse=True)
    occurs = np.zeros((n_classes, len(patients)), dtype=bool)
    occurs[labels, patient_of] = True
    return occurs


def _is_claimable(metric: str, patients: BoolArray, patient_ids: Sequence[str]) -> bool:
    """Whether two patients or more stand behind everything a summary metric averages."""
    if metric == "accuracy":
        return len(set(patient_ids)) >= 2
    per_class = patients.sum(axis=1)
    return bool((per_class[per_class > 0] >= 2).all())


def _warn(
    class_names: Sequence[str], patients: BoolArray, n_patients: int, dropped: dict[str, int], replicates: int
) -> list[str]:
    """What a reader of the intervals must know."""
    messages = []
    for name, count in zip(class_names, patients.sum(axis=1).tolist(), strict=True):
        if count == 0:
            messages.append(f"class {name!r} has no slides here: its metrics are undefined and not in the averages")
        elif count < 2:
            messages.append(
                f"class {name!r} has 1 patient: no interval is given for it, nor for metrics that average over classes"
            )
        elif count < FEW_PATIENTS:
            messages.append(f"class {name!r} has {count} patients: its intervals are too narrow to be trusted")
    if n_patients < 2:
        messages.append("all slides are of 1 patient: no interval is given")
    most = max(dropped.values())
    if most > replicates / 100:
        messages.append(
            f"{most} of {replicates} bootstrap replicates lack a class: the intervals of metrics that average over "
            f"classes are of the other {replicates - most}"
        )
    return messages


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise EvaluationError(
            f"got confidence={confidence} → expected a share between 0 and 1 → pass 0.95, for example"
        )


def _checked(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, patient_ids: Sequence[str], n_classes: int
) -> tuple[IntArray, FloatArray]:
    """Labels [n] and probabilities [n, C] that belong together."""
    truth, scores = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if truth.ndim != 1 or not len(truth) or scores.shape != (len(truth), n_classes) or len(patient_ids) != len(truth):
        raise EvaluationError(
            f"got labels {truth.shape}, probabilities {scores.shape}, {len(patient_ids)} patient ids, {n_classes} "
            f"classes → expected [n], [n, classes] and n of them, n > 0 → pass one row per slide"
        )
    if n_classes < 2 or truth.dtype.kind not in "iu" or truth.min() < 0 or truth.max() >= n_classes:
        raise EvaluationError(
            f"got labels {listed(np.unique(truth).tolist())} for {n_classes} classes → expected class "
            f"indices from 0 to {n_classes - 1} of two or more classes → index the class names"
        )
    if not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise EvaluationError(
            f"got probabilities {scores[at].tolist()} in row {at} → expected finite values → find out what the head "
            f"gave for this slide"
        )
    return truth.astype(np.int64), scores
