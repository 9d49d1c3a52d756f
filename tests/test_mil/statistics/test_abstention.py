"""Risk-coverage curves against a plain loop, ties included."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from mil.errors import EvaluationError
from mil.statistics.abstention import choose_confidence, evaluate_abstention, risk_coverage
from mil.statistics.bootstrap import Resampling


def heads(n: int = 80, seed: int = 0, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(3), rng.integers(0, 3, n - 3)]
    probabilities = rng.dirichlet(np.ones(3), n) * 0.6 + 0.4 * np.eye(3)[labels]
    return labels, np.round(probabilities, digits)


@pytest.mark.parametrize("digits", [1, 9])
def test_every_step_is_what_its_slides_say(digits):
    labels, probabilities = heads(digits=digits)
    curve = risk_coverage(labels, probabilities)
    confidence = probabilities.max(axis=1)
    np.testing.assert_array_equal(curve.confidence, np.unique(confidence)[::-1])
    for at, least in enumerate(curve.confidence):
        held = confidence >= least
        truth, predicted = labels[held], probabilities[held].argmax(axis=1)
        assert curve.coverage[at] == pytest.approx(held.mean())
        assert curve.accuracy[at] == pytest.approx(accuracy_score(truth, predicted))
        if set(truth) == {0, 1, 2}:
            assert curve.balanced_accuracy[at] == pytest.approx(balanced_accuracy_score(truth, predicted))
        else:
            assert np.isnan(curve.balanced_accuracy[at])
    risks = [1 - curve.accuracy[np.flatnonzero(curve.confidence == each)[0]] for each in confidence]
    assert curve.area == pytest.approx(np.mean(risks))


def test_the_area_tells_useful_confidence_from_useless():
    labels = np.arange(100) % 2
    right = np.arange(100) % 10 != 0
    predicted = np.where(right, labels, 1 - labels)
    sure = np.where(right, 0.9, 0.6) + 0.001 * np.arange(100) / 100
    areas = []
    for confidence in (sure, 1.5 - sure, np.full(100, 0.8)):
        both = np.where(np.eye(2)[predicted] == 1, confidence[:, None], 1 - confidence[:, None])
        areas.append(risk_coverage(labels, both).area)
    # ten errors, all last: the mean of k / (90 + k) over 100 slides
    assert areas[0] == pytest.approx(sum(k / (90 + k) for k in range(1, 11)) / 100)
    assert areas[0] < areas[2] == pytest.approx(0.1)
    assert areas[1] > 0.1


def test_a_confidence_that_reaches_an_accuracy():
    labels, probabilities = heads()
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    least = choose_confidence(labels, probabilities, 0.95)
    assert right[confidence >= least].mean() >= 0.95
    for lower in np.unique(confidence[confidence < least]):
        assert right[confidence >= lower].mean() < 0.95
    assert choose_confidence([0, 1], [[0.1, 0.9], [0.8, 0.2]], 0.5) is None
    with pytest.raises(EvaluationError, match="accuracy=95"):
        choose_confidence(labels, probabilities, 95)


def test_everything_at_once_with_an_interval():
    labels, probabilities = heads(90)
    patients = [f"p{at // 2}" for at in range(90)]
    found = evaluate_abstention(labels, probabilities, patients, "abc", Resampling(500))
    curve = risk_coverage(labels, probabilities)
    assert found["area"]["value"] == pytest.approx(curve.area)
    assert found["area"]["low"] < curve.area < found["area"]["high"] < 1
    assert found["random_area"] == pytest.approx(1 - accuracy_score(labels, probabilities.argmax(axis=1)))
    assert found["curve"][-1]["coverage"] == 1.0
    assert found["curve"][0]["balanced_accuracy"] is None
    json.dumps(found, allow_nan=False)
    few = evaluate_abstention(labels[:9], probabilities[:9], list("abcdefghi"), "abc", Resampling(10))
    assert any("patients" in text for text in few["warnings"])


def test_the_area_is_the_same_on_slides_counted_twice():
    labels, probabilities = heads(20)
    twice = risk_coverage(np.r_[labels, labels], np.r_[probabilities, probabilities])
    assert twice.area == pytest.approx(risk_coverage(labels, probabilities).area)


def test_accuracy_at_every_coverage_is_that_of_a_plain_loop():
    labels, probabilities = heads(90, digits=1)
    patients = [f"p{at // 2}" for at in range(90)]
    shares = (1.0, 0.9, 0.35)
    found = evaluate_abstention(labels, probabilities, patients, "abc", Resampling(200), coverages=shares)["coverages"]
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    for share, row in zip(shares, found, strict=True):
        # the highest confidence that enough slides reach
        least = max(cut for cut in sure if (sure >= cut).mean() >= share)
        held = sure >= least
        assert (row["asked"], row["confidence"], row["n_slides"]) == (share, least, held.sum())
        assert row["coverage"] == pytest.approx(held.mean())
        assert row["accuracy"]["value"] == pytest.approx(right[held].mean())
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
    assert found[0]["accuracy"]["low"] < found[0]["accuracy"]["high"]
    assert found[2]["n_slides"] < 90


def test_nine_tenths_of_ten_slides_are_nine():
    probabilities = np.array([[0.5 + at / 30, 0.5 - at / 30] for at in range(1, 11)])
    patients = [f"p{at}" for at in range(10)]
    # 3 x 0.1 is more than 0.3
    shares = [min(0.1 * at, 1) for at in range(1, 11)]
    found = evaluate_abstention(np.zeros(10, int), probabilities, patients, "ab", Resampling(5), coverages=shares)
    assert [row["n_slides"] for row in found["coverages"]] == list(range(1, 11))
    with pytest.raises(EvaluationError, match="got the coverages 90"):
        evaluate_abstention(np.zeros(10, int), probabilities, patients, "ab", coverages=[90])


def test_one_patient_alone_gives_no_interval():
    labels, probabilities = heads(12)
    surest = int(probabilities.max(axis=1).argmax())
    patients = [f"p{at}" for at in range(12)]
    probabilities[surest] = [0.98, 0.01, 0.01]
    (row,) = evaluate_abstention(labels, probabilities, patients, "abc", Resampling(20), coverages=[0.05])["coverages"]
    assert row["n_slides"] == 1
    assert row["accuracy"]["low"] is None


def test_bca_and_strata_move_the_interval_only():
    labels, probabilities = heads(90)
    given = (labels, probabilities, [f"p{at // 2}" for at in range(90)], "abc")
    usual = evaluate_abstention(*given, Resampling(300))
    for how in ({"interval": "bca"}, {"stratified": True}):
        other = evaluate_abstention(*given, Resampling(300, **how))
        assert other["curve"] == usual["curve"]
        assert other["area"]["value"] == usual["area"]["value"]
        assert other["area"] != usual["area"]
