"""Permutation and t tests and Holm's correction, against enumeration, SciPy and the papers' rules."""

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from mil.errors import EvaluationError
from mil.statistics.paired_tests import corrected_t_test, holm, permutation_test

METRICS = {
    "macro_f1": lambda labels, values: f1_score(labels, values.argmax(1), average="macro"),
    "balanced_accuracy": lambda labels, values: balanced_accuracy_score(labels, values.argmax(1)),
    "auroc": lambda labels, values: roc_auc_score(labels, values[:, 1]),
}


def _two_heads(n_patients: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Labels, a good head, a poor one, and patients of two slides each."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_patients) % 2, 2)
    good, poor = (
        np.clip(labels * gain + rng.normal(0.5 - gain / 2, 0.3, len(labels)), 0.01, 0.99) for gain in (0.9, 0.1)
    )
    pair = [np.stack([1 - score, score], axis=1) for score in (good, poor)]
    return labels, pair[0], pair[1], [f"p{at // 2}" for at in range(len(labels))]


@pytest.mark.parametrize("metric", METRICS)
def test_p_is_that_of_all_exchanges_of_patients(metric: str) -> None:
    labels, good, poor, patients = _two_heads(7)
    score = METRICS[metric]
    observed = score(labels, good) - score(labels, poor)
    found = []
    for swap in itertools.product([False, True], repeat=7):
        exchanged = np.repeat(swap, 2)[:, None]
        first, second = np.where(exchanged, poor, good), np.where(exchanged, good, poor)
        found.append(score(labels, first) - score(labels, second))
    tails = np.mean(np.array(found) >= observed - 1e-12), np.mean(np.array(found) <= observed + 1e-12)
    expected = min(1.0, 2 * min(tails))
    assert permutation_test(labels, good, poor, patients, metric) == pytest.approx(expected)


def test_drawn_exchanges_tell_a_good_head_from_a_poor_one() -> None:
    labels, good, poor, patients = _two_heads(40)
    assert permutation_test(labels, good, poor, patients) < 0.01
    assert permutation_test(labels, good, poor, patients) == permutation_test(labels, good, poor, patients)


def test_p_is_uniform_when_both_heads_are_alike() -> None:
    values = []
    for seed in range(60):
        labels, _, first, patients = _two_heads(16, seed)
        _, _, second, _ = _two_heads(16, seed + 1000)
        values.append(permutation_test(labels, first, second, patients, resamples=500))
    assert np.mean(np.array(values) < 0.2) < 0.4
    assert np.mean(np.array(values) < 0.05) < 0.15


def test_equal_predictions_differ_by_nothing() -> None:
    labels, good, _, patients = _two_heads(6)
    assert permutation_test(labels, good, good, patients) == 1.0


def test_slides_of_one_patient_prove_nothing() -> None:
    labels, good, poor, _ = _two_heads(6)
    assert permutation_test(labels, good, poor, ["p"] * len(labels)) == 1.0


def test_lengths_and_metric_are_checked() -> None:
    labels, good, poor, patients = _two_heads(6)
    with pytest.raises(EvaluationError, match=r"macro_f1.*one row per slide"):
        permutation_test(labels, good[:-1], poor, patients)
    with pytest.raises(EvaluationError, match="got metric 'f1'"):
        permutation_test(labels, good, poor, patients, "f1")


def test_holm_after_its_paper() -> None:
    # Holm 1979 by hand: 0.01 * 4, 0.02 * 3, 0.03 * 2 (raised to 0.06), 0.04 * 1 (raised to 0.06)
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).random(7) ** 3
        every = [each for size in range(1, 8) for each in itertools.combinations(range(7), size)]
        # by the closure principle a hypothesis falls where every intersection that it is part of does
        closed = [max(min(1, len(each) * values[list(each)].min()) for each in every if at in each) for at in range(7)]
        assert holm(values.tolist()) == pytest.approx(closed)


def test_a_t_test_without_overlap_is_students() -> None:
    differences = [0.12, 0.2, -0.08, 0.15, 0.11]
    expected = stats.ttest_1samp(differences, 0)
    found = corrected_t_test(differences, 0.0, confidence=0.9)
    interval = expected.confidence_interval(0.9)
    assert found == pytest.approx((np.mean(differences), interval.low, interval.high, expected.pvalue))


def test_overlap_widens_as_nadeau_and_bengio_say() -> None:
    differences = [0.12, 0.2, -0.08, 0.15, 0.11]
    plain, corrected = corrected_t_test(differences, 0.0), corrected_t_test(differences, 0.25)
    # (1/5 + 1/4) over 1/5: the standard error grows by the root of 2.25
    assert corrected.high - corrected.low == pytest.approx(1.5 * (plain.high - plain.low))
    t = np.mean(differences) / (np.std(differences, ddof=1) * np.sqrt(0.45))
    assert corrected.p == pytest.approx(2 * stats.t.sf(abs(t), 4))
    assert corrected_t_test([0.0, 0.0], 0.25).p == 1.0
    assert corrected_t_test([0.1, 0.1], 0.25).p == 0.0


def test_folds_of_one_cohort_reject_too_often_without_the_correction() -> None:
    # two learners that guess from the training part: equally good, but all folds of a cohort share what it teaches
    rejected = np.zeros(2)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(2, 40))
        folds = rng.permutation(40) % 5
        differences = []
        for fold in range(5):
            train, test = folds != fold, folds == fold
            errors = [np.abs(values[1, test] - one[train].mean()).mean() for one in values]
            differences.append(errors[0] - errors[1] + rng.normal() * 0.01)
        rejected += [corrected_t_test(differences, share).p < 0.05 for share in (0.0, 0.25)]
    assert rejected[1] < rejected[0]


@pytest.mark.parametrize(("differences", "share"), [([0.1], 0.2), ([0.1, np.nan], 0.2), ([0.1, 0.2], -1.0)])
def test_a_t_test_needs_two_finite_differences(differences: list[float], share: float) -> None:
    with pytest.raises(EvaluationError, match="one difference per test fold"):
        corrected_t_test(differences, share)
