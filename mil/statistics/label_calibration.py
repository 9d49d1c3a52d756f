"""How honest the probabilities of several labels are: each label by itself, over the slides that it is known of."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.statistics.calibration import evaluate_calibration

FloatArray = npt.NDArray[np.float64]


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
