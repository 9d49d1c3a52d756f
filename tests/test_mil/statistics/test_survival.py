"""Concordance, survival curves and the log-rank test, against definitions and other libraries."""

import numpy as np
import pytest
from scipy import stats

from mil.errors import EvaluationError
from mil.statistics.bootstrap import Resampling
from mil.statistics.survival import by_patient, concordance, evaluate_survival, high_risk, kaplan_meier


def _draw(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """With ties in times and risks."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 12, n).astype(float), rng.random(n) < 0.6, rng.integers(0, 6, n).astype(float)


def _by_pairs(times, events, risks, weights, groups=None) -> float:
    """The definition, pair by pair."""
    right = known = 0.0
    for i in range(len(times)):
        for j in range(len(times)):
            sooner = times[i] < times[j] or (times[i] == times[j] and not events[j])
            if i == j or not events[i] or not sooner or (groups is not None and groups[i] != groups[j]):
                continue
            known += weights[i] * weights[j]
            right += weights[i] * weights[j] * ((risks[i] > risks[j]) + 0.5 * (risks[i] == risks[j]))
    return right / known


@pytest.mark.parametrize("seed", range(4))
def test_concordance_is_that_of_its_definition(seed, monkeypatch):
    times, events, risks = _draw(seed)
    groups = [str(at % 3) for at in range(len(times))]
    weights = np.random.default_rng(seed).integers(0, 3, (5, len(times))).astype(float)
    monkeypatch.setattr("mil.statistics.survival.ROWS_AT_ONCE", 7)
    for chosen in (None, groups):
        found = concordance(times, events, risks, weights, chosen)
        expected = [_by_pairs(times, events, risks, each, chosen) for each in weights]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_perfect_opposite_and_undefined_ranks():
    times, events = np.arange(1.0, 6.0), np.ones(5, dtype=bool)
    assert concordance(times, events, -times) == 1
    assert concordance(times, events, times) == 0
    assert concordance(times, events, np.zeros(5)) == 0.5
    assert np.isnan(concordance(times, np.zeros(5, dtype=bool), times))


@pytest.mark.parametrize("seed", range(3))
def test_the_survival_curve_is_that_of_scipy(seed):
    times, events, _ = _draw(seed)
    censored = stats.CensoredData(uncensored=times[events], right=times[~events])
    curve, expected = kaplan_meier(times, events), stats.ecdf(censored).sf
    died = np.unique(times[events])
    np.testing.assert_allclose(curve.times[1:], died)
    np.testing.assert_allclose(curve.alive[1:], expected.evaluate(died), rtol=1e-12)
    np.testing.assert_array_equal(curve.at_risk[1:], (times >= died[:, None]).sum(axis=1))


def test_a_patient_counts_once_with_the_mean_risk_of_the_slides():
    values = np.array([[5, 1], [5, 1], [3, 1], [9, 0]], dtype=float)
    patients = by_patient(values, np.array([1.0, 3.0, 4.0, 0.0]), ["b", "b", "a", "c"], [0, 0, 1, 1])
    assert patients.ids == ["a", "b", "c"]
    assert patients.risks.tolist() == [4, 2, 0]
    assert patients.times.tolist() == [3, 5, 9]
    assert patients.groups == ["1", "0", "1"]
    apart = by_patient(values, np.array([1.0, 3.0, 4.0, 0.0]), ["b", "b", "a", "c"], [0, 1, 1, 1])
    assert list(zip(apart.ids, apart.groups, apart.risks.tolist(), strict=True)) == [
        ("a", "1", 4.0),
        ("b", "0", 1.0),
        ("b", "1", 3.0),
        ("c", "1", 0.0),
    ]
    assert high_risk(patients).tolist() == [True, False, False]
    twice = evaluate_survival(values, [1, 3, 4, 0], ["b", "b", "a", "c"], resampling=Resampling(50))
    assert twice["concordance"]["value"] == 1
    assert (twice["n_slides"], twice["n_patients"], twice["n_events"]) == (4, 3, 2)


def test_intervals_hold_the_value_and_few_events_are_told():
    times, events, risks = _draw(0)
    values = np.stack([times, events], axis=1)
    found = evaluate_survival(values, risks, [str(at) for at in range(len(times))], resampling=Resampling(300))
    assert found["concordance"]["low"] < found["concordance"]["value"] < found["concordance"]["high"]
    assert found["warnings"] == []
    few = evaluate_survival(values[:8], risks[:8], [str(at) for at in range(8)], resampling=Resampling(50))
    assert "patient(s) have the event: the interval is too narrow" in few["warnings"][0]
    once = np.stack([times, np.arange(len(times)) == 3], axis=1)
    one = evaluate_survival(once, risks, [str(at) for at in range(len(times))], resampling=Resampling(50))
    assert one["concordance"]["low"] is None
    assert one["warnings"] == ["1 patient(s) have the event: no interval is given"]


def test_risks_that_are_not_finite_are_refused():
    with pytest.raises(EvaluationError, match="finite"):
        evaluate_survival([[1, 1], [2, 0]], [np.nan, 1], ["a", "b"])
