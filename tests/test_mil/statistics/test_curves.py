"""Curves, against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics as reference

from mil.statistics.curves import GRID, precision_recall_curve, roc_curve
from mil.statistics.metrics import auroc


def _slides(n: int = 80, seed: int = 0, digits: int = 1) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels, scores with ties, and patients of two slides each."""
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    return positive, np.round(rng.normal(positive * 1.0), digits), [f"p{at // 2}" for at in range(n)]


@pytest.mark.parametrize("digits", [0, 1, 9])
def test_roc_is_scikit_learns(digits: int) -> None:
    positive, scores, patients = _slides(digits=digits)
    curve = roc_curve(positive, scores, patients)
    x, y, _ = reference.roc_curve(positive, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.x, x)
    np.testing.assert_allclose(curve.y, y)
    area = auroc(positive.astype(np.int64), np.stack([-scores, scores], axis=1))[0]
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(area)


@pytest.mark.parametrize("digits", [0, 1, 9])
def test_precision_and_recall_are_scikit_learns(digits: int) -> None:
    positive, scores, patients = _slides(digits=digits)
    curve = precision_recall_curve(positive, scores, patients)
    precision, recall, _ = reference.precision_recall_curve(positive, scores)
    np.testing.assert_allclose(curve.x, recall[:-1][::-1])
    np.testing.assert_allclose(curve.y, precision[:-1][::-1])


@pytest.mark.parametrize("make", [roc_curve, precision_recall_curve])
def test_bands_hold_the_curve_and_narrow_with_more_patients(make) -> None:
    few, many = (make(*_slides(n, digits=9)) for n in (40, 1000))
    width = [float(np.mean(curve.high - curve.low)) for curve in (few, many)]
    assert width[1] < width[0] / 2
    inside = np.interp(GRID, many.x, many.y)
    middle = slice(10, 91)
    assert (many.low[middle] - 0.02 <= inside[middle]).all()
    assert (inside[middle] <= many.high[middle] + 0.02).all()


def test_resampling_whole_patients_widens_the_band() -> None:
    positive, scores, _ = _slides(60, digits=9)
    # every patient twice as many slides, all alike
    doubled = [np.repeat(each, 4) for each in (positive, scores)]
    alone = roc_curve(*doubled, [f"s{at}" for at in range(240)])
    grouped = roc_curve(*doubled, [f"p{at // 4}" for at in range(240)])
    assert np.mean(grouped.high - grouped.low) > 1.5 * np.mean(alone.high - alone.low)


def test_bands_do_not_depend_on_the_order_of_the_slides() -> None:
    positive, scores, patients = _slides()
    order = np.random.default_rng(1).permutation(len(positive))
    one = roc_curve(positive, scores, patients)
    other = roc_curve(positive[order], scores[order], [patients[at] for at in order])
    np.testing.assert_allclose(one.low, other.low)


def test_one_patient_on_a_side_leaves_gaps_but_no_error() -> None:
    curve = roc_curve([True, False], [0.9, 0.1], ["a", "b"])
    assert curve.y.tolist() == [0, 1, 1]
    assert curve.low.shape == GRID.shape
