"""What a cohort can show: the smallest difference between two heads that it would probably detect."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from mil.errors import EvaluationError
from mil.statistics.classification import difference_spread


def minimum_detectable_difference(
    labels: npt.ArrayLike,
    probabilities_a: npt.ArrayLike,
    probabilities_b: npt.ArrayLike,
    patient_ids: Sequence[str],
    metric: str = "macro_f1",
    power: float = 0.8,
    significance: float = 0.05,
    replicates: int = 2000,
    seed: int = 0,
) -> float | None:
    """Difference of a metric that cohorts of this size detect in a share `power` of cases, see `detectable`.

    The standard error is that of the paired difference of these two heads over resampled patients. The assumption is
    that two heads which differ by more, or by less, would err together as often as these two do.

    Args:
        labels: [n] class index.
        probabilities_a: [n, C].
        probabilities_b: [n, C].
        patient_ids: [n].
        metric: one of `mil.statistics.classification.SUMMARY_METRICS`.
        power: share of such cohorts in which the test finds the difference.
        significance: of the two-sided test.
        replicates: number of bootstrap resamples.
        seed: of the resamples.

    Returns:
        The difference, 0 or more. None where no standard error can be told: a single patient, or two heads whose
        difference is the same in all resamples, such as equal ones.

    Raises:
        EvaluationError: an unknown metric, impossible shares, or arguments that do not belong together.
    """
    spread = difference_spread(labels, probabilities_a, probabilities_b, patient_ids, metric, replicates, seed)
    differences = spread.resampled[metric]
    differences = differences[~np.isnan(differences)]
    if len(set(patient_ids)) < 2 or differences.size < 2 or np.ptp(differences) == 0:
        return None
    return detectable(float(differences.std(ddof=1)), power, significance)


def detectable(standard_error: float, power: float = 0.8, significance: float = 0.05) -> float:
    """True difference that a two-sided z test finds in a share `power` of cases.

    It is (z[1 - significance / 2] + z[power]) · standard error, 2.8 standard errors by default.

    Raises:
        EvaluationError: a share that is not between 0 and 1.

    Example:
        >>> round(detectable(0.05), 3)
        0.14
    """
    if not (0 < power < 1 and 0 < significance < 1):
        raise EvaluationError(
            f"got power={power}, significance={significance} → expected shares between 0 and 1 → pass 0.8 and 0.05, "
            f"for example"
        )
    return float(ndtri(1 - significance / 2) + ndtri(power)) * standard_error
