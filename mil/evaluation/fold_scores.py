"""What each test part of a run scored: the folds that comparisons pair."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mil.errors import RunError
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.training.replica import ReplicaId


@dataclass(frozen=True, eq=False)
class FoldScore:
    """One replica on its own test part.

    Attributes:
        replica: its fold and seed.
        test: slides of the test part.
        validation: slides of the validation part.
        n_train: slides of the training part.
        outcomes: of the test part, by slide id.
    """

    replica: ReplicaId
    test: frozenset[str]
    validation: frozenset[str]
    n_train: int
    outcomes: Outcomes

    def score(self, metric: str) -> float:
        """A headline metric of the test part; NaN where it is undefined."""
        return float(self.outcomes.scores()[metric][0])


def fold_scores(predictions: ReplicaPredictions) -> list[FoldScore]:
    """The replicas of a run or a sweep, each with its predictions of its test part.

    Raises:
        RunError: a replica without training slides.
    """
    ids = np.array(predictions.cohort.slide_ids)
    found = []
    for replica, parts, values in zip(predictions.replicas, predictions.parts, predictions.values, strict=True):
        tested, n_train = np.flatnonzero(parts == "test"), int((parts == "train").sum())
        if not n_train:
            raise RunError(
                f"got replica {replica.name} without training slides → expected some → bring predictions.csv back from "
                f"a copy of the run, or train again"
            )
        outcomes = Outcomes(predictions.cohort.subset(tested), values[tested]).sorted()
        validation = frozenset(ids[parts == "validation"].tolist())
        found.append(FoldScore(replica, frozenset(outcomes.cohort.slide_ids), validation, n_train, outcomes))
    return found


def mean_over_seeds(scores: Sequence[FoldScore], metric: str) -> dict[frozenset[str], float]:
    """The metric of every test part, mean over the replicas that share it, without undefined ones."""
    found: defaultdict[frozenset[str], list[float]] = defaultdict(list)
    for each in scores:
        found[each.test].append(each.score(metric))
    means = {test: float(np.mean(values)) for test, values in found.items()}
    return {test: value for test, value in means.items() if not np.isnan(value)}


def mean_test_to_train(scores: Sequence[FoldScore]) -> float:
    """Slides of a test part over those of its training part, mean over replicas."""
    return float(np.mean([len(each.test) / each.n_train for each in scores]))


def differing_folds(first: Sequence[FoldScore], other: Sequence[FoldScore]) -> str | None:
    """How the folds of two runs differ, for a warning; None where each slide was tested with the same others.

    Folds may be numbered otherwise, and seeds may be more or fewer: validation parts are compared where both runs have
    the seed.
    """
    tests, other_tests = ({each.test for each in scores} for scores in (first, other))
    if tests != other_tests:
        return f"{len(other_tests - tests)} of {len(other_tests)} test folds are others"
    known = {(each.test, each.replica.seed): each.validation for each in first}
    differ = [each for each in other if known.get((each.test, each.replica.seed), each.validation) != each.validation]
    return f"{len(differ)} of {len(other)} validation parts are others" if differ else None
