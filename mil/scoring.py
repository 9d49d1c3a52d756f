"""What a finished training scored out of fold, by the kind of its target; the content of ``metrics.json``."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from mil import statistics
from mil.bootstrap import USUAL_RESAMPLING, Resampling
from mil.metrics import auroc, balanced_accuracy, confusion, macro_f1
from mil.multi_label import evaluate_multi_label
from mil.multi_label import score as score_labels
from mil.outcomes import Outcomes
from mil.regression import evaluate_regression
from mil.regression import score as score_numbers
from mil.run import ReplicaPredictions
from mil.survival import by_patient, concordance, evaluate_survival
from mil.targets import MULTI_LABEL, REGRESSION

FloatArray = npt.NDArray[np.float64]


def evaluate_out_of_fold(predictions: ReplicaPredictions) -> dict[str, Any]:
    """Every metric of the test parts with its interval, see `evaluate_outcomes`."""
    return evaluate_outcomes(Outcomes.of(predictions))


def evaluate_outcomes(outcomes: Outcomes, resampling: Resampling = USUAL_RESAMPLING) -> dict[str, Any]:
    """Every metric with its interval, see `mil.statistics.evaluate` and its likes of other tasks."""
    cohort, said, how = outcomes.cohort, outcomes.said, asdict(resampling)
    patients, values = cohort.patient_ids, cohort.values
    if values is None:
        return statistics.evaluate(cohort.labels, said, patients, cohort.class_names, **how)
    if cohort.task == MULTI_LABEL:
        return evaluate_multi_label(values, said, patients, cohort.columns, **how)
    if cohort.task == REGRESSION:
        return evaluate_regression(values, said, patients, cohort.columns, **how)
    n_slides = len(set(cohort.slide_ids))
    return evaluate_survival(values, said[:, 0], patients, outcomes.folds, n_slides=n_slides, **how)


def score_replica(predictions: ReplicaPredictions, at: int) -> dict[str, float | None]:
    """The metrics of one replica on its test part; None where one is undefined."""
    test = predictions.parts[at] == "test"
    cohort, said = predictions.cohort.subset(np.flatnonzero(test)), predictions.probabilities[at][test]
    if cohort.values is None:
        matrix = confusion(cohort.labels, said.argmax(axis=1), len(cohort.class_names))
        found = {
            "macro_f1": macro_f1(matrix)[0],
            "balanced_accuracy": balanced_accuracy(matrix)[0],
            "auroc": auroc(cohort.labels, said)[0],
        }
    elif cohort.task == MULTI_LABEL:
        scores = score_labels(cohort.values, said)
        found = {"macro_auroc": _mean(scores["auroc"]), "macro_f1": _mean(scores["f1"])}
    elif cohort.task == REGRESSION:
        scores = score_numbers(cohort.values, said)
        found = {name: _mean(scores[name]) for name in ("r2", "pearson")}
        # targets of other units have no common error
        found["mae"] = _mean(scores["mae"]) if len(cohort.columns) == 1 else math.nan
    else:
        who = by_patient(cohort.values, said[:, 0], cohort.patient_ids)
        found = {"concordance": concordance(who.times, who.events, who.risks)[0]}
    return {name: None if math.isnan(value) else float(value) for name, value in found.items()}


def _mean(values: FloatArray) -> float:
    """Over the targets that have a value."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
