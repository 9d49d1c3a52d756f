"""How sure a number is: metrics with intervals over patients, paired differences, and repeats of an experiment.

Patients, not slides, are drawn with replacement: by default all P of them at once; with `stratified`, those of the
same classes among themselves. A replicate that misses a class cannot tell macro-averaged metrics or those of the
class; it is left out of their intervals and counted. By strata there is no such replicate, but the shares of the
classes are then taken as known.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from mil.errors import EvaluationError, did_you_mean, listed
from mil.statistics import metrics
from mil.statistics.bootstrap import Spread, check_confidence, patient_strata

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

SUMMARY_METRICS = ("macro_f1", "balanced_accuracy", "auroc", "accuracy")
CLASS_METRICS = ("tp", "fp", "fn", "tn", "f1", "recall", "precision", "auroc")
COUNTS = ("tp", "fp", "fn", "tn")
# Below this many patients the percentile interval of a class rests on a handful of different resamples.
FEW_PATIENTS = 5


class PairedDifference(NamedTuple):
    """Metric of A minus metric of B on the same slides, with its interval (None where none can be claimed)."""

    difference: float
    low: float | None
    high: float | None


def evaluate(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    patient_ids: Sequence[str],
    class_names: Sequence[str],
    replicates: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    interval: str = "percentile",
    stratified: bool = False,
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
        interval: "percentile" or "bca" (bias-corrected and accelerated), see `mil.statistics.bootstrap`.
        stratified: draw patients among those with the same set of classes.

    Returns:
        `n_slides`, `n_patients`, `replicates`, `confidence`; `macro_f1`, `balanced_accuracy`, `auroc`, `accuracy` as
        {value, low, high}; `confusion` (rows are true classes); `classes` by name with `support`, `n_patients` and
        {value, low, high} of `tp`, `fp`, `fn`, `tn` (one class against all others), `f1`, `recall`, `precision`,
        `auroc`; `dropped`, the replicates left out of each summary metric; `warnings`. `interval` and `stratified`
        are among them where they are not the defaults.

    Raises:
        EvaluationError: the arguments do not belong together, or hold values that cannot be scored.
    """
    truth, scores = check_scores(labels, probabilities, patient_ids, len(class_names))
    patients = _patients_per_class(truth, patient_ids, len(class_names))
    spread = Spread.of(
        lambda weights: _score(truth, scores, weights),
        patient_ids,
        replicates,
        seed,
        confidence,
        interval,
        truth if stratified else None,
    )
    dropped = {name: int(np.isnan(spread.resampled[name]).sum()) for name in SUMMARY_METRICS}
    warnings = _warn(class_names, patients, dropped, replicates)
    if stratified:
        warnings += warn_of_strata(truth, patient_ids, class_names)
    chosen = {"interval": interval, "stratified": stratified} if interval != "percentile" or stratified else {}
    return {
        "n_slides": len(truth),
        "n_patients": len(set(patient_ids)),
        "replicates": replicates,
        "confidence": confidence,
        **chosen,
        **{name: spread.entry(name, _is_claimable(name, patients)) for name in SUMMARY_METRICS},
        "confusion": spread.value["confusion"].astype(int).tolist(),
        "classes": {name: _describe_class(index, spread, patients) for index, name in enumerate(class_names)},
        "dropped": dropped,
        "warnings": warnings,
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
    interval: str = "percentile",
    stratified: bool = False,
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
        interval: "percentile" or "bca".
        stratified: draw patients among those with the same set of classes.

    Raises:
        EvaluationError: an unknown metric, or arguments that do not belong together.
    """
    spread = difference_spread(
        labels,
        probabilities_a,
        probabilities_b,
        patient_ids,
        metric,
        replicates,
        seed,
        confidence,
        interval,
        stratified,
    )
    truth = np.asarray(labels).astype(np.int64)
    patients = _patients_per_class(truth, patient_ids, np.shape(probabilities_a)[-1])
    entry = spread.entry(metric, _is_claimable(metric, patients))
    return PairedDifference(float(spread.value[metric]), entry["low"], entry["high"])


def difference_spread(
    labels: npt.ArrayLike,
    probabilities_a: npt.ArrayLike,
    probabilities_b: npt.ArrayLike,
    patient_ids: Sequence[str],
    metric: str = "macro_f1",
    replicates: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    interval: str = "percentile",
    stratified: bool = False,
) -> Spread:
    """The replicates behind `paired_difference`, under the name of the metric; same arguments and errors."""
    check_metric(metric)
    n_classes = np.shape(probabilities_a)[-1]
    truth, scores_a = check_scores(labels, probabilities_a, patient_ids, n_classes)
    _, scores_b = check_scores(labels, probabilities_b, patient_ids, n_classes)

    def difference(weights: FloatArray | None) -> dict[str, FloatArray]:
        return {metric: _score(truth, scores_a, weights)[metric] - _score(truth, scores_b, weights)[metric]}

    strata = truth if stratified else None
    return Spread.of(difference, patient_ids, replicates, seed, confidence, interval, strata)


def paired_t_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, low and high of paired differences from independent repeats, such as data seeds, by Student's t.

    Not for folds or training seeds of one cohort: these share slides and are not independent.

    Raises:
        EvaluationError: fewer than two repeats, or a difference that is not finite.
    """
    check_confidence(confidence)
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise EvaluationError(
            f"got differences {listed(differences)} → expected two or more finite ones → repeat with more data seeds"
        )
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size)
    half = float(stdtrit(values.size - 1, (1 + confidence) / 2)) * error
    return mean, mean - half, mean + half


def few_patients(class_names: Sequence[str], labels: npt.ArrayLike, patient_ids: Sequence[str]) -> list[str]:
    """Warnings of the classes that too few patients have for an interval, a threshold or a test to mean much.

    Args:
        class_names: [C].
        labels: [n] class index.
        patient_ids: [n].
    """
    return _few_patients(class_names, _patients_per_class(np.asarray(labels), patient_ids, len(class_names)))


def check_metric(metric: str) -> None:
    """Refuse what is no summary metric.

    Raises:
        EvaluationError: it is none of `SUMMARY_METRICS`.
    """
    if metric not in SUMMARY_METRICS:
        raise EvaluationError(
            f"got metric {metric!r} → expected one of {listed(SUMMARY_METRICS)} → "
            f"{did_you_mean(metric, SUMMARY_METRICS)}choose one of these"
        )


def check_scores(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, patient_ids: Sequence[str], n_classes: int
) -> tuple[IntArray, FloatArray]:
    """Labels [n] and probabilities [n, C] that belong together.

    Raises:
        EvaluationError: they do not, or hold values that cannot be scored.
    """
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


def _describe_class(index: int, spread: Spread, patients: BoolArray) -> dict[str, Any]:
    """The entry of one class in the result of `evaluate`."""
    entry: dict[str, Any] = {
        "support": int(spread.value["confusion"][index].sum()),
        "n_patients": int(patients[index].sum()),
    }
    others = np.delete(patients, index, axis=0).any(axis=0).sum()
    for name in CLASS_METRICS:
        claimable = entry["n_patients"] >= 2 and (others >= 2 or name != "auroc")
        entry[name] = spread.entry(f"class_{name}", claimable, index)
        if name in COUNTS:
            entry[name]["value"] = int(entry[name]["value"])
    return entry


def _patients_per_class(labels: IntArray, patient_ids: Sequence[str], n_classes: int) -> BoolArray:
    """Whether each class occurs in each patient, bool [C, P]."""
    patients, patient_of = np.unique(np.array(patient_ids), return_inverse=True)
    occurs = np.zeros((n_classes, len(patients)), dtype=bool)
    occurs[labels, patient_of] = True
    return occurs


def _is_claimable(metric: str, patients: BoolArray) -> bool:
    """Whether two patients or more stand behind everything a summary metric averages."""
    if metric == "accuracy":
        return len(patients.T) >= 2
    per_class = patients.sum(axis=1)
    return bool((per_class[per_class > 0] >= 2).all())


def _few_patients(class_names: Sequence[str], patients: BoolArray) -> list[str]:
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
    if patients.shape[1] < 2:
        messages.append("all slides are of 1 patient: no interval is given")
    return messages


def _warn(class_names: Sequence[str], patients: BoolArray, dropped: dict[str, int], replicates: int) -> list[str]:
    """What a reader of the intervals must know."""
    messages = _few_patients(class_names, patients)
    most = max(dropped.values())
    if most > replicates / 100:
        messages.append(
            f"{most} of {replicates} bootstrap replicates lack a class: the intervals of metrics that average over "
            f"classes are of the other {replicates - most}"
        )
    return messages


def warn_of_strata(
    labels: IntArray, patient_ids: Sequence[str], class_names: Sequence[str], noun: str = "class"
) -> list[str]:
    """Warnings of patients who are drawn among themselves alone, and so are in every resample.

    Args:
        labels: [n], class or stratum of every slide.
        patient_ids: [n].
        class_names: names of the classes or strata.
        noun: what they are.
    """
    patients = _patients_per_class(labels, patient_ids, len(class_names))
    alone = [members[0] for members in patient_strata(patient_ids, labels) if len(members) == 1]
    messages = []
    for patient in alone:
        classes = listed(name for name, occurs in zip(class_names, patients[:, patient], strict=True) if occurs)
        messages.append(
            f"1 patient alone has slides of {classes} and of no other {noun}: by strata, every resample holds it once, "
            f"and its part of the uncertainty is missing"
        )
    return messages
