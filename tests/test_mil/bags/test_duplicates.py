"""Slides that are one picture under two patients are named."""

import numpy as np
import pytest

from mil.bags.bags import Bags
from mil.bags.duplicates import find_near, warn_of_duplicates


@pytest.fixture
def matrices():
    rng = np.random.default_rng(0)
    return [(rng.normal(size=32) + rng.normal(size=(50, 32))).astype(np.float32) for _ in range(12)]


def _warned(matrices, patient_ids=None):
    names = [f"s{at}" for at in range(len(matrices))]
    return warn_of_duplicates(
        Bags(names, matrices).moments, names, patient_ids or [f"p{at}" for at in range(len(names))]
    )


def test_slides_of_their_own_are_not_warned_of(matrices):
    assert _warned(matrices) == []


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_copy_under_another_patient_is_named(matrices, noise):
    matrices[9] = matrices[2] + np.float32(noise) * np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32)
    (warning,) = _warned(matrices)
    assert "1 pair(s)" in warning
    assert "s2 of p2 and s9 of p9" in warning


def test_a_copy_of_the_same_patient_is_no_leak(matrices):
    matrices[9] = matrices[2]
    assert _warned(matrices, ["p"] * 12) == []


def test_another_section_of_the_same_tissue_is_let_be(matrices):
    matrices[9] = matrices[2] + np.random.default_rng(1).normal(size=32).astype(np.float32) * 0.3
    assert _warned(matrices) == []


def test_bags_of_other_sizes_are_other_slides(matrices):
    matrices[9] = np.concatenate([matrices[2], matrices[2]])
    assert _warned(matrices) == []


def test_bags_without_any_difference_say_nothing():
    assert _warned([np.ones((3, 4), np.float32)] * 5) == []


def test_few_features_are_alike_by_chance_unless_they_are_equal():
    means = np.random.default_rng(0).normal(size=(400, 3))
    counts = np.full(400, 10)
    assert find_near(means, counts) == []
    means[7] = means[300]
    assert find_near(means, counts) == [(7, 300)]


def test_pairs_are_found_across_blocks():
    means = np.random.default_rng(0).normal(size=(2500, 24))
    means[2400] = means[3]
    assert find_near(means, np.full(2500, 9)) == [(3, 2400)]
