"""What each test part of a run scored, from its ``predictions.csv``: the folds that comparisons pair."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mil.errors import RunError
from mil.evaluation.outcomes import Outcomes, mean_outcomes
from mil.evaluation.tables import prediction_columns, stated_cohort, truth_names


@dataclass(frozen=True, eq=False)
class FoldScore:
    """One replica on its own test part.

    Attributes:
        replica: its name.
        fold: of the replica, as written.
        seed: likewise.
        test: slides of the test part.
        validation: slides of the validation part.
        n_train: slides of the training part.
        outcomes: of the test part, by slide id.
    """

    replica: str
    fold: str
    seed: str
    test: frozenset[str]
    validation: frozenset[str]
    n_train: int
    outcomes: Outcomes

    def score(self, metric: str) -> float:
        """A headline metric of the test part; NaN where it is undefined."""
        return float(self.outcomes.scores()[metric][0])


def read_fold_scores(folder: Path, metrics: Mapping[str, Any]) -> list[FoldScore]:
    """The replicas of a run folder, each with its predictions of its test part.

    Args:
        folder: of a run or a sweep.
        metrics: its ``metrics.json``, or another of the same target, whose order of classes is taken.

    Raises:
        RunError: the file is missing, or does not hold what `mil train` writes.
    """
    try:
        with open(folder / "predictions.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
            by_replica: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
            for row in csv.DictReader(file):
                by_replica[row["replica"]].append(row)
        return [_fold_score(name, rows, metrics) for name, rows in by_replica.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = error.strerror if isinstance(error, OSError) else f"{type(error).__name__} {error}"
        raise RunError(
            f"got {folder} as run folder → its predictions.csv cannot be read ({what}) → give the --out folder of a "
            f"finished mil train"
        ) from error


def by_fold(scores: Sequence[FoldScore]) -> Outcomes:
    """What a run for survival predicts out of fold: the mean over the seeds of every fold."""
    found: defaultdict[str, list[Outcomes]] = defaultdict(list)
    for each in scores:
        found[each.fold].append(each.outcomes)
    return Outcomes.of_folds(mean_outcomes(parts) for parts in found.values())


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
    known = {(each.test, each.seed): each.validation for each in first}
    differ = [each for each in other if known.get((each.test, each.seed), each.validation) != each.validation]
    return f"{len(differ)} of {len(other)} validation parts are others" if differ else None


def _fold_score(name: str, rows: Sequence[Mapping[str, str]], metrics: Mapping[str, Any]) -> FoldScore:
    parts: defaultdict[str, list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        parts[row["split"]].append(row)
    tested = sorted(parts["test"], key=lambda row: row["slide_id"])
    if not tested or not parts["train"]:
        raise ValueError(f"replica {name} has {len(tested)} test and {len(parts['train'])} training slides")
    return FoldScore(
        replica=name,
        fold=rows[0]["fold"],
        seed=rows[0]["seed"],
        test=frozenset(row["slide_id"] for row in tested),
        validation=frozenset(row["slide_id"] for row in parts["validation"]),
        n_train=len(parts["train"]),
        outcomes=outcomes_of(tested, metrics),
    )


def outcomes_of(rows: Sequence[Mapping[str, str]], metrics: Mapping[str, Any]) -> Outcomes:
    """Rows of a table of a run.

    Raises:
        ValueError, KeyError, TypeError: they are not what `mil train` writes.
    """
    truth = truth_names(stated_cohort(metrics))
    cells = [(row["slide_id"], row["patient_id"], [row[name] for name in truth]) for row in rows]
    cohort = stated_cohort(metrics, cells)
    names = prediction_columns(cohort)
    predicted = np.array([[float(row[name]) for name in names] for row in rows], dtype=np.float64)
    return Outcomes(cohort, predicted.reshape(len(rows), len(names)))
