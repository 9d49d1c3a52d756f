"""What each test part of a run scored, from its ``predictions.csv``: the folds that comparisons pair."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mil import metrics
from mil.errors import RunError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FoldScore:
    """One replica on its own test part.

    Attributes:
        replica: its name.
        seed: of the replica, as written.
        test: slides of the test part.
        validation: slides of the validation part.
        n_train: slides of the training part.
        labels: [m] of the test part.
        probabilities: [m, C].
    """

    replica: str
    seed: str
    test: frozenset[str]
    validation: frozenset[str]
    n_train: int
    labels: IntArray
    probabilities: FloatArray

    def score(self, metric: str) -> float:
        """A summary metric of the test part; NaN where it is undefined."""
        if metric == "auroc":
            return float(metrics.auroc(self.labels, self.probabilities)[0])
        n_classes = self.probabilities.shape[1]
        matrix = metrics.confusion(self.labels, self.probabilities.argmax(axis=1), n_classes)
        return float(getattr(metrics, metric)(matrix)[0])


def read_fold_scores(folder: Path, class_names: Sequence[str]) -> list[FoldScore]:
    """The replicas of a run folder, each with what it said of its test part.

    Raises:
        RunError: the file is missing, or does not hold what `mil train` writes.
    """
    try:
        with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
            by_replica: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
            for row in csv.DictReader(file):
                by_replica[row["replica"]].append(row)
        return [_fold_score(name, rows, tuple(class_names)) for name, rows in by_replica.items()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = error.strerror if isinstance(error, OSError) else f"{type(error).__name__} {error}"
        raise RunError(
            f"got {folder} as run folder → its predictions.csv cannot be read ({what}) → give the --out folder of a "
            f"finished mil train"
        ) from error


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


def _fold_score(name: str, rows: Sequence[dict[str, str]], class_names: tuple[str, ...]) -> FoldScore:
    parts: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        parts[row["split"]].append(row)
    tested = sorted(parts["test"], key=lambda row: row["slide_id"])
    if not tested or not parts["train"]:
        raise ValueError(f"replica {name} has {len(tested)} test and {len(parts['train'])} training slides")
    return FoldScore(
        replica=name,
        seed=rows[0]["seed"],
        test=frozenset(row["slide_id"] for row in tested),
        validation=frozenset(row["slide_id"] for row in parts["validation"]),
        n_train=len(parts["train"]),
        labels=np.array([class_names.index(row["target"]) for row in tested], dtype=np.int64),
        probabilities=np.array([[float(row[f"p_{each}"]) for each in class_names] for row in tested]),
    )
