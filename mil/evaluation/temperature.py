"""Temperature scaling: one number per replica, fitted on its validation part, that makes its probabilities honest.

The labels of a multi-label head share the temperature of the replica. Numbers and risks are no probabilities.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax

from mil.arrays import FloatArray, IntArray
from mil.cohort.targets import MULTI_LABEL
from mil.errors import EvaluationError
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.statistics.checks import FEW_PATIENTS

LOWEST, HIGHEST = 0.05, 20.0


def fit_temperature(probabilities: FloatArray, labels: IntArray) -> float:
    """The temperature of lowest negative log-likelihood, from 0.05 to 20; above 1, the head was too sure of itself.

    The loss is convex in 1 / T, so that the root of its slope is the best there is, and never worse than T = 1. Where
    every slide has its true class on top, ever lower temperatures would be ever better; so few slides prove no such
    certainty, and 1 is returned.

    Args:
        probabilities: [n, C] of slides that the head was not trained on.
        labels: int64 [n].

    Raises:
        EvaluationError: no slides.

    References:
        Guo et al., "On calibration of modern neural networks", ICML 2017; fitted on logits up to a constant per slide,
        which the softmax does not see.
    """
    if not len(labels) or len(labels) != len(probabilities):
        raise EvaluationError(
            f"got {len(labels)} labels and {len(probabilities)} rows of probabilities → expected equal numbers, 1 or "
            f"more → fit the temperature on a validation part that holds slides"
        )
    logits = _logits(probabilities)
    of_truth = logits[np.arange(len(labels)), labels]
    if (of_truth >= logits.max(axis=1)).all():
        return 1.0

    def slope(sharpness: float) -> float:
        expected = (softmax(sharpness * logits, axis=1) * logits).sum(axis=1)
        return float((expected - of_truth).mean())

    if slope(1 / HIGHEST) >= 0:
        return HIGHEST
    if slope(1 / LOWEST) <= 0:
        return LOWEST
    return 1 / float(brentq(slope, 1 / HIGHEST, 1 / LOWEST))


def fit_label_temperature(chances: FloatArray, truth: FloatArray) -> float:
    """The temperature of lowest binary cross-entropy over all known labels of all slides, see `fit_temperature`.

    Args:
        chances: [n, L] probability of yes, of slides that the head was not trained on.
        truth: [n, L] of 0, 1 and NaN (unknown).

    Raises:
        EvaluationError: no known label.
    """
    known = np.isfinite(truth)
    return fit_temperature(_no_and_yes(chances[known]), truth[known].astype(np.int64))


def apply_label_temperature(chances: FloatArray, temperature: float) -> FloatArray:
    """sigmoid(logit p / T) of probabilities of yes [...]."""
    return apply_temperature(_no_and_yes(chances), temperature)[..., 1]


def apply_temperature(probabilities: FloatArray, temperature: float) -> FloatArray:
    """softmax(log p / T) of probabilities [..., C]: the same order of classes, flatter for T > 1."""
    scaled: FloatArray = softmax(_logits(probabilities) / temperature, axis=-1)
    return scaled


@dataclass(frozen=True, eq=False)
class TemperatureScaling:
    """Replicas, each scaled by the temperature of its own validation part.

    Attributes:
        predictions: the replicas with scaled probabilities.
        temperatures: [R].
        warnings: what a reader must know.
    """

    predictions: ReplicaPredictions
    temperatures: tuple[float, ...]
    warnings: tuple[str, ...]

    def out_of_fold(self) -> FloatArray:
        """Mean scaled probability [n, C] over the replicas that had the slide in their test part.

        No slide had a part in the temperatures that scale it here. Averaging already flattens what single replicas
        overstate: where seeds disagree much, the mean of scaled replicas is too unsure, and may be worse than the
        plain mean. Score both with `mil.statistics.calibration.evaluate_calibration`.
        """
        return self.predictions.out_of_fold()


def scale_temperatures(predictions: ReplicaPredictions) -> TemperatureScaling:
    """Fit a temperature on the validation part of every replica and apply it to all its probabilities.

    Args:
        predictions: of classes, or of labels, which share one temperature. Numbers and risks have none.

    Raises:
        EvaluationError: a replica without validation slides.

    Example:
        >>> scaled = scale_temperatures(run.predictions)      # doctest: +SKIP
        >>> scaled.out_of_fold().shape                        # doctest: +SKIP
        (106, 2)
    """
    targets, labels = predictions.cohort.targets, predictions.cohort.task == MULTI_LABEL
    fit, apply = (fit_label_temperature, apply_label_temperature) if labels else (fit_temperature, apply_temperature)
    temperatures = []
    for parts, values in zip(predictions.parts, predictions.values, strict=True):
        validates = parts == "validation"
        temperatures.append(fit(values[validates], targets[validates]))
    scaled = np.stack([apply(p, t) for p, t in zip(predictions.values, temperatures, strict=True)])
    cautions = warn_of_labels(predictions) if labels else warn_of_validation(predictions)
    warnings = (*_warn_of_bounds(temperatures), *cautions)
    return TemperatureScaling(replace(predictions, values=scaled), tuple(temperatures), warnings)


def warn_of_validation(predictions: ReplicaPredictions) -> list[str]:
    """Warnings of the classes that too few validation patients have, for choices that are made by them."""
    cohort, messages = predictions.cohort, []
    patients = np.array(cohort.patient_ids)
    for index, name in enumerate(cohort.class_names):
        held = cohort.labels == index
        counts = [len(np.unique(patients[held & (parts == "validation")])) for parts in predictions.parts]
        few = sum(count < FEW_PATIENTS for count in counts)
        if few:
            messages.append(
                f"class {name!r} has fewer than {FEW_PATIENTS} patients ({min(counts)} at least) in the validation "
                f"parts of {few} of {len(counts)} replicas: what is chosen there is unsure"
            )
    return messages


def warn_of_labels(predictions: ReplicaPredictions) -> list[str]:
    """As `warn_of_validation`, of the labels that too few validation patients have, or lack."""
    cohort, messages = predictions.cohort, []
    values, patients = np.asarray(cohort.values), np.array(cohort.patient_ids)
    for column, known in zip(cohort.columns, values.T, strict=True):
        held = [[(known == answer) & (parts == "validation") for answer in (0, 1)] for parts in predictions.parts]
        counts = [min(len(np.unique(patients[each])) for each in sides) for sides in held]
        few = sum(count < FEW_PATIENTS for count in counts)
        if few:
            messages.append(
                f"label {column!r} has fewer than {FEW_PATIENTS} patients on one side ({min(counts)} at least) in the "
                f"validation parts of {few} of {len(counts)} replicas: what is chosen there is unsure"
            )
    return messages


def _warn_of_bounds(temperatures: list[float]) -> list[str]:
    at_bounds = sum(value in (LOWEST, HIGHEST) for value in temperatures)
    untouched = sum(value == 1.0 for value in temperatures)
    messages = []
    if at_bounds:
        messages.append(
            f"{at_bounds} of {len(temperatures)} temperatures are at the end of their range ({LOWEST:g} to {HIGHEST:g})"
        )
    if untouched:
        messages.append(
            f"{untouched} of {len(temperatures)} replicas predict all of their validation part correctly: their "
            f"temperature stays 1"
        )
    return messages


def _logits(probabilities: FloatArray) -> FloatArray:
    logits: FloatArray = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    return logits


def _no_and_yes(chances: FloatArray) -> FloatArray:
    """Probabilities [...] of yes as those of two classes [..., 2]; tables hold nine digits, which cannot say more."""
    yes = chances.clip(1e-9, 1 - 1e-9)
    return np.stack([1 - yes, yes], axis=-1)
