"""How well several labels of a slide are predicted, each a yes or no of its own, unknown for some slides.

Shapes: n slides, L labels, B weightings of the slides (a bootstrap replicate counts how often each was drawn). A slide
counts for the labels that it has an answer to.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.bootstrap import Spread
from mil.errors import EvaluationError
from mil.metrics import binary_auroc, confusion, f1, mean_defined, one_vs_all, recall, weightings

FloatArray = npt.NDArray[np.float64]
SUMMARY = {"macro_auroc": "auroc", "macro_f1": "f1", "macro_balanced_accuracy": "balanced_accuracy"}
LABEL_METRICS = ("auroc", "f1", "sensitivity", "specificity", "balanced_accuracy")
FEW_PATIENTS = 5


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
        answers, said = truth[known, at].astype(np.int64), (chances[known, at] >= 0.5).astype(np.int64)
        counts = one_vs_all(confusion(answers, said, 2, every[:, known]))
        recalls = recall(counts)
        values = {"f1": f1(counts)[:, 1], "sensitivity": recalls[:, 1], "specificity": recalls[:, 0]}
        for name, each in (values | {"balanced_accuracy": recalls.mean(axis=1)}).items():
            found[name].append(each)
    return {"auroc": label_aurocs(truth, chances, every)} | {name: np.stack(v, axis=1) for name, v in found.items()}


def evaluate_multi_label(
    truth: npt.ArrayLike,
    chances: npt.ArrayLike,
    patient_ids: Sequence[str],
    columns: Sequence[str],
    replicates: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Every metric with its interval over resampled patients, ready for `metrics.json`.

    Args:
        truth: [n, L] of 0, 1 and NaN (unknown).
        chances: [n, L], probability of yes.
        patient_ids: [n].
        columns: [L], names of the labels.
        replicates: number of bootstrap resamples.
        seed: of the resamples.
        confidence: of the intervals.

    Returns:
        `n_slides`, `n_patients`, `replicates`, `confidence`; `macro_auroc`, `macro_f1`, `macro_balanced_accuracy`
        (means over labels) as {value, low, high}; `targets` by name with the metrics of `LABEL_METRICS`, `positive`,
        `known` and `n_patients` (with a known answer); `warnings`.

    Raises:
        EvaluationError: shapes that do not fit.
    """
    values, said = (np.asarray(each, dtype=np.float64) for each in (truth, chances))
    if values.shape != (len(patient_ids), len(columns)) or said.shape != values.shape or not len(values):
        raise EvaluationError(
            f"got labels {values.shape} and probabilities {said.shape} for {len(patient_ids)} patients and "
            f"{len(columns)} labels → expected [n, L] of one n, above 0 → give what one run predicted"
        )

    def statistic(weights: FloatArray) -> dict[str, FloatArray]:
        found = score(values, said, weights)
        means = {name: mean_defined(found[of]) for name, of in SUMMARY.items()}
        return means | {f"of_{name}": each for name, each in found.items()}

    spread = Spread.of(statistic, patient_ids, replicates, seed, confidence, "percentile", None)
    patients = np.array(patient_ids)
    fewest = [min(len(np.unique(patients[values[:, at] == answer])) for answer in (0, 1)) for at in range(len(columns))]
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
        "replicates": replicates,
        "confidence": confidence,
        **{name: spread.entry(name, min(fewest) >= 2) for name in SUMMARY},
        "targets": targets,
        "warnings": [
            f"label {column!r} has {count} patient(s) on one side: "
            f"{'its intervals are too narrow to be trusted' if count >= 2 else 'no interval is given for it'}"
            for column, count in zip(columns, fewest, strict=True)
            if count < FEW_PATIENTS
        ],
    }
