"""Calibration errors, Brier score and log-likelihood, against scikit-learn and a plain loop."""

import json

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from mil.errors import EvaluationError
from mil.statistics.bootstrap import Resampling
from mil.statistics.calibration import (
    assign_bins,
    brier,
    classwise_calibration_errors,
    error_if_calibrated,
    evaluate_calibration,
    expected_calibration_error,
    log_likelihood_loss,
)


def calibrated(n: int, n_classes: int = 3, seed: int = 0, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from probabilities, which are then stated sharper than they are."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(n, n_classes))
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (truth.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    stated = np.exp(sharpness * logits) / np.exp(sharpness * logits).sum(axis=1, keepdims=True)
    return labels, stated


def test_scores_are_scikit_learns():
    labels, probabilities = calibrated(200)
    expected = brier_score_loss(labels, probabilities, labels=[0, 1, 2], scale_by_half=False)
    assert brier(labels, probabilities) == pytest.approx(expected)
    assert log_likelihood_loss(labels, probabilities) == pytest.approx(log_loss(labels, probabilities))
    binary, both = calibrated(100, 2)
    assert brier(binary, both) == pytest.approx(2 * brier_score_loss(binary, both[:, 1]))
    assert log_likelihood_loss([0], [[0.0, 1.0]]) == pytest.approx(708.4, abs=0.1)


@pytest.mark.parametrize(("by", "strategy"), [("width", "uniform"), ("mass", "quantile")])
def test_bins_are_scikit_learns(by, strategy):
    labels, probabilities = calibrated(300, 2)
    share, mean = calibration_curve(labels, probabilities[:, 1], n_bins=7, strategy=strategy)
    bins = assign_bins(probabilities[:, 1], 7, by)
    held = [bins == at for at in np.unique(bins)]
    assert [labels[each].mean() for each in held] == pytest.approx(share)
    assert [probabilities[each, 1].mean() for each in held] == pytest.approx(mean)
    weights = np.array([each.mean() for each in held])
    expected = (weights * np.abs(share - mean)).sum()
    assert classwise_calibration_errors(labels, probabilities, 7, by)[1] == pytest.approx(expected)


@pytest.mark.parametrize("by", ["width", "mass"])
def test_the_error_is_that_of_a_plain_loop(by):
    labels, probabilities = calibrated(150, sharpness=2)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, 11) if by == "width" else np.quantile(confidence, np.linspace(0, 1, 11))
    total = 0.0
    for at in range(10):
        held = (confidence > edges[at]) & (confidence <= edges[at + 1])
        held |= (confidence == edges[0]) & (at == 0)
        if held.any():
            total += held.sum() * abs(right[held].mean() - confidence[held].mean())
    assert expected_calibration_error(labels, probabilities, by=by) == pytest.approx(total / 150)


def test_equal_values_share_a_bin_of_equal_mass():
    values = np.array([0.5] * 6 + [0.6, 0.7, 0.8, 0.9])
    bins = assign_bins(values, 4, "mass")
    assert len(set(bins[:6].tolist())) == 1
    assert (np.diff(bins) >= 0).all()


def test_a_value_on_an_edge_belongs_to_the_bin_below():
    assert assign_bins(np.array([0.0, 0.05, 0.1, 0.11, 0.9, 1.0])).tolist() == [0, 0, 0, 1, 8, 9]


def test_overconfidence_is_told_from_chance():
    labels, honest = calibrated(400)
    _, sharp = calibrated(400, sharpness=3)
    for probabilities, is_off in ((honest, False), (sharp, True)):
        mean, high = error_if_calibrated(probabilities)
        assert 0 < mean < high
        assert (expected_calibration_error(labels, probabilities) > high) == is_off
    errors = [expected_calibration_error(*calibrated(400, seed=seed)) for seed in range(40)]
    assert np.mean(errors) == pytest.approx(error_if_calibrated(honest)[0], rel=0.15)


def test_everything_at_once_with_intervals():
    labels, probabilities = calibrated(240, sharpness=2)
    patients = [f"p{at // 2}" for at in range(240)]
    found = evaluate_calibration(labels, probabilities, patients, "abc", resampling=Resampling(500))
    assert found["brier"]["value"] == pytest.approx(brier(labels, probabilities))
    assert found["nll"]["value"] == pytest.approx(log_likelihood_loss(labels, probabilities))
    for name in ("brier", "nll"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert found["classwise_ece"] == pytest.approx(np.mean(list(found["classes"].values())))
    gaps = [each["n"] * abs(each["accuracy"]["value"] - each["confidence"]) for each in found["reliability"]]
    assert sum(gaps) / 240 == pytest.approx(found["ece"])
    assert sum(each["n"] for each in found["reliability"]) == 240
    json.dumps(found, allow_nan=False)


def test_thin_bins_and_classes_are_told():
    labels, probabilities = calibrated(12)
    labels[:] = [0, 1, 2] * 4
    found = evaluate_calibration(
        labels, probabilities, [f"p{at}" for at in range(12)], "abc", resampling=Resampling(50)
    )
    assert any("'a' has 4 patients" in text for text in found["warnings"])
    assert any("reliability bins hold slides of fewer than 5" in text for text in found["warnings"])
    for each in found["reliability"]:
        assert (each["accuracy"]["low"] is None) == (each["n_patients"] < 2)


def test_what_are_no_probabilities_is_refused():
    labels, probabilities = calibrated(10)
    with pytest.raises(EvaluationError, match="sum to one"):
        brier(labels, 2 * probabilities)
    with pytest.raises(EvaluationError, match="did you mean 'mass'"):
        expected_calibration_error(labels, probabilities, by="mas")
    with pytest.raises(EvaluationError, match="bins=0"):
        expected_calibration_error(labels, probabilities, bins=0)
    with pytest.raises(EvaluationError, match="one row per slide"):
        brier(labels[:3], probabilities)


def test_bca_and_strata_move_the_intervals_only():
    labels, probabilities = calibrated(240, sharpness=2)
    given = (labels, probabilities, [f"p{at // 2}" for at in range(240)], "abc")
    usual = evaluate_calibration(*given, resampling=Resampling(300))
    for how in ({"interval": "bca"}, {"stratified": True}):
        other = evaluate_calibration(*given, resampling=Resampling(300, **how))
        assert other["ece"] == usual["ece"]
        for name in ("brier", "nll"):
            assert other[name]["value"] == usual[name]["value"]
            assert (other[name]["low"], other[name]["high"]) != (usual[name]["low"], usual[name]["high"])
            assert other[name]["low"] < other[name]["value"] < other[name]["high"]
