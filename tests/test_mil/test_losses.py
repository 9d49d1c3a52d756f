"""Losses against scikit-learn and torch."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from mil.losses import balanced_class_weights, log_loss, probabilities, weighted_cross_entropy


def test_balanced_weights_are_scikit_learns() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2] * 11)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(balanced_class_weights(labels, 3), expected, rtol=1e-6)


def test_a_class_that_does_not_occur_weighs_nothing() -> None:
    assert balanced_class_weights(np.array([0, 2]), 3).tolist() == [pytest.approx(1 / 3 * 2)] * 1 + [
        0.0,
        pytest.approx(2 / 3),
    ]


def test_over_the_whole_training_part_the_loss_is_torchs_weighted_mean() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    logits, targets = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.from_numpy(labels)
    weights = balanced_class_weights(labels, 3)
    expected = functional.cross_entropy(logits, targets, weight=weights)
    torch.testing.assert_close(weighted_cross_entropy(logits, targets, weights), expected)
    assert log_loss(logits, targets, weights) == pytest.approx(float(expected), rel=1e-6)


def test_a_pack_of_one_class_keeps_its_weight() -> None:
    logits, targets = torch.zeros(2, 2), torch.tensor([1, 1])
    light = weighted_cross_entropy(logits, targets, torch.tensor([1.0, 0.5]))
    heavy = weighted_cross_entropy(logits, targets, torch.tensor([1.0, 2.0]))
    assert float(heavy) == pytest.approx(4 * float(light))


def test_probabilities_sum_to_one_in_float64() -> None:
    values = probabilities(torch.tensor([[800.0, -800.0, 0.0], [0.1, 0.2, 0.3]]))
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values.sum(dim=1), 1, atol=1e-15)
