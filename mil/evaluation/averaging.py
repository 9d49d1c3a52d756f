"""The mean of what several models say, whatever the target.

Probabilities and numbers of several models have one scale, and so are averaged as they are. Risks have none: Cox's is a
log hazard against a baseline of its own, that of discrete time counts intervals. So every model's risks are first put
into units of their own spread among its validation slides; this keeps the order in which it ranks slides. Of the
replicas of one run, which say the same thing in the same unit, the plain mean is taken, as `mil.predict` does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mil.arrays import BoolArray, FloatArray
from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL

Average = Literal["probabilities", "logits"]
_SMALLEST = 1e-12
_ROUNDING = 1e-9


def mean_where(values: FloatArray, held: BoolArray) -> FloatArray:
    """The mean [n, values] over replicas [R, n, values] of those that held a slide [R, n]; NaN where none did."""
    weights = held.astype(np.float64)
    total = weights.sum(axis=0)[:, None]
    sums = np.einsum("rn,rnc->nc", weights, values)
    mean: FloatArray = np.divide(sums, total, out=np.full(sums.shape, np.nan), where=total > 0)
    return mean


def combine(
    members: Sequence[FloatArray], average: Average = "probabilities", task: str = CLASSIFICATION
) -> FloatArray:
    """The mean of several predictions [n, values]; of classes rows sum to one.

    ``logits`` takes the mean of log p, which is the geometric mean: one member that rules a class out decides. Of
    labels it is taken of yes and of no. Numbers and risks are averaged as they are.

    >>> combine([np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])]).round(3).tolist()
    [[0.7, 0.3]]
    """
    means: FloatArray = np.mean(members, axis=0)
    if task == MULTI_LABEL and average == "logits":
        return _geometric([np.stack([1 - each, each], axis=-1) for each in members])[..., 1]
    if task != CLASSIFICATION:
        return means
    return _geometric(members) if average == "logits" else means / means.sum(axis=1, keepdims=True)


def _geometric(members: Sequence[FloatArray]) -> FloatArray:
    """The geometric mean of probabilities [..., C], scaled to sum to one."""
    means = np.exp(np.mean([np.log(np.maximum(each, _SMALLEST)) for each in members], axis=0))
    total: FloatArray = means / means.sum(axis=-1, keepdims=True)
    return total


@dataclass(frozen=True)
class Scale:
    """Where the risks of a model lie.

    Attributes:
        centre: their mean among its validation slides.
        deviation: their standard deviation there; above 0.
    """

    centre: float
    deviation: float

    @classmethod
    def of(cls, validated: Sequence[FloatArray]) -> "Scale | None":
        """The means over replicas of what each predicts of its own validation slides; None where that is all alike."""
        centres = [float(risks.mean()) for risks in validated]
        deviation = math.sqrt(np.mean([float(risks.var()) for risks in validated])) if validated else 0.0
        # tables hold nine digits: what is less is rounding, and no spread
        if not deviation > _ROUNDING * max(map(abs, centres), default=0.0):
            return None
        return cls(float(np.mean(centres)), deviation)

    def apply(self, risks: FloatArray) -> FloatArray:
        """Risks in this unit."""
        scaled: FloatArray = (risks - self.centre) / self.deviation
        return scaled


@dataclass(frozen=True)
class Averaging:
    """How the members of an ensemble are averaged on new slides.

    Attributes:
        average: what is averaged.
        task: of all members.
        scales: of each member's risks, for survival; else none.
    """

    average: Average = "probabilities"
    task: str = CLASSIFICATION
    scales: tuple[Scale, ...] = ()

    def of(self, members: Sequence[FloatArray]) -> FloatArray:
        """The mean of what each member says [n, values]; a run's risks are the plain mean over its replicas."""
        if self.scales:
            members = [scale.apply(risks) for scale, risks in zip(self.scales, members, strict=True)]
        return combine(members, self.average, self.task)
