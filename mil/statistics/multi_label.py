"""How well several labels of a slide are predicted, each a yes or no of its own, unknown for some slides.

Shapes: n slides, L labels, B weightings of the slides (a bootstrap replicate counts how often each was drawn). A slide
counts for the labels that it has an answer to.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.arrays import FloatArray
from mil.cohort.targets import MULTI_LABEL, find_strata
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling, Spread
from mil.statistics.checks import FEW_PATIENTS, check_values, warn_of_strata
from mil.statistics.metrics import Headline, binary_auroc, confusion, f1, mean_defined, one_vs_all, recall, weightings

HEADLINES = (
    Headline("macro_auroc", "Mean AUROC", guess=0.5),
    Headline("macro_f1", "Mean F1"),
    Headline(
        "macro_balanced_accuracy",
        "Mean balanced accuracy",
        "mean bal. accuracy",
        guess=0.5,
        of_replicas=False,
        brief=False,
    ),
)
SUMMARY = {"macro_auroc": "auroc", "macro_f1": "f1", "macro_balanced_accuracy": "balanced_accuracy"}
"""Of which metric of a label each headline is the mean."""
LABEL_METRICS = ("auroc", "f1", "sensitivity", "specificity", "balanced_accuracy")


def label_aurocs(truth: FloatArray, scores: FloatArray, weights: npt.ArrayLike | None = None) -> FloatArray:
    """Area under the ROC curve of every label, [B, L]; NaN where all known answers are the same.

    Args:
        truth: [n, L] of 0, 1 and NaN (unknown).
        scores: [n, L], higher for yes.
        weights: [B, n]; None weighs every slide once (B = 1).
    """
    every = weightings(weights, len(truth))
    columns = [
        binary_auroc(truth[:, at] == 1, scores[:, at], every * np.isfinite(truth[:, at]))
        for at in range(truth.shape[1])
    ]
    return np.stack(columns, axis=1)


def score(truth: FloatArray, chances: FloatArray, weights: npt.ArrayLike | None = None) -> dict[str, FloatArray]:
    """Every metric of `LABEL_METRICS`, [B, L], with yes predicted from 0.5 on; arguments as in `label_aurocs`."""
    every = weightings(weights, len(truth))
    found: dict[str, list[FloatArray]] = {name: [] for name in LABEL_METRICS if name != "auroc"}
    for at in range(truth.shape[1]):
        known = np.isfinite(truth[:, at])
        answers, guesses = truth[known, at].astype(np.int64), (chances[known, at] >= 0.5).astype(np.int64)
        counts = one_vs_all(confusion(answers, guesses, 2, every[:, known]))
        recalls = recall(counts)
        values = {"f1": f1(counts)[:, 1], "sensitivity": recalls[:, 1], "specificity": recalls[:, 0]}
        for name, each in (values | {"balanced_accuracy": recalls.mean(axis=1)}).items():
            found[name].append(each)
    return {"auroc": label_aurocs(truth, chances, every)} | {name: np.stack(v, axis=1) for name, v in found.items()}


def summarise(
    truth: FloatArray, chances: FloatArray, weights: npt.ArrayLike | None = None, only: str | None = None
) -> dict[str, FloatArray]:
    """The means over labels of `SUMMARY`, each [B]; arguments as in `label_aurocs`, and the one that is needed.

    NaN under a weighting that leaves a label without its yes or its no: the mean of the other labels is another figure.
    """
    if only == "macro_auroc":
        # a test asks for it thousands of times, and the others would take most of the time
        return _means(truth, {"auroc": label_aurocs(truth, chances, weights)})
    return _means(truth, score(truth, chances, weights))


def _means(truth: FloatArray, found: dict[str, FloatArray]) -> dict[str, FloatArray]:
    has_both = (truth == 0).any(axis=0) & (truth == 1).any(axis=0)
    whole = np.isfinite(found["auroc"][:, has_both]).all(axis=1)
    return {name: np.where(whole, mean_defined(found[of]), np.nan) for name, of in SUMMARY.items() if of in found}


def count_fewest(truth: FloatArray, patient_ids: Sequence[str]) -> list[int]:
    """Of every label the patients that have it or those that lack it, whichever are fewer; [L]."""
    patients = np.array(patient_ids)
    return [min(len(np.unique(patients[column == answer])) for answer in (0, 1)) for column in truth.T]


def evaluate_multi_label(
    truth: npt.ArrayLike,
    chances: npt.ArrayLike,
    patient_ids: Sequence[str],
    columns: Sequence[str],
    resampling: Resampling = USUAL_RESAMPLING,
) -> dict[str, Any]:
    """Every metric with its interval over resampled patients, ready for `metrics.json`.

    Args:
        truth: [n, L] of 0, 1 and NaN (unknown).
        chances: [n, L], probability of yes.
        patient_ids: [n].
        columns: [L], names of the labels.
        resampling: how intervals are made; stratified, it draws patients among those with the same rarest label.

    Returns:
        `n_slides`, `n_patients`, `replicates`, `confidence`; `macro_auroc`, `macro_f1`, `macro_balanced_accuracy`
        (means over labels) as {value, low, high}; `targets` by name with the metrics of `LABEL_METRICS`, `positive`,
        `known` and `n_patients` (with a known answer); `warnings`.

    Raises:
        EvaluationError: shapes that do not fit.
    """
    values, scores = check_values(truth, chances, patient_ids, columns, "labels")

    def statistic(weights: FloatArray) -> dict[str, FloatArray]:
        found = score(values, scores, weights)
        return _means(values, found) | {f"of_{name}": each for name, each in found.items()}

    strata, names = find_strata(MULTI_LABEL, columns, values, patient_ids)
    spread = Spread.of(statistic, patient_ids, resampling, strata)
    patients, fewest = np.array(patient_ids), count_fewest(values, patient_ids)
    targets = {
        column: {
            "known": int(np.isfinite(values[:, at]).sum()),
            "positive": int((values[:, at] == 1).sum()),
            "n_patients": len(np.unique(patients[np.isfinite(values[:, at])])),
            **{name: spread.entry(f"of_{name}", fewest[at] >= 2, at) for name in LABEL_METRICS},
        }
        for at, column in enumerate(columns)
    }
    return {
        "n_slides": len(values),
        "n_patients": len(set(patient_ids)),
        **resampling.describe(),
        **{name: spread.entry(name, min(fewest) >= 2) for name in SUMMARY},
        "targets": targets,
        "warnings": [
            *_warn(columns, fewest, spread.resampled["macro_auroc"]),
            *(warn_of_strata(strata, patient_ids, names, "stratum") if resampling.stratified else ()),
        ],
    }


def _warn(columns: Sequence[str], fewest: Sequence[int], resampled: FloatArray) -> list[str]:
    """What a reader of the intervals must know."""
    messages = [
        f"label {column!r} has {count} patient(s) on one side: "
        f"{'its intervals are too narrow to be trusted' if count >= 2 else 'no interval is given for it'}"
        for column, count in zip(columns, fewest, strict=True)
        if count < FEW_PATIENTS
    ]
    lacking, replicates = int(np.isnan(resampled).sum()), len(resampled)
    if min(fewest) >= 2 and lacking > replicates / 100:
        messages.append(
            f"{lacking} of {replicates} bootstrap replicates lack an answer to a label: the intervals of means over "
            f"labels are of the other {replicates - lacking}"
        )
    return messages
