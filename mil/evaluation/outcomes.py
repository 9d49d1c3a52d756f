"""Truth beside prediction: what runs are scored and compared by.

A row is a slide. For survival it is a slide in a fold that tests it, and metrics compare the patients of one fold:
risks of other folds come from other models and have no common scale.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import rankdata

from mil.arrays import FloatArray
from mil.cohort.cohort import Cohort
from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL, REGRESSION, SURVIVAL
from mil.statistics import classification, metrics, multi_label, regression
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling
from mil.statistics.survival import PatientRows, concordance, count_events, evaluate_survival


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
    def patients(self) -> PatientRows:
        """Of survival, which rows are whose; patients are compared within a fold alone."""
        return PatientRows.of(self.patient_ids, self.folds or None)

    @cached_property
    def ranks(self) -> FloatArray:
        """Of survival, those of the patients' risks within their fold."""
        rows = self.patients
        risks, groups = rows.mean(self.predicted[:, 0]), np.array(rows.groups)
        ranks = np.zeros(len(risks))
        for group in np.unique(groups):
            ranks[groups == group] = rankdata(risks[groups == group])
        return ranks

    def scores(
        self, weights: FloatArray | None = None, predicted: FloatArray | None = None, only: str | None = None
    ) -> dict[str, FloatArray]:
        """The headline metrics of the task under every weighting, each [B]; NaN where one is undefined.

        Args:
            weights: [B, n], the same for all slides of a patient; None weighs every row once (B = 1).
            predicted: [n, values], in place of what the model predicts.
            only: the metric that is needed; others may then be missing.
        """
        return self._scoring.scores(self, self.predicted if predicted is None else predicted, weights, only)

    def evaluate(self, resampling: Resampling = USUAL_RESAMPLING) -> dict[str, Any]:
        """Every metric with its interval, see `mil.statistics.classification.evaluate` and its likes of other tasks."""
        return self._scoring.evaluate(self, resampling)

    def is_claimable(self) -> bool:
        """Whether enough patients stand behind the headlines for an interval; classes know better themselves."""
        return self._scoring.is_claimable(self)

    def exchanged(self, other: "Outcomes", swaps: FloatArray, metric: str) -> FloatArray:
        """A headline metric [B] of these predictions where swaps are 0, and of those of ``other`` where they are 1.

        Risks of two models have no common scale: the ranks of patients within their fold are exchanged.

        Args:
            other: of the same rows in the same order.
            swaps: [B, n], the same for all slides of a patient.
            metric: which.
        """
        return self._scoring.exchanged(self, other, swaps, metric)

    @property
    def _scoring(self) -> "_Scoring":
        return _SCORINGS[self.cohort.task]


class _Scoring:
    """How outcomes of a kind of target are scored."""

    def scores(
        self, outcomes: Outcomes, predicted: FloatArray, weights: FloatArray | None, only: str | None
    ) -> dict[str, FloatArray]:
        raise NotImplementedError

    def evaluate(self, outcomes: Outcomes, resampling: Resampling) -> dict[str, Any]:
        raise NotImplementedError

    def is_claimable(self, outcomes: Outcomes) -> bool:
        return len(set(outcomes.patient_ids)) >= 2

    def exchanged(self, outcomes: Outcomes, other: Outcomes, swaps: FloatArray, metric: str) -> FloatArray:
        mixed = (np.where(row[:, None] > 0, other.predicted, outcomes.predicted) for row in swaps)
        return np.array([outcomes.scores(predicted=predicted, only=metric)[metric][0] for predicted in mixed])


class _OfClasses(_Scoring):
    def scores(
        self, outcomes: Outcomes, predicted: FloatArray, weights: FloatArray | None, only: str | None
    ) -> dict[str, FloatArray]:
        cohort = outcomes.cohort
        matrix = metrics.confusion(cohort.labels, predicted.argmax(axis=1), len(cohort.class_names), weights)
        return classification.summarise(matrix, metrics.class_auroc(cohort.labels, predicted, weights))

    def evaluate(self, outcomes: Outcomes, resampling: Resampling) -> dict[str, Any]:
        cohort = outcomes.cohort
        names = cohort.class_names
        return classification.evaluate(cohort.labels, outcomes.predicted, cohort.patient_ids, names, resampling)


class _OfLabels(_Scoring):
    def scores(
        self, outcomes: Outcomes, predicted: FloatArray, weights: FloatArray | None, only: str | None
    ) -> dict[str, FloatArray]:
        return multi_label.summarise(outcomes.truth, predicted, weights, only)

    def evaluate(self, outcomes: Outcomes, resampling: Resampling) -> dict[str, Any]:
        truth, predicted, columns = outcomes.truth, outcomes.predicted, outcomes.cohort.columns
        return multi_label.evaluate_multi_label(truth, predicted, outcomes.patient_ids, columns, resampling)

    def is_claimable(self, outcomes: Outcomes) -> bool:
        return min(multi_label.count_fewest(outcomes.truth, outcomes.patient_ids)) >= 2


class _OfNumbers(_Scoring):
    def scores(
        self, outcomes: Outcomes, predicted: FloatArray, weights: FloatArray | None, only: str | None
    ) -> dict[str, FloatArray]:
        return regression.summarise(outcomes.truth, predicted, weights, only)

    def evaluate(self, outcomes: Outcomes, resampling: Resampling) -> dict[str, Any]:
        truth, predicted, columns = outcomes.truth, outcomes.predicted, outcomes.cohort.columns
        return regression.evaluate_regression(truth, predicted, outcomes.patient_ids, columns, resampling)


class _OfRisks(_Scoring):
    def scores(
        self, outcomes: Outcomes, predicted: FloatArray, weights: FloatArray | None, only: str | None
    ) -> dict[str, FloatArray]:
        rows, truth = outcomes.patients, outcomes.truth
        times, events = truth[rows.first, 0], truth[rows.first, 1] == 1
        weighed = None if weights is None else weights[:, rows.first]
        return {"concordance": concordance(times, events, rows.mean(predicted[:, 0]), weighed, rows.groups)}

    def evaluate(self, outcomes: Outcomes, resampling: Resampling) -> dict[str, Any]:
        risks, patients = outcomes.predicted[:, 0], outcomes.patient_ids
        n_slides = len(set(outcomes.cohort.slide_ids))
        return evaluate_survival(outcomes.truth, risks, patients, outcomes.folds, resampling, n_slides)

    def is_claimable(self, outcomes: Outcomes) -> bool:
        return count_events(outcomes.patient_ids, outcomes.truth[:, 1] == 1) >= 2

    def exchanged(self, outcomes: Outcomes, other: Outcomes, swaps: FloatArray, metric: str) -> FloatArray:
        rows = outcomes.patients
        chosen, truth = swaps[:, rows.first], outcomes.truth[rows.first]
        # every patient stands there with both ranks, one of which has no weight: all exchanges are one call
        twice, ranks = np.concatenate([truth, truth]), np.concatenate([outcomes.ranks, other.ranks])
        weights = np.concatenate([1 - chosen, chosen], axis=1)
        return concordance(twice[:, 0], twice[:, 1] == 1, ranks, weights, rows.groups * 2)


_SCORINGS: dict[str, _Scoring] = {
    CLASSIFICATION: _OfClasses(),
    MULTI_LABEL: _OfLabels(),
    REGRESSION: _OfNumbers(),
    SURVIVAL: _OfRisks(),
}
