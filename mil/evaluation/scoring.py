"""What a finished training scored out of fold, by the kind of its target; the content of ``metrics.json``."""

import math

import numpy as np

from mil.evaluation.headlines import replica_metrics
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.replica_predictions import ReplicaPredictions


def score_replica(predictions: ReplicaPredictions, at: int) -> dict[str, float | None]:
    """The metrics of one replica on its test part; None where one is undefined."""
    test = np.flatnonzero(predictions.parts[at] == "test")
    cohort = predictions.cohort.subset(test)
    scores = Outcomes(cohort, predictions.values[at][test]).scores()
    found = {name: float(scores[name][0]) for name in replica_metrics(cohort.task)}
    return {name: None if math.isnan(value) else value for name, value in found.items()}
