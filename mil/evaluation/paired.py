"""Two models on the same slides: the difference in a metric, whatever their task, and how sure it is."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mil.cohort.targets import CLASSIFICATION
from mil.evaluation.predictions import Outcomes
from mil.statistics import classification as statistics
from mil.statistics.bootstrap import Spread
from mil.statistics.classification import PairedDifference
from mil.statistics.paired_tests import exchange_test, permutation_test
from mil.statistics.power import detectable, minimum_detectable_difference

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pair:
    """What two models say of the same rows.

    Attributes:
        one: whose metric is taken first.
        other: whose is taken off; its rows are those of `one`, in one order.
        metric: one of the task's, see `mil.cohort.targets.HEADLINES`.
        replicates: bootstrap and permutation resamples.
        seed: of the resamples.
    """

    one: Outcomes
    other: Outcomes
    metric: str
    replicates: int = 2000
    seed: int = 0

    def difference(self) -> PairedDifference:
        """One minus other, with its interval over resampled patients, the same for both."""
        if self._classes:
            return statistics.paired_difference(*self._arguments, replicates=self.replicates, seed=self.seed)
        entry = self._spread.entry(self.metric, self.one.is_claimable())
        return PairedDifference(float(self._spread.value[self.metric]), entry["low"], entry["high"])

    def p(self) -> float | None:
        """Two-sided p value, exchanging what is said patient by patient, see `permutation_test`.

        None where a model has no such metric, as predictions that do not vary have no correlation.
        """
        if any(np.isnan(each.scores(only=self.metric)[self.metric][0]) for each in (self.one, self.other)):
            return None
        if self._classes:
            return permutation_test(*self._arguments, resamples=self.replicates, seed=self.seed)

        def score(swaps: FloatArray) -> FloatArray:
            return self.one.exchanged(self.other, swaps, self.metric)

        return exchange_test(score, self.one.patient_ids, self.replicates, self.seed)

    def detectable(self) -> float | None:
        """See `mil.statistics.power.minimum_detectable_difference`."""
        if self._classes:
            return minimum_detectable_difference(*self._arguments, replicates=self.replicates, seed=self.seed)
        differences = self._spread.resampled[self.metric]
        differences = differences[~np.isnan(differences)]
        if not self.one.is_claimable() or differences.size < 2 or np.ptp(differences) == 0:
            return None
        return detectable(float(differences.std(ddof=1)))

    @property
    def _classes(self) -> bool:
        return self.one.cohort.task == CLASSIFICATION

    @property
    def _arguments(self) -> tuple[npt.NDArray[np.int64], FloatArray, FloatArray, tuple[str, ...], str]:
        cohort = self.one.cohort
        return cohort.labels, self.one.said, self.other.said, cohort.patient_ids, self.metric

    @cached_property
    def _spread(self) -> Spread:
        def difference(weights: FloatArray) -> dict[str, FloatArray]:
            one, other = (each.scores(weights, only=self.metric)[self.metric] for each in (self.one, self.other))
            return {self.metric: one - other}

        return Spread.of(difference, self.one.patient_ids, self.replicates, self.seed)
