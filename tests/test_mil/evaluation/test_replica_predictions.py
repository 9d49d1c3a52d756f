"""Replicas of runs are averaged over what all of them have; members of an ensemble are put into one order first."""

from dataclasses import replace

import numpy as np
import pytest

from mil.errors import RunError
from mil.evaluation.alignment import join_runs
from mil.evaluation.averaging import combine, mean_where
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.training.replica import Replica
from tests.test_mil.small import fast_config, make_cohort

COHORT = make_cohort(6, 1)
CONFIG = fast_config()
PARTS = np.array([["test", "test", "validation", "train", "train", "train"]])


def predicted(parts: np.ndarray, seed: int, folds: tuple[int, ...] | None = None) -> ReplicaPredictions:
    values = np.random.default_rng(seed).dirichlet(np.ones(2), parts.shape)
    replicas = tuple(Replica(fold, 0, CONFIG) for fold in folds or range(len(parts)))
    return ReplicaPredictions(COHORT, replicas, parts, values)


def turned(member: ReplicaPredictions) -> ReplicaPredictions:
    """The same with slides and classes the other way round, and one slide less."""
    names = COHORT.class_names[::-1]
    cohort = replace(COHORT.subset(range(4, -1, -1)), class_names=names)
    cohort = replace(cohort, labels=1 - cohort.labels)
    return ReplicaPredictions(cohort, member.replicas, member.parts[:, 4::-1], member.values[:, 4::-1][:, :, ::-1])


def test_slides_and_classes_come_into_the_order_of_the_first() -> None:
    one, other = predicted(PARTS, 0), predicted(PARTS, 1)
    found = join_runs([one, turned(other)], "probabilities")
    assert found.cohort.slide_ids == COHORT.slide_ids[:5]
    np.testing.assert_array_equal(found.split()[1].values, other.values[:, :5])
    np.testing.assert_array_equal(found.split()[1].parts, other.parts[:, :5])
    np.testing.assert_array_equal(found.split()[1].cohort.labels, COHORT.labels[:5])
    cohort, values = found.tested()
    np.testing.assert_allclose(values, combine([one.values[0, :2], other.values[0, :2]]))
    assert (cohort.labels.tolist(), cohort.patient_ids) == ([0, 1], ("p0", "p1"))
    assert cohort.class_names == COHORT.class_names


def test_a_run_alone_says_its_own_mean() -> None:
    run = predicted(np.concatenate([PARTS, PARTS[:, ::-1]]), 0)
    _, values = join_runs([run], "probabilities").tested()
    np.testing.assert_array_equal(values, run.out_of_fold()[[0, 1, 4, 5]])


def test_what_one_member_has_not_validated_is_left_out() -> None:
    other = PARTS.copy()
    other[0, 3] = "validation"
    members = join_runs([predicted(other, 0), predicted(PARTS, 1)], "probabilities")
    assert members.mean_over("validation")[0].tolist() == [2]
    assert members.held("validation") == 2
    with pytest.raises(RunError, match="without validation slides in fold 7"):
        members.mean_over("validation", 7)


def test_folds_are_shared_where_each_tests_the_same_slides() -> None:
    parts = np.concatenate([PARTS, PARTS[:, ::-1]])
    one = predicted(parts, 0)
    for other, shared in (
        (predicted(parts, 1), True),
        (predicted(parts[[0, 1, 1]], 1, (0, 1, 1)), True),
        (predicted(parts[::-1], 1), False),
        (predicted(parts[[0, 1, 1]], 1), False),
    ):
        assert join_runs([one, other], "probabilities").share_folds() == shared


def test_members_of_other_labels_are_refused() -> None:
    other = replace(predicted(PARTS, 1), cohort=replace(COHORT, labels=COHORT.labels[[0, 1, 2, 3, 4, 4]]))
    with pytest.raises(RunError, match="'slide 05'"):
        join_runs([predicted(PARTS, 0), other], "probabilities")


def test_the_mean_is_over_the_replicas_that_held_a_slide() -> None:
    values = np.random.default_rng(0).random((3, 2, 4))
    held = np.array([[True, False], [True, False], [False, False]])
    mean = mean_where(values, held)
    np.testing.assert_array_equal(mean[0], (values[0, 0] + values[1, 0]) / 2)
    assert np.isnan(mean[1]).all()


def test_slides_that_no_replica_tested_have_no_prediction() -> None:
    run = predicted(PARTS, 0)
    assert np.isnan(run.out_of_fold()).all(axis=1).tolist() == [False, False, True, True, True, True]
    np.testing.assert_array_equal(run.out_of_fold()[:2], run.values[0, :2])


def test_a_run_is_an_ensemble_of_itself() -> None:
    run = predicted(np.concatenate([PARTS, PARTS, PARTS[:, ::-1]]), 0)
    joined = join_runs([run], "probabilities")
    assert (run.members, joined.members) == ((), (0, 0, 0))
    np.testing.assert_array_equal(joined.out_of_fold(), run.out_of_fold())
    assert joined.folds.tolist() == run.folds.tolist()
    np.testing.assert_array_equal(run.probabilities, run.values)


def test_members_weigh_the_same_however_many_replicas_they_have() -> None:
    small, large = predicted(PARTS, 0), predicted(np.repeat(PARTS, 5, axis=0), 1)
    both = join_runs([small, large], "probabilities")
    assert [len(member.replicas) for member in both.split()] == [1, 5]
    expected = combine([small.out_of_fold()[:2], large.out_of_fold()[:2]])
    np.testing.assert_array_equal(both.tested()[1], expected)
    np.testing.assert_array_equal(both.split()[1].values, large.values)


def test_some_replicas_are_a_run() -> None:
    run = predicted(np.concatenate([PARTS, PARTS[:, ::-1]]), 0)
    last = run.subset(np.array([False, True]))
    assert (last.replicas, last.folds.tolist()) == (run.replicas[1:], [1])
    assert np.flatnonzero(last.tests(1)).tolist() == [4, 5]
    np.testing.assert_array_equal(last.tested()[1], run.values[1, 4:])


def test_replicas_that_tested_nothing_are_refused() -> None:
    with pytest.raises(RunError, match=r"without test slides .* expected some to score → train again"):
        predicted(np.full((1, 6), "train"), 0).out_of_fold()
