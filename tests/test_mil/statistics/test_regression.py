"""Errors and correlations of numbers, against scikit-learn and SciPy."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from mil.errors import EvaluationError
from mil.statistics.bootstrap import Resampling
from mil.statistics.regression import evaluate_regression, score


def _draw(seed: int, n: int = 50, targets: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(1e6, 1.0, (n, targets)).round(1)  # far from zero, with ties
    return truth, truth + rng.normal(0, 0.7, truth.shape)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_other_libraries(seed):
    truth, said = _draw(seed)
    found = score(truth, said)
    for at in range(2):
        y, z = truth[:, at], said[:, at]
        expected = {
            "r2": r2_score(y, z),
            "mae": mean_absolute_error(y, z),
            "rmse": root_mean_squared_error(y, z),
            "pearson": pearsonr(y, z).statistic,
            "spearman": spearmanr(y, z).statistic,
        }
        for name, value in expected.items():
            assert found[name][0, at] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("name", ["r2", "mae", "rmse", "pearson"])
def test_a_weight_is_a_repetition(name):
    truth, said = _draw(1)
    weights = np.random.default_rng(0).integers(0, 4, len(truth))
    repeated = score(np.repeat(truth, weights, axis=0), np.repeat(said, weights, axis=0))[name]
    np.testing.assert_allclose(score(truth, said, weights)[name], repeated, rtol=1e-6)


def test_what_does_not_vary_is_undefined():
    found = score(np.full((5, 1), 3.3), np.arange(5.0)[:, None])
    assert np.isnan(found["r2"]).all()
    assert np.isnan(found["pearson"]).all()


def test_the_evaluation_holds_means_targets_and_intervals():
    truth, said = _draw(2)
    found = evaluate_regression(truth, said, [f"p{at // 2}" for at in range(50)], ["a", "b"], Resampling(200))
    assert (found["n_slides"], found["n_patients"]) == (50, 25)
    each = [found["targets"][name]["r2"]["value"] for name in ("a", "b")]
    assert found["r2"]["value"] == pytest.approx(np.mean(each))
    assert found["r2"]["low"] < found["r2"]["value"] < found["r2"]["high"]
    alone = evaluate_regression(truth, said, ["p"] * 50, ["a", "b"], Resampling(20))
    assert alone["r2"]["low"] is None
    assert alone["warnings"]


def test_few_patients_and_those_alone_in_their_stratum_are_told():
    truth, said = _draw(3, targets=1)
    few = evaluate_regression(truth, said, [f"p{at % 3}" for at in range(50)], ["a"], Resampling(50))
    assert few["warnings"] == ["all slides are of 3 patient(s): the intervals are too narrow to be trusted"]
    patients = [f"p{at}" for at in range(50)]
    patients[int(truth.argmax())] = patients[int(truth.argmin())] = "both"
    found = evaluate_regression(truth, said, patients, ["a"], Resampling(50, stratified=True))
    (text,) = found["warnings"]
    assert text.startswith("1 patient alone has slides of 'a: part 1', 'a: part 4' and of no other stratum")
    assert evaluate_regression(truth, said, patients, ["a"], Resampling(50))["warnings"] == []


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(EvaluationError, match="expected"):
        evaluate_regression([[1.0], [2.0]], [[1.0]], ["a", "b"], ["x"])
    with pytest.raises(EvaluationError, match="finite"):
        evaluate_regression([[1.0], [np.nan]], [[1.0], [2.0]], ["a", "b"], ["x"])
