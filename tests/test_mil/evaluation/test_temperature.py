"""Temperatures are the best there are, come from validation parts only, and never make these worse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from mil.errors import EvaluationError
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.evaluation.temperature import HIGHEST, LOWEST, apply_temperature, fit_temperature, scale_temperatures
from mil.splits.folds import make_splits
from mil.statistics.calibration import log_likelihood_loss
from mil.training.replica import Replica
from tests.test_mil.small import fast_config, make_cohort
from tests.test_mil.statistics.test_calibration import calibrated


def replicas(sharpness: float = 3.0, n_patients: int = 60, noise: float = 1.0) -> ReplicaPredictions:
    """Three folds and two seeds of replicas that are too sure of themselves."""
    cohort, config = make_cohort(n_patients), fast_config("folds=3", "seeds=2")
    splits = make_splits(cohort, 3, 0, (0, 1), 0.25)
    made = tuple(Replica(fold, seed, config) for fold in range(3) for seed in (0, 1))
    parts = np.stack([splits.parts(each.fold, each.seed) for each in made])
    logits = noise * np.random.default_rng(0).normal(size=(6, len(cohort), 2)) + np.eye(2)[cohort.labels]
    return ReplicaPredictions(cohort, made, parts, torch.from_numpy(sharpness * logits).softmax(dim=-1).numpy())


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_what_was_done(sharpness):
    labels, stated = calibrated(20_000, sharpness=sharpness)
    assert fit_temperature(stated, labels) == pytest.approx(sharpness, rel=0.04)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_minimum(seed):
    labels, stated = calibrated(40, seed=seed, sharpness=2)
    best = minimize_scalar(
        lambda log_t: log_likelihood_loss(labels, apply_temperature(stated, np.exp(log_t))),
        bounds=np.log([LOWEST, HIGHEST]),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert fit_temperature(stated, labels) == pytest.approx(np.exp(best.x), rel=1e-4)


def test_the_fitting_part_never_gets_worse():
    for seed in range(60):
        labels, stated = calibrated(int(np.random.default_rng(seed).integers(1, 12)), 2, seed, sharpness=4)
        scaled = apply_temperature(stated, fit_temperature(stated, labels))
        assert log_likelihood_loss(labels, scaled) <= log_likelihood_loss(labels, stated) + 1e-12


def test_no_certainty_from_few_slides_and_none_beyond_the_range():
    right = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert fit_temperature(right, np.array([0, 1])) == 1.0
    assert fit_temperature(right, np.array([1, 0])) == HIGHEST
    nearly = np.array([[0.5001, 0.4999]] * 999 + [[0.4999, 0.5001]])
    assert fit_temperature(nearly, np.zeros(1000, dtype=int)) == LOWEST
    with pytest.raises(EvaluationError, match="validation part that holds slides"):
        fit_temperature(right[:0], np.array([], dtype=int))


def test_scaling_keeps_the_order_and_zeros_do_no_harm():
    _, stated = calibrated(50)
    scaled = apply_temperature(stated, 3.0)
    np.testing.assert_array_equal(scaled.argsort(axis=1), stated.argsort(axis=1))
    np.testing.assert_allclose(scaled.sum(axis=1), 1)
    np.testing.assert_allclose(apply_temperature(stated, 1.0), stated)
    assert np.isfinite(apply_temperature(np.array([[0.0, 1.0]]), 0.05)).all()


def test_replicas_are_scaled_by_their_own_validation_part():
    predictions = replicas()
    scaled = scale_temperatures(predictions)
    labels = predictions.cohort.labels
    for at, parts in enumerate(predictions.parts):
        held = parts == "validation"
        assert scaled.temperatures[at] == fit_temperature(predictions.probabilities[at, held], labels[held])
    assert all(value > 1 for value in scaled.temperatures)
    test_losses = []
    for each in (predictions, scaled.predictions):
        held = zip(each.probabilities, each.parts == "test", strict=True)
        test_losses.append(np.mean([log_likelihood_loss(labels[test], p[test]) for p, test in held]))
    assert test_losses[1] < test_losses[0]
    np.testing.assert_allclose(scaled.out_of_fold().sum(axis=1), 1)


def test_test_and_training_slides_have_no_say():
    predictions = replicas()
    expected = scale_temperatures(predictions).temperatures
    spoiled = np.where((predictions.parts == "validation")[..., None], predictions.probabilities, 0.5)
    assert scale_temperatures(replace(predictions, values=spoiled)).temperatures == expected


def test_few_validation_patients_are_told():
    small = scale_temperatures(replicas(n_patients=12))
    assert any("fewer than 5 patients" in text and "6 of 6 replicas" in text for text in small.warnings)
    sure = scale_temperatures(replicas(noise=0.0))
    assert any("6 of 6 replicas predict all" in text for text in sure.warnings)
    assert sure.temperatures == (1.0,) * 6
