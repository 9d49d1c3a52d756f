"""The detectable difference is what simulated cohorts detect in four of five cases."""

import numpy as np
import pytest
from scipy import stats

from mil.errors import EvaluationError
from mil.statistics.bootstrap import Resampling
from mil.statistics.paired_tests import detectable, minimum_detectable_difference, paired_difference


def two_heads(rng: np.random.Generator, n: int, gain: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """A head that is right on a share `gain` of slides more than another, with some errors in common."""
    labels = np.arange(n) % 2
    hard = rng.random(n)
    right = list(hard + 0.25 * rng.normal(size=(2, n)) < 0.75)
    # the better head also gets a share of its errors right
    right[0] |= rng.random(n) < gain / (1 - right[0].mean())
    heads = [np.eye(2)[np.where(each, labels, 1 - labels)] for each in right]
    return labels, *heads, [f"p{at}" for at in range(n)]


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_simulated_cohorts_detect_it_in_four_of_five_cases(metric):
    n, rng = 150, np.random.default_rng(1)
    gain = 0.1
    for _ in range(3):  # the standard error depends a little on the gain
        gain = float(
            np.mean(
                [
                    minimum_detectable_difference(*two_heads(rng, n, gain), metric=metric, resampling=Resampling(300))
                    for _ in range(30)
                ]
            )
        )
    found, differences = 0, []
    for _ in range(250):
        pair = paired_difference(*two_heads(rng, n, gain), metric=metric, resampling=Resampling(300))
        found += pair.low > 0
        differences.append(pair.difference)
    assert np.mean(differences) == pytest.approx(gain, abs=0.01)
    assert found / 250 == pytest.approx(0.8, abs=0.08)


def test_it_shrinks_with_the_root_of_the_cohort_and_grows_with_power():
    rng = np.random.default_rng(2)
    small, large = (minimum_detectable_difference(*two_heads(rng, n, 0.05), metric="accuracy") for n in (200, 3200))
    assert small / large == pytest.approx(4, rel=0.25)
    assert detectable(0.05, power=0.9) > detectable(0.05) > detectable(0.05, significance=0.2)


@pytest.mark.parametrize(("significance", "power"), [(0.05, 0.8), (0.01, 0.9)])
def test_a_two_sided_z_test_has_the_power_that_was_asked_for(significance: float, power: float):
    shift = detectable(0.1, significance=significance, power=power) / 0.1
    limit = stats.norm.isf(significance / 2)
    assert stats.norm.sf(limit - shift) + stats.norm.cdf(-limit - shift) == pytest.approx(power, rel=1e-3)


def test_nothing_is_told_from_equal_heads_or_one_patient():
    labels, first, second, patients = two_heads(np.random.default_rng(3), 40, 0.1)
    assert minimum_detectable_difference(labels, first, first, patients) is None
    assert minimum_detectable_difference(labels, first, second, ["p"] * 40) is None
    with pytest.raises(EvaluationError, match="shares between 0 and 1"):
        minimum_detectable_difference(labels, first, second, patients, power=80)
