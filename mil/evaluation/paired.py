"""Two models on the same slides: the difference in a metric, whatever their task, and how sure it is."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.arrays import FloatArray
from mil.evaluation.headlines import first_headline
from mil.evaluation.outcomes import Outcomes
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling, Spread
from mil.statistics.paired_tests import (
    PairedDifference,
    detectable,
    exchange_test,
    minimum_detectable_difference,
    paired_difference,
    permutation_test,
)


@dataclass(frozen=True, eq=False)
class Pair:
    """What two models say of the same rows.

    Attributes:
        one: whose metric is taken first.
        other: whose is taken off; its rows are those of `one`, in one order.
        metric: one of the task's, see `mil.evaluation.headlines.HEADLINES`.
        resampling: how intervals are made; as many resamples, of the same seed, are permuted.
    """

    one: Outcomes
    other: Outcomes
    metric: str
    resampling: Resampling = USUAL_RESAMPLING

    def difference(self) -> PairedDifference:
        """One minus other, with its interval over resampled patients, the same for both."""
        if self._classes:
            return paired_difference(*self._arguments, resampling=self.resampling)
        entry = self._spread.entry(self.metric, self.one.is_claimable())
        return PairedDifference(float(self._spread.value[self.metric]), entry["low"], entry["high"])

    def p(self) -> float | None:
        """Two-sided p value, exchanging predictions patient by patient, see `permutation_test`.

        None where a model has no such metric, as predictions that do not vary have no correlation.
        """
        if any(np.isnan(each.scores(only=self.metric)[self.metric][0]) for each in (self.one, self.other)):
            return None
        if self._classes:
            return permutation_test(*self._arguments, resamples=self.resampling.replicates, seed=self.resampling.seed)

        def score(swaps: FloatArray) -> FloatArray:
            return self.one.exchanged(self.other, swaps, self.metric)

        return exchange_test(score, self.one.patient_ids, self.resampling.replicates, self.resampling.seed)

    def detectable(self) -> float | None:
        """See `mil.statistics.paired_tests.minimum_detectable_difference`."""
        if self._classes:
            return minimum_detectable_difference(*self._arguments, resampling=self.resampling)
        differences = self._spread.resampled[self.metric]
        differences = differences[~np.isnan(differences)]
        if not self.one.is_claimable() or differences.size < 2 or np.ptp(differences) == 0:
            return None
        return detectable(float(differences.std(ddof=1)))

    @property
    def _classes(self) -> bool:
        return self.one.cohort.has_classes

    @property
    def _arguments(self) -> tuple[npt.NDArray[np.int64], FloatArray, FloatArray, tuple[str, ...], str]:
        cohort = self.one.cohort
        return cohort.labels, self.one.predicted, self.other.predicted, cohort.patient_ids, self.metric

    @cached_property
    def _spread(self) -> Spread:
        def difference(weights: FloatArray) -> dict[str, FloatArray]:
            one, other = (each.scores(weights, only=self.metric)[self.metric] for each in (self.one, self.other))
            return {self.metric: one - other}

        return Spread.of(difference, self.one.patient_ids, self.resampling)


def gain_name(task: str) -> str:
    """The key of a gain, such as ``gain_macro_f1``."""
    return f"gain_{first_headline(task)}"


def gain_over(together: Outcomes, alone: Outcomes) -> dict[str, Any]:
    """The first headline of an average minus that of a member, by `gain_name`, with its interval over patients.

    None where the headline is undefined, as concordance is of patients without an event.
    """
    task = together.cohort.task
    found = Pair(together, alone, first_headline(task)).difference()
    defined = None if math.isnan(found.difference) else found.difference
    return {gain_name(task): found._asdict() | {"difference": defined}}


SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval over patients; None where there is none."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, found: PairedDifference) -> "Interval":
        """A difference; NaN is none."""
        return NOTHING if math.isnan(found.difference) else cls(*found)

    def flat(self, name: str) -> dict[str, object]:
        """Three columns of a table."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def __str__(self) -> str:
        point = "–" if self.value is None else f"{self.value:.3f}"
        return point if self.low is None else f"{point} [{self.low:.3f}, {self.high:.3f}]"


NOTHING = Interval(None, None, None)
