"""Targets that are no single class: how tables are read, what is refused, and the strata that splits keep even."""

from pathlib import Path

import numpy as np
import pytest

from mil.cohort.joining import join_store
from mil.cohort.reading import read_cohort
from mil.cohort.targets import find_strata
from mil.errors import CohortError
from mil.splits.folds import make_splits


def _table(tmp_path: Path, header: str, rows: list[str]) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text("\n".join([f"slide_id,patient_id,{header}", *rows]) + "\n", encoding="utf-8")
    return path


def _rows(cells: list[str]) -> list[str]:
    """One slide per patient with these cells."""
    return [f"s{at:02d},p{at:02d},{cell}" for at, cell in enumerate(cells)]


def test_numbers_are_read_and_rows_without_one_are_counted(tmp_path):
    cells = ["1.5", "-2", "3e1", "", "NA", "0.25", "7", "8"]
    cohort = read_cohort(_table(tmp_path, "ki67", _rows(cells)), "ki67", task="regression")
    np.testing.assert_array_equal(cohort.values, [[1.5], [-2], [30], [0.25], [7], [8]])
    np.testing.assert_array_equal(cohort.targets, cohort.values)
    assert cohort.attrition.no_label == ("s03",)
    assert cohort.attrition.missing_label == ("s04",)
    assert (cohort.task, cohort.columns) == ("regression", ("ki67",))


def test_several_labels_keep_what_is_unknown(tmp_path):
    cells = ["1,0", "0,yes", "positive,", "0,NA", ",", "Negative,pos", "true,0", "0,FALSE"]
    cohort = read_cohort(_table(tmp_path, "er,her2", _rows(cells)), "er, her2", task="multilabel")
    nan = np.nan
    expected = [[1, 0], [0, 1], [1, nan], [0, nan], [0, 1], [1, 0], [0, 0]]
    np.testing.assert_array_equal(cohort.values, expected)
    assert cohort.attrition.no_label == ("s04",)
    assert cohort.target == "er,her2"


def test_survival_reads_cbioportals_status(tmp_path):
    cells = ["10,1:DECEASED", "20.5,0:LIVING", "3,dead", "4,alive", "5,1", "6,0"]
    cohort = read_cohort(_table(tmp_path, "months,status", _rows(cells)), "months,status", task="survival")
    np.testing.assert_array_equal(cohort.values[:, 1], [1, 0, 1, 0, 1, 0])
    assert set(cohort.class_names) == {"status, early", "no status"}  # the only late death joined the others


@pytest.mark.parametrize(
    ("task", "header", "cell", "message"),
    [
        ("regression", "ki67", "high", r"slide s00 \(row 2\).*expected a number"),
        ("regression", "ki67", '"3,5"', "a point before decimals"),
        ("regression", "ki67", "inf", "expected a number"),
        ("multilabel", "er", "2", "expected 0 or 1"),
        ("multilabel", "er", "maybe", "expected 0 or 1"),
        ("multilabel", "er", "-", "expected 0 or 1"),
        ("multilabel", "er", "yes:maybe", "expected 0 or 1"),
        ("regression", "ki67", "1_000", "expected a number"),
        ("survival", "months,died", "-1,1", "a time of 0 or more"),
        ("survival", "months,died", "5,5", "expected 0 or 1"),
    ],
)
def test_a_cell_that_is_no_such_value_is_named(tmp_path, task, header, cell, message):
    good = {"regression": ["1", "2", "3"], "multilabel": ["1", "1", "0", "0"], "survival": ["1,1", "2,1", "3,0", "4,0"]}
    with pytest.raises(CohortError, match=message):
        read_cohort(_table(tmp_path, header, _rows([cell, *good[task]])), header, task=task)


@pytest.mark.parametrize(
    ("task", "target", "message"),
    [
        ("survival", "months", "two columns"),
        ("survival", "months,died,more", "two columns"),
        ("multilabel", "months,months", "one or more columns"),
        ("regression", "months,", "one or more columns"),
        ("regression", "mouths", "months"),
        ("regresion", "months", "expected one of"),
    ],
)
def test_a_target_that_names_no_such_columns_is_refused(tmp_path, task, target, message):
    path = _table(tmp_path, "months,died", _rows(["1,1", "2,1", "3,0", "4,0"]))
    with pytest.raises(CohortError, match=message):
        read_cohort(path, target, task=task)


@pytest.mark.parametrize(
    ("task", "header", "cells", "message"),
    [
        ("regression", "ki67", ["5", "5", "5", "5"], "the same number"),
        ("multilabel", "er", ["1", "0", "0", "0"], r"1 patient\(s\) that have label 'er'"),
        ("multilabel", "er,pr", ["1,1", "1,1", "0,1", "0,1"], r"0 patient\(s\) that lack label 'pr'"),
        ("survival", "months,died", ["1,1", "2,0", "3,0", "4,0"], r"1 patient\(s\) with an event"),
    ],
)
def test_targets_that_nothing_can_be_learned_from_are_refused(tmp_path, task, header, cells, message):
    path = _table(tmp_path, header, _rows(cells))
    with pytest.raises(CohortError, match=message):
        read_cohort(path, header, task=task)
    assert len(read_cohort(path, header, task=task, for_training=False)) == 4


def test_a_patient_dies_once(tmp_path):
    rows = ["a,p0,5,1", "b,p0,6,1", "c,p1,3,1", "d,p2,4,0"]
    with pytest.raises(CohortError, match="patient 'p0' with 2 different pairs"):
        read_cohort(_table(tmp_path, "months,died", rows), "months,died", task="survival")


@pytest.mark.parametrize("seed", range(5))
def test_folds_spread_numbers_evenly(tmp_path, seed):
    values = np.random.default_rng(seed).gamma(1.0, size=60)
    cohort = read_cohort(_table(tmp_path, "x", _rows([f"{v}" for v in values])), "x", task="regression")
    assert np.bincount(cohort.labels).tolist() == [15, 15, 15, 15]
    splits = make_splits(cohort, folds=5)
    for test in splits.test:
        assert np.bincount(cohort.labels[test], minlength=4).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("values", [[0.0] * 18 + [1.0, 2.0], [2.0] * 18 + [0.0, 1.0], [0.0] * 10 + [1.0] * 10])
def test_ties_leave_two_strata_or_more(values):
    labels, names = find_strata("regression", ["x"], np.array(values)[:, None], [f"p{at}" for at in range(20)])
    assert len(names) >= 2
    assert np.bincount(labels).min() >= 2


def test_the_rarest_label_decides_the_stratum():
    values = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [1, np.nan], [0, 0], [0, 0]])
    labels, names = find_strata("multilabel", ["common", "rare"], values, list("abcdefg"))
    assert [names[at] for at in labels] == ["rare"] * 2 + ["common"] * 3 + ["none of them"] * 2


def test_strata_follow_what_the_store_holds(tmp_path):
    cohort = read_cohort(_table(tmp_path, "x", _rows([str(at) for at in range(16)])), "x", task="regression")
    joined = join_store(cohort, [f"s{at:02d}" for at in range(8)])
    assert np.bincount(joined.labels).tolist() == [2, 2, 2, 2]
    np.testing.assert_array_equal(joined.values[:, 0], range(8))
    assert joined.digest() != cohort.digest()
    assert joined.digest() == joined.subset(range(7, -1, -1)).digest()
