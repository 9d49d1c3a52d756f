"""How sure a number is: metrics with intervals over patients, paired differences, and repeats of an experiment.

Patients, not slides, are drawn with replacement: by default all P of them at once; with `stratified`, those of the
same classes among themselves. A replicate that misses a class cannot tell macro-averaged metrics or those of the
class; it is left out of their intervals and counted. By strata there is no such replicate, but the shares of the
classes are then taken as known.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.arrays import BoolArray, FloatArray, IntArray
from mil.errors import EvaluationError, did_you_mean, listed
from mil.statistics import metrics
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling, Spread
from mil.statistics.checks import check_scores, describe_few_patients, patients_per_class, warn_of_strata
from mil.statistics.metrics import Headline

HEADLINES = (
    Headline("macro_f1", "Macro-F1", of_confusion=metrics.macro_f1),
    Headline(
        "balanced_accuracy",
        "Balanced accuracy",
        "bal. accuracy",
        of_confusion=metrics.balanced_accuracy,
        guess=lambda supports: 1 / sum(support > 0 for support in supports),
        brief=False,
    ),
    Headline("auroc", "AUROC", proper=True, of_areas=metrics.mean_auroc, guess=0.5, usual_choice=True),
    Headline(
        "accuracy",
        "Accuracy",
        of_confusion=metrics.accuracy,
        of_every_class=False,
        guess=lambda supports: max(supports) / sum(supports),
        of_replicas=False,
        brief=False,
        ranks=False,
    ),
)
SUMMARY_METRICS = tuple(each.name for each in HEADLINES)
CLASS_METRICS = ("tp", "fp", "fn", "tn", "f1", "recall", "precision", "auroc")
COUNTS = ("tp", "fp", "fn", "tn")


def evaluate(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    patient_ids: Sequence[str],
    class_names: Sequence[str],
    resampling: Resampling = USUAL_RESAMPLING,
) -> dict[str, Any]:
    """Every metric with its patient-level bootstrap interval, ready for `metrics.json` (undefined values are None).

    The prediction is the class of highest probability. No interval is given where it would rest on a class of fewer
    than two patients; a class of fewer than five gets a warning.

    Args:
        labels: [n] class index.
        probabilities: [n, C].
        patient_ids: [n].
        class_names: [C].
        resampling: how intervals are made; stratified, it draws patients among those with the same set of classes.

    Returns:
        `n_slides`, `n_patients`, `replicates`, `confidence`; every metric of `HEADLINES` as {value, low, high};
        `confusion` (rows are true classes); `classes` by name with `support`, `n_patients` and
        {value, low, high} of `tp`, `fp`, `fn`, `tn` (one class against all others), `f1`, `recall`, `precision`,
        `auroc`; `dropped`, the replicates left out of each summary metric; `warnings`. `interval` and `stratified`
        are among them where they are not the defaults.

    Raises:
        EvaluationError: the arguments do not belong together, or hold values that cannot be scored.
    """
    truth, scores = check_scores(labels, probabilities, patient_ids, len(class_names))
    patients = patients_per_class(truth, patient_ids, len(class_names))
    spread = Spread.of(
        lambda weights: class_scores(truth, scores, weights),
        patient_ids,
        resampling,
        truth,
    )
    dropped = {name: int(np.isnan(spread.resampled[name]).sum()) for name in SUMMARY_METRICS}
    warnings = _warn(class_names, patients, dropped, resampling.replicates)
    if resampling.stratified:
        warnings += warn_of_strata(truth, patient_ids, class_names)
    return {
        "n_slides": len(truth),
        "n_patients": len(set(patient_ids)),
        **resampling.describe(),
        **{name: spread.entry(name, is_claimable(name, patients)) for name in SUMMARY_METRICS},
        "confusion": spread.value["confusion"].astype(int).tolist(),
        "classes": {name: _describe_class(index, spread, patients) for index, name in enumerate(class_names)},
        "dropped": dropped,
        "warnings": warnings,
    }


def headline(metric: str) -> Headline:
    """The record of a summary metric.

    Raises:
        EvaluationError: it is none of `SUMMARY_METRICS`.
    """
    if metric not in SUMMARY_METRICS:
        raise EvaluationError(
            f"got metric {metric!r} → expected one of {listed(SUMMARY_METRICS)} → "
            f"{did_you_mean(metric, SUMMARY_METRICS)}choose one of these"
        )
    return HEADLINES[SUMMARY_METRICS.index(metric)]


def class_scores(labels: IntArray, probabilities: FloatArray, weights: FloatArray | None) -> dict[str, FloatArray]:
    """All metrics under every weighting: summaries [B], those of classes [B, C], the confusion [B, C, C]."""
    n_classes = probabilities.shape[1]
    matrix = metrics.confusion(labels, probabilities.argmax(axis=1), n_classes, weights)
    counts = metrics.one_vs_all(matrix)
    areas = metrics.class_auroc(labels, probabilities, weights)
    present = matrix.sum(axis=2) > 0
    complete = present[:, np.unique(labels)].all(axis=1)
    summaries = summarise(matrix, areas)
    of_classes = {
        "f1": metrics.f1(counts),
        "recall": metrics.recall(counts),
        "precision": metrics.precision(counts),
        "auroc": areas,
    }
    return {
        "confusion": matrix,
        **{
            each.name: np.where(complete, summaries[each.name], np.nan) if each.of_every_class else summaries[each.name]
            for each in HEADLINES
        },
        **{f"class_{name}": values for name, values in counts._asdict().items()},
        **{f"class_{name}": np.where(present, values, np.nan) for name, values in of_classes.items()},
    }


def summarise(matrix: FloatArray, areas: FloatArray) -> dict[str, FloatArray]:
    """The headlines, each [B].

    Args:
        matrix: confusion, [B, C, C].
        areas: under the ROC curve of every class, [B, C].
    """
    return {each.name: _headline(each, matrix, areas) for each in HEADLINES}


def _headline(each: Headline, matrix: FloatArray, areas: FloatArray) -> FloatArray:
    if each.of_areas is not None:
        return each.of_areas(areas)
    assert each.of_confusion is not None
    return each.of_confusion(matrix)


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


def is_claimable(metric: str, patients: BoolArray) -> bool:
    """Whether two patients or more stand behind everything a summary metric averages."""
    if not headline(metric).of_every_class:
        return len(patients.T) >= 2
    per_class = patients.sum(axis=1)
    return bool((per_class[per_class > 0] >= 2).all())


def _warn(class_names: Sequence[str], patients: BoolArray, dropped: dict[str, int], replicates: int) -> list[str]:
    """What a reader of the intervals must know."""
    messages = describe_few_patients(class_names, patients)
    most = max(dropped.values())
    if most > replicates / 100:
        messages.append(
            f"{most} of {replicates} bootstrap replicates lack a class: the intervals of metrics that average over "
            f"classes are of the other {replicates - most}"
        )
    return messages
