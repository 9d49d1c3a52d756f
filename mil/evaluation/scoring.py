"""What a finished training scored out of fold, by the kind of its target; the content of ``metrics.json``."""

import math
from typing import Any

import numpy as np

from mil.cohort.targets import MULTI_LABEL, REGRESSION
from mil.evaluation.headlines import replica_metrics
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.statistics import classification as statistics
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling
from mil.statistics.multi_label import evaluate_multi_label
from mil.statistics.regression import evaluate_regression
from mil.statistics.survival import evaluate_survival


def evaluate_out_of_fold(predictions: ReplicaPredictions) -> dict[str, Any]:
    """Every metric of the test parts with its interval, see `evaluate_outcomes`."""
    return evaluate_outcomes(predictions.outcomes())


def evaluate_outcomes(outcomes: Outcomes, resampling: Resampling = USUAL_RESAMPLING) -> dict[str, Any]:
    """Every metric with its interval, see `mil.statistics.classification.evaluate` and its likes of other tasks."""
    cohort, predicted = outcomes.cohort, outcomes.predicted
    patients, values = cohort.patient_ids, cohort.values
    if values is None:
        return statistics.evaluate(cohort.labels, predicted, patients, cohort.class_names, resampling)
    if cohort.task == MULTI_LABEL:
        return evaluate_multi_label(values, predicted, patients, cohort.columns, resampling)
    if cohort.task == REGRESSION:
        return evaluate_regression(values, predicted, patients, cohort.columns, resampling)
    n_slides = len(set(cohort.slide_ids))
    return evaluate_survival(values, predicted[:, 0], patients, outcomes.folds, resampling, n_slides)


def score_replica(predictions: ReplicaPredictions, at: int) -> dict[str, float | None]:
    """The metrics of one replica on its test part; None where one is undefined."""
    test = np.flatnonzero(predictions.parts[at] == "test")
    cohort = predictions.cohort.subset(test)
    scores = Outcomes(cohort, predictions.values[at][test]).scores()
    found = {name: float(scores[name][0]) for name in replica_metrics(cohort.task)}
    return {name: None if math.isnan(value) else value for name, value in found.items()}
