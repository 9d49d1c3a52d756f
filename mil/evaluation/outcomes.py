"""Truth beside prediction: what runs are scored and compared by.

A row is a slide. For survival it is a slide in a fold that tests it, and metrics compare the patients of one fold:
risks of other folds come from other models and have no common scale.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.stats import rankdata

from mil.arrays import FloatArray
from mil.cohort.cohort import Cohort
from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL, REGRESSION, SURVIVAL
from mil.statistics import metrics, multi_label, regression
from mil.statistics.classification import summarise
from mil.statistics.survival import PatientRows, concordance, count_events


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What is true of n rows, and what a model predicts of them.

    Attributes:
        cohort: the slides; for survival one stands there once for every fold that tests it.
        predicted: float64 [n, values], see `mil.training.tasks.decode`.
        folds: [n] for survival, else empty.
    """

    cohort: Cohort
    predicted: FloatArray
    folds: tuple[int, ...] = ()

    @classmethod
    def of_folds(cls, parts: Iterable["Outcomes"]) -> "Outcomes":
        """Test parts of the folds for survival, put together in an order that tells the same folds alike."""
        ordered = sorted((part.sorted() for part in parts), key=lambda part: part.cohort.slide_ids)
        cohorts = [part.cohort for part in ordered]
        cohort = replace(
            cohorts[0],
            slide_ids=tuple(slide_id for each in cohorts for slide_id in each.slide_ids),
            patient_ids=tuple(patient for each in cohorts for patient in each.patient_ids),
            labels=np.concatenate([each.labels for each in cohorts]),
            values=np.concatenate([each.targets for each in cohorts]),
        )
        folds = tuple(at for at, each in enumerate(cohorts) for _ in range(len(each)))
        return cls(cohort, np.concatenate([part.predicted for part in ordered]), folds)

    def sorted(self) -> "Outcomes":
        """The rows by slide id."""
        order = np.argsort(self.cohort.slide_ids, kind="stable")
        return replace(self, cohort=self.cohort.subset(order), predicted=self.predicted[order])

    @property
    def patient_ids(self) -> tuple[str, ...]:
        """[n]."""
        return self.cohort.patient_ids

    @property
    def truth(self) -> FloatArray:
        """The truth [n, columns] of other targets than classes."""
        return np.asarray(self.cohort.values, dtype=np.float64)

    @cached_property
    def _patients(self) -> PatientRows:
        return PatientRows.of(self.patient_ids, self.folds or None)

    def scores(
        self, weights: FloatArray | None = None, predicted: FloatArray | None = None, only: str | None = None
    ) -> dict[str, FloatArray]:
        """The headline metrics of the task under every weighting, each [B]; NaN where one is undefined.

        Args:
            weights: [B, n], the same for all slides of a patient; None weighs every row once (B = 1).
            predicted: [n, values], in place of what the model predicts.
            only: the metric that is needed; others may then be missing.
        """
        predicted = self.predicted if predicted is None else predicted
        if self.cohort.task == CLASSIFICATION:
            return _score_classes(self.cohort, predicted, weights)
        if self.cohort.task == MULTI_LABEL:
            return multi_label.summarise(self.truth, predicted, weights, only)
        if self.cohort.task == REGRESSION:
            return regression.summarise(self.truth, predicted, weights, only)
        rows = self._patients
        times, events = self.truth[rows.first, 0], self.truth[rows.first, 1] == 1
        weighed = None if weights is None else weights[:, rows.first]
        return {"concordance": concordance(times, events, rows.mean(predicted[:, 0]), weighed, rows.groups)}

    def is_claimable(self) -> bool:
        """Whether enough patients stand behind the headlines for an interval; classes know better themselves."""
        if self.cohort.task == MULTI_LABEL:
            return min(multi_label.count_fewest(self.truth, self.patient_ids)) >= 2
        if self.cohort.task == SURVIVAL:
            return count_events(self.patient_ids, self.truth[:, 1] == 1) >= 2
        return len(set(self.patient_ids)) >= 2

    def exchanged(self, other: "Outcomes", swaps: FloatArray, metric: str) -> FloatArray:
        """A headline metric [B] of these predictions where swaps are 0, and of those of ``other`` where they are 1.

        Risks of two models have no common scale: the ranks of patients within their fold are exchanged.

        Args:
            other: of the same rows in the same order.
            swaps: [B, n], the same for all slides of a patient.
            metric: which.
        """
        if self.cohort.task != SURVIVAL:
            mixed = (np.where(row[:, None] > 0, other.predicted, self.predicted) for row in swaps)
            return np.array([self.scores(predicted=predicted, only=metric)[metric][0] for predicted in mixed])
        rows = self._patients
        chosen, truth = swaps[:, rows.first], self.truth[rows.first]
        # every patient stands there with both ranks, one of which has no weight: all exchanges are one call
        twice, ranks = np.concatenate([truth, truth]), np.concatenate([self._ranks, other._ranks])
        weights = np.concatenate([1 - chosen, chosen], axis=1)
        return concordance(twice[:, 0], twice[:, 1] == 1, ranks, weights, rows.groups * 2)

    @cached_property
    def _ranks(self) -> FloatArray:
        """Of the patients' risks within their fold."""
        rows = self._patients
        risks, groups = rows.mean(self.predicted[:, 0]), np.array(rows.groups)
        ranks = np.zeros(len(risks))
        for group in np.unique(groups):
            ranks[groups == group] = rankdata(risks[groups == group])
        return ranks


def _score_classes(cohort: Cohort, predicted: FloatArray, weights: FloatArray | None) -> dict[str, FloatArray]:
    matrix = metrics.confusion(cohort.labels, predicted.argmax(axis=1), len(cohort.class_names), weights)
    return summarise(matrix, metrics.class_auroc(cohort.labels, predicted, weights))
