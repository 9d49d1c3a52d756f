"""What evaluations of labels and numbers share: the check of their arguments, and how they say what was resampled."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.errors import EvaluationError

FloatArray = npt.NDArray[np.float64]


def check_values(
    truth: npt.ArrayLike, predicted: npt.ArrayLike, patient_ids: Sequence[str], columns: Sequence[str], what: str
) -> tuple[FloatArray, FloatArray]:
    """Truth and predictions, both [n, K] of float64.

    Args:
        truth: [n, K].
        predicted: [n, K].
        patient_ids: [n].
        columns: [K].
        what: names the columns, such as ``labels``.

    Raises:
        EvaluationError: they are not of one shape, there is no slide, or a prediction is not finite.
    """
    values, said = (np.asarray(each, dtype=np.float64) for each in (truth, predicted))
    if values.shape != (len(patient_ids), len(columns)) or said.shape != values.shape or not len(values):
        raise EvaluationError(
            f"got values {values.shape} and predictions {said.shape} for {len(patient_ids)} patients and "
            f"{len(columns)} {what} → expected [n, {what}] of one n, above 0 → give what one run predicted"
        )
    if not np.isfinite(said).all():
        at = int(np.flatnonzero(~np.isfinite(said).all(axis=1))[0])
        raise EvaluationError(
            f"got predictions {said[at].tolist()} in row {at} → expected finite numbers → find out what the head gave "
            f"for this slide"
        )
    return values, said


def describe_resampling(replicates: int, confidence: float, interval: str, stratified: bool) -> dict[str, Any]:
    """How intervals were made, for `metrics.json`; what is usual is left out."""
    usual = interval == "percentile" and not stratified
    unusual = {} if usual else {"interval": interval, "stratified": stratified}
    return {"replicates": replicates, "confidence": confidence, **unusual}
