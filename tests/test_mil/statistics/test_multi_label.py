"""Metrics of several labels, against scikit-learn on the slides whose answer is known."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score, roc_auc_score

from mil.errors import EvaluationError
from mil.statistics.bootstrap import Resampling
from mil.statistics.multi_label import evaluate_multi_label, label_aurocs, score, summarise


def _draw(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = (rng.random((n, 3)) < [0.5, 0.3, 0.7]).astype(float)
    chances = (0.35 * truth + 0.65 * rng.random(truth.shape)).round(2)
    truth[rng.random(truth.shape) < 0.2] = np.nan
    return truth, chances


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_scikit_learn_on_known_answers(seed):
    truth, chances = _draw(seed)
    found = score(truth, chances)
    for at in range(3):
        known = np.isfinite(truth[:, at])
        y, p = truth[known, at], chances[known, at]
        said = p >= 0.5
        assert found["auroc"][0, at] == pytest.approx(roc_auc_score(y, p))
        assert found["f1"][0, at] == pytest.approx(f1_score(y, said))
        assert found["sensitivity"][0, at] == pytest.approx(recall_score(y, said))
        assert found["specificity"][0, at] == pytest.approx(recall_score(y, said, pos_label=0))
        assert found["balanced_accuracy"][0, at] == pytest.approx(balanced_accuracy_score(y, said))


def test_a_weight_is_a_repetition_and_unknown_answers_weigh_nothing():
    truth, chances = _draw(5)
    weights = np.random.default_rng(0).integers(0, 3, len(truth))
    repeated = label_aurocs(np.repeat(truth, weights, axis=0), np.repeat(chances, weights, axis=0))
    np.testing.assert_allclose(label_aurocs(truth, chances, weights), repeated)
    moved = np.where(np.isnan(truth), 1 - chances, chances)
    np.testing.assert_array_equal(label_aurocs(truth, moved), label_aurocs(truth, chances))


def test_the_evaluation_holds_means_labels_and_warnings():
    truth, chances = _draw(0)
    truth[:, 2] = 0
    truth[0, 2] = 1
    found = evaluate_multi_label(truth, chances, [f"p{at}" for at in range(60)], ["er", "pr", "her2"], Resampling(100))
    assert found["targets"]["her2"]["positive"] == 1
    assert found["targets"]["her2"]["auroc"]["low"] is None
    assert found["macro_auroc"]["low"] is None
    assert found["targets"]["er"]["auroc"]["low"] is not None
    assert any("'her2' has 1 patient(s) on one side" in text for text in found["warnings"])
    each = [found["targets"][name]["auroc"]["value"] for name in ("er", "pr", "her2")]
    assert found["macro_auroc"]["value"] == pytest.approx(np.mean(each))


def test_means_are_of_all_labels_or_of_none():
    truth, chances = _draw(3)
    truth[:, 1] = 0
    truth[:2, 1] = 1
    weights = np.ones((3, len(truth)))
    weights[1, :2] = weights[2, 1] = 0
    whole, lacking, there = summarise(truth, chances, weights)["macro_auroc"]
    assert np.isnan(lacking)
    assert np.isfinite([whole, there]).all()
    np.testing.assert_array_equal(
        summarise(truth, chances, weights, "macro_auroc")["macro_auroc"][1:], [lacking, there]
    )
    # the rare label is ranked worst: without it the mean would be too good
    chances[:, 1] = np.where(truth[:, 1] == 1, 0.0, 0.9)
    patients = [f"p{at}" for at in range(len(truth))]
    found = evaluate_multi_label(truth, chances, patients, ["a", "b", "c"], Resampling(400))
    others = [found["targets"][name]["auroc"]["value"] for name in "ac"]
    assert found["macro_auroc"]["high"] < np.mean(others) - 0.1
    assert any("bootstrap replicates lack an answer to a label" in text for text in found["warnings"])


def test_patients_alone_in_their_stratum_are_told():
    truth, chances = _draw(0)
    patients = [f"p{at}" for at in range(60)]
    rarest = [next((at for at in (1, 0, 2) if row[at] == 1), 3) for row in truth]
    patients[rarest.index(1)] = patients[rarest.index(3)] = "both"
    names = ["a", "b", "c"]
    found = evaluate_multi_label(truth, chances, patients, names, Resampling(50, stratified=True))
    assert any("1 patient alone has slides of" in text and "no other stratum" in text for text in found["warnings"])
    plain = evaluate_multi_label(truth, chances, patients, names, Resampling(50))
    assert plain["warnings"] == []


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(EvaluationError, match="expected"):
        evaluate_multi_label([[1.0]], [[0.5, 0.5]], ["a"], ["x"])
