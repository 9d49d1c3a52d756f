"""What a head has to beat: guessing, and classical learners on the mean instance of every bag.

They choose nothing by a validation part, so that they learn from it too: everything outside the test part.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mil.bags import Bags
from mil.cohort import Cohort
from mil.splits import Splits

NEIGHBOURS = 5
ON_FEATURES = "mean instance"
"""How the names of those begin that read features."""
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Baseline:
    """Out-of-fold predictions of one baseline.

    Attributes:
        name: as boards show it.
        probabilities: float64 [n, C], of every slide by the learner that was not shown its fold.
        seconds: of all folds.
    """

    name: str
    probabilities: FloatArray
    seconds: float


def run_baselines(bags: Bags, cohort: Cohort, splits: Splits) -> list[Baseline]:
    """Majority class, logistic regression and nearest neighbours, each on the same test folds as the heads."""
    means, n_classes = bags.moments.means, len(cohort.class_names)
    return [_cross_predict(name, make, means, cohort.labels, n_classes, splits) for name, make in _LEARNERS.items()]


def _cross_predict(
    name: str,
    make: Callable[[int], Any],
    means: FloatArray,
    labels: npt.NDArray[np.int64],
    n_classes: int,
    splits: Splits,
) -> Baseline:
    started = time.perf_counter()
    sums, times = np.zeros((len(labels), n_classes)), np.zeros((len(labels), 1))
    for fold in range(splits.n_folds):
        parts = splits.parts(fold, splits.seeds[0])
        test, learnt = parts == "test", (parts == "train") | (parts == "validation")
        learner = make(int(learnt.sum())).fit(means[learnt], labels[learnt])
        sums[np.ix_(test, learner.classes_)] += learner.predict_proba(means[test])
        times[test] += 1
    # of slides that no fold tests, which fixed splits may have, nothing is said
    probabilities = np.divide(sums, times, out=np.full(sums.shape, np.nan), where=times > 0)
    return Baseline(name, probabilities, time.perf_counter() - started)


def _majority(_: int) -> Any:
    from sklearn.dummy import DummyClassifier

    return DummyClassifier(strategy="prior")


def _logistic_regression(_: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))


def _neighbours(n: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), KNeighborsClassifier(min(NEIGHBOURS, n), metric="cosine"))


_LEARNERS: dict[str, Callable[[int], Any]] = {
    "majority class": _majority,
    f"{ON_FEATURES}, logistic regression": _logistic_regression,
    f"{ON_FEATURES}, {NEIGHBOURS} nearest neighbours": _neighbours,
}
