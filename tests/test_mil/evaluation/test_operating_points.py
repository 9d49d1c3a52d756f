"""Thresholds reach their targets on the slides they are chosen by, and see validation parts only."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from mil.errors import EvaluationError
from mil.evaluation.operating_points import choose_threshold, one_vs_rest_thresholds, operate, operate_one_vs_rest
from mil.statistics.bootstrap import Resampling
from mil.statistics.classification import evaluate
from tests.test_mil.evaluation.test_temperature import replicas

SLIDES = st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=2, max_size=40).filter(
    lambda rows: 0 < sum(positive for positive, _ in rows) < len(rows)
)


def achieved(truth: np.ndarray, scores: np.ndarray, value: float) -> tuple[float, float]:
    return (scores[truth] >= value).mean(), (scores[~truth] < value).mean()


@given(SLIDES)
def test_youden_is_the_best_point_of_scikit_learns_curve(rows):
    truth, scores = np.array([row[0] for row in rows]), np.array([row[1] / 12 for row in rows])
    found = choose_threshold(truth, scores)
    false_rate, true_rate, _ = roc_curve(truth, scores)
    assert found.sensitivity + found.specificity - 1 == pytest.approx((true_rate - false_rate).max())
    assert achieved(truth, scores, found.value) == pytest.approx((found.sensitivity, found.specificity))


@given(SLIDES, st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_targets_are_reached_at_the_least_cost(rows, target):
    truth, scores = np.array([row[0] for row in rows]), np.array([row[1] / 12 for row in rows])
    false_rate, true_rate, _ = roc_curve(truth, scores, drop_intermediate=False)
    sensitive = choose_threshold(truth, scores, sensitivity=target)
    assert sensitive.sensitivity >= target
    assert sensitive.specificity == pytest.approx(1 - false_rate[true_rate >= target].min())
    specific = choose_threshold(truth, scores, specificity=target)
    assert specific.specificity >= target
    assert specific.sensitivity == pytest.approx(true_rate[1 - false_rate >= target].max())
    for found in (sensitive, specific):
        assert np.isfinite(found.value)
        assert achieved(truth, scores, found.value) == pytest.approx((found.sensitivity, found.specificity))


def test_thresholds_lie_midway_between_scores():
    assert choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.8]).value == pytest.approx(0.4)
    assert choose_threshold([1, 0, 1], [0.1, 0.2, 0.6], sensitivity=0.5).value == pytest.approx(0.4)
    # of thresholds as good, the lowest: it finds more than was asked for
    assert choose_threshold([0, 1, 1], [0.1, 0.2, 0.6], sensitivity=0.5).value == pytest.approx(0.15)
    close = [0.5, np.nextafter(0.5, 1)]
    found = choose_threshold([0, 1], close)
    assert (found.sensitivity, found.specificity) == (1.0, 1.0)
    assert achieved(np.array([False, True]), np.array(close), found.value) == (1.0, 1.0)


def test_one_vs_rest_is_each_class_against_the_others():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    probabilities = rng.dirichlet(np.ones(3), 60) * 0.5 + 0.5 * np.eye(3)[labels]
    for at, found in enumerate(one_vs_rest_thresholds(labels, probabilities, sensitivity=0.9)):
        assert found == choose_threshold(labels == at, probabilities[:, at], sensitivity=0.9)


def test_operating_points_are_scored_out_of_fold():
    predictions = replicas()
    cohort = predictions.cohort
    point = operate(predictions, sensitivity=0.9)
    truth = cohort.labels == 1
    for at, parts in enumerate(predictions.parts):
        held = parts == "validation"
        scores = predictions.probabilities[at, held, 1]
        assert point.thresholds[at] == choose_threshold(truth[held], scores, sensitivity=0.9).value
    votes = np.zeros((2, len(cohort)))
    for at, parts in enumerate(predictions.parts):
        tested = parts == "test"
        votes[0, tested] += predictions.probabilities[at, tested, 1] >= point.thresholds[at]
        votes[1, tested] += 1
    np.testing.assert_array_equal(point.predicted, votes[0] / votes[1] >= 0.5)
    assert point.sensitivity["value"] == pytest.approx(point.predicted[truth].mean())
    assert point.specificity["value"] == pytest.approx((~point.predicted[~truth]).mean())
    assert point.sensitivity["low"] < point.sensitivity["value"] < point.sensitivity["high"]
    default = evaluate(cohort.labels, predictions.out_of_fold(), cohort.patient_ids, cohort.class_names, Resampling(10))
    assert point.sensitivity["value"] > default["classes"]["triple-negative"]["recall"]["value"]


def test_slides_that_no_fold_tests_are_not_scored():
    predictions = replicas()
    parts, untested = predictions.parts.copy(), np.arange(len(predictions.cohort)) % 3 == 0
    parts[:, untested] = np.where(parts[:, untested] == "test", "unused", parts[:, untested])
    found = operate(replace(predictions, parts=parts))
    truth = predictions.cohort.labels[~untested] == 1
    assert not found.predicted[untested].any()
    assert found.sensitivity["value"] == pytest.approx(found.predicted[~untested][truth].mean())
    assert found.specificity["value"] == pytest.approx((~found.predicted[~untested][~truth]).mean())


def test_test_and_training_slides_have_no_say():
    predictions = replicas()
    spoiled = np.where((predictions.parts == "validation")[..., None], predictions.probabilities, 0.5)
    assert operate(replace(predictions, values=spoiled)).thresholds == operate(predictions).thresholds


def test_a_validation_part_of_one_class_leaves_the_default():
    predictions = replicas()
    parts = predictions.parts.copy()
    parts[0, (parts[0] == "validation") & (predictions.cohort.labels == 1)] = "train"
    point = operate(replace(predictions, parts=parts))
    assert point.thresholds[0] == 0.5
    assert any(text.startswith("1 of 6 replicas validate on no slide of class 'triple-") for text in point.warnings)
    assert any("fewer than 5 patients" in text for text in point.warnings)


def test_the_positive_class_is_named():
    predictions = replicas()
    other = operate(predictions, "Luminal A")
    assert other.class_name == "Luminal A"
    assert other.sensitivity["value"] == pytest.approx(other.predicted[predictions.cohort.labels == 0].mean())
    with pytest.raises(EvaluationError, match="did you mean 'Luminal A'"):
        operate(predictions, "luminal a")
    three = replace(predictions, cohort=replace(predictions.cohort, class_names=("a", "b", "c")))
    with pytest.raises(EvaluationError, match="positive class None"):
        operate(three)


def test_rates_and_intervals_are_those_of_the_recalls():
    predictions = replicas()
    cohort = predictions.cohort
    for how in (Resampling(300), Resampling(300, 1, 0.8, "bca"), Resampling(300, stratified=True)):
        point = operate(predictions, sensitivity=0.9, resampling=how)
        said = np.eye(2)[point.predicted.astype(int)]
        found = evaluate(cohort.labels, said, cohort.patient_ids, cohort.class_names, how)["classes"]
        assert point.sensitivity == pytest.approx(found["triple-negative"]["recall"])
        assert point.specificity == pytest.approx(found["Luminal A"]["recall"])


def test_a_side_of_one_patient_has_no_interval():
    predictions = replicas()
    first = np.array([patient == "p1" for patient in predictions.cohort.patient_ids])
    labels = np.where(first, 1, 0)
    point = operate(replace(predictions, cohort=replace(predictions.cohort, labels=labels)))
    assert point.sensitivity["low"] is None
    assert point.specificity["low"] is not None
    assert any("'triple-negative' has 1 patient" in text for text in point.warnings)


def test_every_class_has_its_operating_point():
    predictions = replicas()
    names = ("a", "b", "c")
    rng = np.random.default_rng(1)
    labels = np.arange(len(predictions.cohort)) // 2 % 3
    probabilities = rng.dirichlet(np.ones(3), predictions.parts.shape)
    three = replace(
        predictions,
        cohort=replace(predictions.cohort, labels=labels, class_names=names),
        values=probabilities,
    )
    points = operate_one_vs_rest(three, specificity=0.8)
    assert [point.class_name for point in points] == list(names)
    for point in points:
        alone = operate(three, point.class_name, specificity=0.8)
        assert (point.thresholds, point.specificity) == (alone.thresholds, alone.specificity)


@pytest.mark.parametrize(
    ("arguments", "targets", "message"),
    [
        (([0, 1], [0.1, 0.2]), {"sensitivity": 0.9, "specificity": 0.9}, "expected one of them"),
        (([0, 1], [0.1, 0.2]), {"sensitivity": 90}, "pass sensitivity=0.95"),
        (([1, 1], [0.1, 0.2]), {}, "slides of both"),
        (([0, 2], [0.1, 0.2]), {}, "slides of both"),
        (([0, 1], [0.1]), {}, "one finite score per slide"),
        (([0, 1], [0.1, np.nan]), {}, "one finite score per slide"),
    ],
)
def test_impossible_choices_are_refused(arguments, targets, message):
    with pytest.raises(EvaluationError, match=message):
        choose_threshold(*arguments, **targets)
