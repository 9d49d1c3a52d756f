"""DeLong's variance is the one of its definition, of its paper's data, and of resampled patients."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mil.errors import EvaluationError
from mil.statistics.bootstrap import patient_bootstrap
from mil.statistics.delong import Area, auroc_area, delong_test
from mil.statistics.metrics import class_auroc

# DeLong, DeLong and Clarke-Pearson 1988, the 43 complete patients: albumin, total protein, K-G score, benefit.
PATIENTS = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0
4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1
4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1
2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""


def two_scores(n: int = 60, seed: int = 0, step: float = 0.25) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and two correlated scores with ties."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 3 == 0).astype(int)
    shared = rng.normal(size=n)
    scores = [labels * gain + shared + rng.normal(size=n) for gain in (1.5, 0.8)]
    return labels, *(np.round(score / step) * step for score in scores)


def by_definition(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Difference and its variance from every pair of a positive and a negative, as in the paper."""
    kernels = []
    for scores in (first, second):
        above = scores[labels == 1][:, None] - scores[labels == 0][None]
        kernels.append((above > 0) + 0.5 * (above == 0))
    tens = np.stack([kernel.mean(axis=1) for kernel in kernels])
    ones = np.stack([kernel.mean(axis=0) for kernel in kernels])
    covariance = np.cov(tens) / tens.shape[1] + np.cov(ones) / ones.shape[1]
    contrast = np.array([1, -1])
    return kernels[0].mean() - kernels[1].mean(), contrast @ covariance @ contrast


@pytest.mark.parametrize("seed", range(5))
def test_placements_by_rank_are_those_by_pairs(seed):
    labels, first, second = two_scores(seed=seed)
    difference, variance = by_definition(labels, first, second)
    found = delong_test(labels, first, second)
    assert found.value == pytest.approx(difference)
    assert found.standard_error**2 == pytest.approx(variance)
    assert auroc_area(labels, first).value == pytest.approx(roc_auc_score(labels, first))
    reverse = delong_test(labels, second, first)
    assert (reverse.value, reverse.p) == pytest.approx((-found.value, found.p))


def test_the_published_example():
    table = np.array(PATIENTS.split(), dtype=float).reshape(-1, 4)
    albumin, protein, kg, labels = table[:, 0], table[:, 1], 10 - table[:, 2], table[:, 3]
    for scores, value, error in ((albumin, 0.7366, 0.0927), (kg, 0.7258, 0.1028), (protein, 0.6478, 0.1000)):
        assert auroc_area(labels, scores) == pytest.approx((value, error), abs=6e-5)
    against_kg = delong_test(labels, protein, kg)
    assert against_kg == pytest.approx((-0.0780, 0.1046), abs=6e-5)
    assert against_kg.p == pytest.approx(0.4561, abs=6e-5)
    assert delong_test(labels, albumin, kg).p == pytest.approx(0.9102, abs=6e-5)


def test_slides_of_one_patient_are_dependent():
    labels, first, second = two_scores(80)
    once = delong_test(labels, first, second)
    alone = delong_test(labels, first, second, [f"p{at}" for at in range(80)])
    assert alone == pytest.approx(once)
    twice = [np.r_[each, each] for each in (labels, first, second)]
    patients = [f"p{at % 80}" for at in range(160)]
    # each slide seen twice says nothing new; taken for 160 patients it seems to
    assert delong_test(*twice, patients) == pytest.approx(once)
    assert delong_test(*twice).standard_error < 0.75 * once.standard_error


def test_the_error_is_that_of_resampled_patients():
    rng = np.random.default_rng(4)
    patient_of = np.repeat(np.arange(120), 3)
    labels = rng.integers(0, 2, 360)
    scores = labels + rng.normal(size=120)[patient_of] + 0.5 * rng.normal(size=360)
    patients = [f"p{at}" for at in patient_of]
    both = np.stack([-scores, scores], axis=1)
    drawn = patient_bootstrap(lambda w: {"a": class_auroc(labels, both, w)[:, 1]}, patients, 2000)["a"]
    assert auroc_area(labels, scores, patients).standard_error == pytest.approx(drawn.std(), rel=0.1)


def test_p_is_uniform_when_both_scores_are_alike():
    values = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        labels = np.arange(80) % 2
        values.append(delong_test(labels, labels + rng.normal(size=80), labels + rng.normal(size=80)).p)
    assert np.mean(np.array(values) < 0.05) == pytest.approx(0.05, abs=0.035)
    assert np.mean(np.array(values) < 0.5) == pytest.approx(0.5, abs=0.1)


def test_interval_and_degenerate_p():
    low, high = Area(0.5, 0.1).interval()
    assert (low, high) == pytest.approx((0.5 - 0.1959964, 0.5 + 0.1959964))
    labels, first, _ = two_scores()
    same = delong_test(labels, first, first)
    assert (same.value, same.p) == (0.0, 1.0)
    apart = delong_test(labels, labels.astype(float), -labels.astype(float))
    assert (apart.value, apart.standard_error, apart.p) == (1.0, 0.0, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1]}, "one of each per slide"),
        ({"patient_ids": ["a"]}, "one of each per slide"),
        ({"labels": [0, 1, 2, 1]}, "expected 0 and 1"),
        ({"scores": [0.1, np.nan, 0.2, 0.3]}, "finite scores"),
        ({"labels": [0, 0, 0, 1]}, "got 1 patients with positive slides and 3"),
        ({"patient_ids": ["a", "b", "a", "b"]}, "got 1 patients with positive slides and 1"),
    ],
)
def test_what_has_no_variance_is_refused(change, message):
    given = {"labels": [0, 1, 0, 1], "scores": [0.1, 0.2, 0.3, 0.4], "patient_ids": list("abcd")} | change
    with pytest.raises(EvaluationError, match=message):
        auroc_area(**given)
