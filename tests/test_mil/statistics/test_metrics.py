"""Metrics agree with scikit-learn, weights and ties included, and are NaN exactly where nothing can be said."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mil.statistics import metrics


@st.composite
def problems(draw):
    """Labels [n], probabilities [n, C] with many ties, integer weights [B, n]; classes may be absent."""
    n_classes = draw(st.integers(2, 4))
    n = draw(st.integers(1, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = draw(st.sampled_from([2, 4, 1000]))
    labels = rng.integers(0, n_classes, n)
    scores = rng.integers(0, steps, (n, n_classes)) / steps
    weights = rng.integers(0, 4, (3, n)).astype(float)
    weights[0] = 1.0
    return labels, scores, weights


def sk_auroc(positive, scores, weights):
    held = weights > 0
    if len(np.unique(positive[held])) < 2:
        return np.nan
    return sk.roc_auc_score(positive[held], scores[held], sample_weight=weights[held])


@settings(max_examples=60, deadline=None)
@given(problems())
def test_everything_agrees_with_scikit_learn(problem):
    labels, scores, weights = problem
    n_classes = scores.shape[1]
    predicted = scores.argmax(axis=1)
    matrix = metrics.confusion(labels, predicted, n_classes, weights)
    counts = metrics.one_vs_all(matrix)
    areas = metrics.class_auroc(labels, scores, weights)
    for at, weight in enumerate(weights):
        if weight.sum() == 0:
            assert np.isnan(metrics.accuracy(matrix)[at])
            continue
        args = {"sample_weight": weight, "labels": range(n_classes)}
        np.testing.assert_allclose(matrix[at], sk.confusion_matrix(labels, predicted, **args))
        table = sk.multilabel_confusion_matrix(labels, predicted, **args)
        np.testing.assert_allclose(
            np.stack([counts.tn[at], counts.fp[at], counts.fn[at], counts.tp[at]], axis=1), table.reshape(-1, 4)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            precision, recall, f1, _ = sk.precision_recall_fscore_support(
                labels, predicted, zero_division=np.nan, **args
            )
            macro = sk.f1_score(labels, predicted, average="macro", zero_division=np.nan, **args)
            balanced = np.nanmean(recall)
        np.testing.assert_allclose(metrics.precision(counts)[at], precision)
        np.testing.assert_allclose(metrics.recall(counts)[at], recall)
        np.testing.assert_allclose(metrics.f1(counts)[at], f1)
        np.testing.assert_allclose(metrics.macro_f1(matrix)[at], macro)
        np.testing.assert_allclose(metrics.balanced_accuracy(matrix)[at], balanced)
        np.testing.assert_allclose(
            metrics.accuracy(matrix)[at], sk.accuracy_score(labels, predicted, sample_weight=weight)
        )
        expected = [sk_auroc(labels == index, scores[:, index], weight) for index in range(n_classes)]
        np.testing.assert_allclose(areas[at], expected, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_weights_are_repetitions(problem):
    labels, scores, weights = problem
    times = weights[1].astype(int)
    if times.sum() == 0:
        return
    repeated = (np.repeat(labels, times), np.repeat(scores, times, axis=0))
    np.testing.assert_allclose(metrics.class_auroc(labels, scores, weights)[1], metrics.class_auroc(*repeated)[0])
    n_classes = scores.shape[1]
    np.testing.assert_allclose(
        metrics.confusion(labels, scores.argmax(1), n_classes, weights)[1],
        metrics.confusion(repeated[0], repeated[1].argmax(1), n_classes)[0],
    )


def test_auroc_is_that_of_the_positive_class_or_a_mean():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 40), rng.random((40, 2))
    assert metrics.auroc(labels, scores)[0] == pytest.approx(sk.roc_auc_score(labels, scores[:, 1]))
    labels, scores = rng.integers(0, 4, 60), rng.dirichlet(np.ones(4), 60)
    expected = sk.roc_auc_score(labels, scores, multi_class="ovr", average="macro")
    assert metrics.auroc(labels, scores)[0] == pytest.approx(expected)


def test_auroc_mean_leaves_out_classes_without_slides():
    labels = np.array([0, 0, 2, 2])
    scores = np.array([[0.9, 0, 0.1], [0.8, 0, 0.2], [0.7, 0, 0.3], [0.85, 0, 0.15]])
    areas = metrics.class_auroc(labels, scores)[0]
    assert np.isnan(areas[1])
    assert metrics.auroc(labels, scores)[0] == pytest.approx((areas[0] + areas[2]) / 2)


def test_all_ties_are_worth_one_half():
    assert metrics.class_auroc(np.array([0, 1, 1]), np.full((3, 2), 0.5)).tolist() == [[0.5, 0.5]]


def test_binary_macro_f1_is_over_both_classes():
    matrix = metrics.confusion(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), 2)
    assert metrics.macro_f1(matrix)[0] == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_undefined_values_are_nan():
    matrix = metrics.confusion(np.array([0, 0]), np.array([0, 1]), 3)
    counts = metrics.one_vs_all(matrix)
    assert np.isnan(metrics.recall(counts)[0]).tolist() == [False, True, True]
    assert np.isnan(metrics.precision(counts)[0]).tolist() == [False, False, True]
    assert np.isnan(metrics.f1(counts)[0]).tolist() == [False, False, True]
    assert np.isnan(metrics.auroc(np.array([1, 1]), np.array([[0.1, 0.9], [0.2, 0.8]]))).all()
    nothing = metrics.confusion(np.array([0, 1]), np.array([0, 1]), 2, np.zeros((1, 2)))
    for metric in (metrics.macro_f1, metrics.balanced_accuracy, metrics.accuracy):
        assert np.isnan(metric(nothing)).all()
