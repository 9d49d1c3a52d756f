"""Resamples keep patients and strata together, and intervals are SciPy's on the same resamples."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from mil.errors import EvaluationError
from mil.statistics.bootstrap import (
    Resampling,
    Spread,
    bca_interval,
    patient_bootstrap,
    patient_jackknife,
    patient_strata,
    percentile_interval,
)


def skewed(n: int = 40, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    return np.random.default_rng(seed).lognormal(size=n), [f"p{at:03d}" for at in range(n)]


def mean_and_spread(values: np.ndarray):
    """A statistic with a skewed distribution: the weighted variance."""

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        total = weights.sum(axis=1)
        mean = weights @ values / total
        return {"variance": weights @ values**2 / total - mean**2}

    return statistic


def weights_of(drawn: np.ndarray, n: int) -> np.ndarray:
    return np.bincount(drawn.astype(int), minlength=n)[None].astype(float)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_bca_is_scipys_on_the_same_resamples(confidence):
    values, ids = skewed()
    statistic = mean_and_spread(values)
    resampled = patient_bootstrap(statistic, ids, 999)["variance"]
    expected = stats.bootstrap(
        (np.arange(40),),
        lambda drawn: statistic(weights_of(drawn, 40))["variance"][0],
        vectorized=False,
        n_resamples=0,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=resampled),
        confidence_level=confidence,
        method="BCa",
    ).confidence_interval
    found = Spread.of(statistic, ids, Resampling(999, confidence=confidence, interval="bca")).entry("variance")
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-9)
    plain = percentile_interval(resampled, confidence)
    assert found["low"] > plain[0]
    assert found["high"] > plain[1] * 1.05


def test_bca_by_strata_is_scipys_of_several_samples():
    values, ids = skewed(30)
    labels = np.repeat([0, 1], [12, 18])
    statistic = mean_and_spread(values)
    spread = Spread.of(statistic, ids, Resampling(800, interval="bca", stratified=True), labels)
    expected = stats.bootstrap(
        (np.arange(12), np.arange(12, 30)),
        lambda first, second: statistic(weights_of(np.r_[first, second], 30))["variance"][0],
        vectorized=False,
        n_resamples=0,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=spread.resampled["variance"]),
        method="BCa",
    ).confidence_interval
    entry = spread.entry("variance")
    assert (entry["low"], entry["high"]) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_bca_covers_a_skewed_truth_better_than_the_percentile_interval():
    truth, missed = np.exp(0.5), np.zeros(2)
    for seed in range(300):
        values, ids = skewed(25, seed)
        for at, interval in enumerate(("percentile", "bca")):
            spread = Spread.of(
                lambda w, v=values: {"mean": w @ v / w.sum(axis=1)}, ids, Resampling(400, interval=interval)
            )
            entry = spread.entry("mean")
            missed[at] += not entry["low"] <= truth <= entry["high"]
    assert missed[1] < missed[0]
    assert missed[1] / 300 < 0.16


def test_bca_without_variation_or_without_bias_to_be_told():
    ids = [f"p{at}" for at in range(5)]
    constant = Spread.of(lambda w: {"x": np.ones(len(w))}, ids, Resampling(50, interval="bca"))
    assert constant.entry("x") == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert bca_interval(np.array([1.0, 2.0]), 3.0, np.arange(5.0)) is None
    assert bca_interval(np.array([np.nan]), 3.0, np.arange(5.0)) is None
    with_hole = np.array([1.0, np.nan, 2.0, 3.0, 2.5])
    assert bca_interval(np.arange(9.0), 4.0, with_hole) == bca_interval(np.arange(9.0), 4.0, with_hole[[0, 2, 3, 4]])


def test_the_jackknife_leaves_out_whole_patients(monkeypatch):
    left_out = patient_jackknife(lambda w: {"w": w}, ["b", "a", "b", "c"])["w"]
    np.testing.assert_array_equal(left_out, [[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]])
    monkeypatch.setattr("mil.statistics.bootstrap.WEIGHTS_AT_ONCE", 5)
    np.testing.assert_array_equal(patient_jackknife(lambda w: {"w": w}, ["b", "a", "b", "c"])["w"], left_out)


def test_strata_are_patients_of_the_same_classes():
    ids = ["c", "a", "b", "d", "b", "a", "e"]
    labels = [0, 0, 0, 1, 2, 2, 0]
    # a and b have slides of 0 and 2, c and e of 0, d of 1; positions are those of the sorted ids
    strata = {tuple(members.tolist()) for members in patient_strata(ids, labels)}
    assert strata == {(0, 1), (2, 4), (3,)}
    assert [members.tolist() for members in patient_strata(ids)] == [[0, 1, 2, 3, 4]]


def test_stratified_draws_keep_the_size_of_every_stratum(monkeypatch):
    ids = [f"p{at // 2}" for at in range(40)]
    labels = np.repeat([0, 1, 2], [20, 14, 6])
    drawn = patient_bootstrap(lambda w: {"w": w}, ids, 300, seed=1, stratify=labels)["w"]
    for label in range(3):
        np.testing.assert_array_equal(drawn[:, labels == label].sum(axis=1), (labels == label).sum())
    np.testing.assert_array_equal(drawn[:, ::2], drawn[:, 1::2])
    assert drawn.max() > 2
    first, second = drawn[:, labels == 0].var(), drawn[:, labels == 1].var()
    assert first == pytest.approx(1 - 1 / 10, abs=0.1)
    assert second == pytest.approx(1 - 1 / 7, abs=0.1)
    monkeypatch.setattr("mil.statistics.bootstrap.WEIGHTS_AT_ONCE", 40 * 7)
    np.testing.assert_array_equal(patient_bootstrap(lambda w: {"w": w}, ids, 300, 1, labels)["w"], drawn)


def test_one_stratum_is_no_strata():
    ids = [f"p{at}" for at in range(9)]
    drawn = [patient_bootstrap(lambda w: {"w": w}, ids, 50, 2, strata)["w"] for strata in (None, np.zeros(9, int))]
    np.testing.assert_array_equal(*drawn)


def test_an_unknown_interval_is_refused():
    with pytest.raises(EvaluationError, match=r"'bac'.*did you mean 'bca'"):
        Spread.of(lambda w: {"x": w.sum(axis=1)}, ["a", "b"], Resampling(5, interval="bac"))


def test_a_spread_is_made_as_its_resampling_says():
    values, patients = skewed()
    labels = (np.arange(40) % 2).astype(np.int64)
    for how in (Resampling(50, 1, 0.8, "bca"), Resampling(50, 1, 0.8, stratified=True)):
        statistic, strata = mean_and_spread(values), labels if how.stratified else None
        found = Spread.of(statistic, patients, how, labels)
        drawn = patient_bootstrap(statistic, patients, 50, 1, strata)["variance"]
        np.testing.assert_array_equal(found.resampled["variance"], drawn)
        value, left_out = found.value["variance"], patient_jackknife(statistic, patients)["variance"]
        bca = bca_interval(drawn, float(value), left_out, 0.8, patient_strata(patients, strata))
        entry = found.entry("variance")
        expected = bca if how.interval == "bca" else percentile_interval(drawn, 0.8)
        assert (entry["low"], entry["high"]) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"replicates": 0}, "replicates=0"), ({"confidence": 95}, "confidence=95"), ({"interval": "bcs"}, "did you mean")],
)
def test_an_impossible_resampling_is_refused(settings, message):
    with pytest.raises(EvaluationError, match=message):
        Resampling(**settings)
