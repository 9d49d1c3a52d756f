"""What a head has to beat: guessing, and classical learners on the mean instance of every bag.

They choose nothing by a validation part, so that they learn from it too: everything outside the test part.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mil.arrays import FloatArray
from mil.bags.bags import Bags
from mil.cohort.cohort import Cohort
from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL, REGRESSION, SURVIVAL
from mil.evaluation.averaging import mean_where
from mil.evaluation.outcomes import Outcomes
from mil.splits.splits import Splits
from mil.training.losses import cox_loss

NEIGHBOURS = 5

ON_FEATURES = "mean instance"
"""How the names of those begin that read features."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """Out-of-fold predictions of one baseline.

    Attributes:
        name: as boards show it.
        outcomes: of every slide that a fold tests, by the learner that was not shown its fold.
        seconds: of all folds.
    """

    name: str
    outcomes: Outcomes
    seconds: float


class Learner(Protocol):
    """What a baseline is made of."""

    def fit(self, means: FloatArray, targets: npt.NDArray[Any]) -> "Learner":
        """Learn from mean instances [m, dim] and targets [m] or [m, columns]."""
        ...

    def predict(self, means: FloatArray) -> FloatArray:
        """What it says of others, [k, values]."""
        ...


def run_baselines(bags: Bags, cohort: Cohort, splits: Splits) -> list[Baseline]:
    """Those of the cohort's task, each on the same test folds as the heads.

    Classes: the majority, logistic regression and nearest neighbours. Labels: how frequent each is, and a logistic
    regression for each. Numbers: their mean, and ridge regression. Survival: no information, and Cox regression.
    """
    means = bags.moments.means
    return [_cross_predict(name, make, means, cohort, splits) for name, make in _LEARNERS[cohort.task].items()]


def _cross_predict(
    name: str, make: Callable[[int, int], Learner], means: FloatArray, cohort: Cohort, splits: Splits
) -> Baseline:
    started = time.perf_counter()
    parts: list[tuple[npt.NDArray[np.int64], FloatArray]] = []
    for fold in range(splits.n_folds):
        found = splits.parts(fold, splits.seeds[0])
        test, learnt = np.flatnonzero(found == "test"), (found == "train") | (found == "validation")
        learner = make(int(learnt.sum()), len(cohort.class_names)).fit(means[learnt], cohort.targets[learnt])
        parts.append((test, learner.predict(means[test])))
    if not cohort.kind.has_scale:
        outcomes = Outcomes.of_folds(Outcomes(cohort.subset(test), predicted) for test, predicted in parts)
    else:
        outcomes = _mean(cohort, parts)
    return Baseline(name, outcomes, time.perf_counter() - started)


def _mean(cohort: Cohort, parts: list[tuple[npt.NDArray[np.int64], FloatArray]]) -> Outcomes:
    """The mean over the folds that test a slide; fixed splits may have slides that none tests."""
    held = np.zeros((len(parts), len(cohort)), dtype=bool)
    values = np.zeros((*held.shape, parts[0][1].shape[1]))
    for at, (test, predicted) in enumerate(parts):
        held[at, test], values[at, test] = True, predicted
    tested = np.flatnonzero(held.any(axis=0))
    return Outcomes(cohort.subset(tested), mean_where(values, held)[tested])


@dataclass
class _Classifier:
    """A scikit-learn classifier, whose probabilities get a column for classes that it was not shown."""

    model: Any
    n_classes: int

    def fit(self, means: FloatArray, targets: npt.NDArray[Any]) -> "_Classifier":
        self.model.fit(means, targets)
        return self

    def predict(self, means: FloatArray) -> FloatArray:
        predicted = np.zeros((len(means), self.n_classes))
        predicted[:, self.model.classes_] = self.model.predict_proba(means)
        return predicted


@dataclass
class _EachLabel:
    """A classifier for every label, learnt from the slides that have an answer; guessing where all have the same."""

    make: Callable[[], Any]

    def fit(self, means: FloatArray, targets: npt.NDArray[Any]) -> "_EachLabel":
        self.models = []
        for column in targets.T:
            known = np.isfinite(column)
            model = self.make() if len(np.unique(column[known])) > 1 else _guess()
            answers = column[known].astype(np.int64)
            self.models.append(_Classifier(model, 2).fit(means[known], answers))
        return self

    def predict(self, means: FloatArray) -> FloatArray:
        return np.stack([model.predict(means)[:, 1] for model in self.models], axis=1)


@dataclass
class _Regressor:
    model: Any

    def fit(self, means: FloatArray, targets: npt.NDArray[Any]) -> "_Regressor":
        self.model.fit(means, targets)
        return self

    def predict(self, means: FloatArray) -> FloatArray:
        predicted: FloatArray = np.asarray(self.model.predict(means), dtype=np.float64)
        return predicted.reshape(len(means), -1)


class _NoInformation:
    """Says the same of everybody."""

    def fit(self, means: FloatArray, targets: npt.NDArray[Any]) -> "_NoInformation":
        return self

    def predict(self, means: FloatArray) -> FloatArray:
        return np.zeros((len(means), 1))


def _guess() -> Any:
    from sklearn.dummy import DummyClassifier

    return DummyClassifier(strategy="prior")


def _standardised(model: Any) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), model)


def _logistic_regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return _standardised(LogisticRegression(class_weight="balanced", max_iter=2000))


def _neighbours(n: int, n_classes: int) -> Learner:
    from sklearn.neighbors import KNeighborsClassifier

    return _Classifier(_standardised(KNeighborsClassifier(min(NEIGHBOURS, n), metric="cosine")), n_classes)


def _mean_number(n: int, n_classes: int) -> Learner:
    from sklearn.dummy import DummyRegressor

    return _Regressor(DummyRegressor())


def _ridge(n: int, n_classes: int) -> Learner:
    from sklearn.linear_model import RidgeCV

    # the penalty has no usual value: each target's is chosen by leaving out one slide that is learnt from
    return _Regressor(_standardised(RidgeCV(np.logspace(0, 6, 13), alpha_per_target=True)))


_LEARNERS: Mapping[str, Mapping[str, Callable[[int, int], Learner]]] = {
    CLASSIFICATION: {
        "majority class": lambda _, n_classes: _Classifier(_guess(), n_classes),
        f"{ON_FEATURES}, logistic regression": lambda _, n_classes: _Classifier(_logistic_regression(), n_classes),
        f"{ON_FEATURES}, {NEIGHBOURS} nearest neighbours": _neighbours,
    },
    MULTI_LABEL: {
        "share of each label": lambda *_: _EachLabel(_guess),
        f"{ON_FEATURES}, logistic regression": lambda *_: _EachLabel(_logistic_regression),
    },
    REGRESSION: {"mean number": _mean_number, f"{ON_FEATURES}, ridge regression": _ridge},
    SURVIVAL: {
        "no information": lambda *_: _NoInformation(),
        f"{ON_FEATURES}, Cox regression": lambda *_: CoxRegression(),
    },
}


class CoxRegression:
    """The log hazard as a linear function of standardised features.

    It minimises deaths · `cox_loss` + dim / 2 · |w|²: a normal prior under which the log hazards of slides
    have a variance of about one, whatever the number of features.

    References:
        Verweij and Van Houwelingen, "Penalized likelihood in Cox regression", Statistics in Medicine 1994.

    Example:
        >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> truth = np.array([[9.0, 1], [6, 1], [3, 1], [1, 1]])
        >>> bool(np.all(np.diff(CoxRegression().fit(x, truth).predict(x)[:, 0]) > 0))
        True
    """

    def fit(self, features: FloatArray, targets: npt.NDArray[Any]) -> "CoxRegression":
        """Learn from features [m, dim] and pairs of time and event [m, 2]."""
        self.mean, deviation = features.mean(axis=0), features.std(axis=0)
        self.deviation = np.where(deviation > 0, deviation, 1.0)
        x = torch.from_numpy((features - self.mean) / self.deviation)
        times, events = torch.from_numpy(np.asarray(targets[:, 0])), torch.from_numpy(targets[:, 1] == 1)
        weights = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            solver.zero_grad()
            penalty = x.shape[1] / 2 * weights.square().sum()
            value = events.sum() * cox_loss(x @ weights, times, events) + penalty
            value.backward()  # type: ignore[no-untyped-call]
            return value

        solver.step(loss)  # type: ignore[no-untyped-call]
        self.weights: FloatArray = weights.detach().numpy()
        return self

    def predict(self, features: FloatArray) -> FloatArray:
        """Log hazards [k, 1], up to a constant."""
        risks: FloatArray = (features - self.mean) / self.deviation @ self.weights
        return risks[:, None]
