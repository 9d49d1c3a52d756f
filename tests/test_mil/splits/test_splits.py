"""Splits: the promises hold for every fold and seed of any cohort, or there is no split."""

import re
from collections import defaultdict
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil.cohort.cohort import Attrition, Cohort
from mil.cohort.reading import read_cohort
from mil.errors import SplitError
from mil.splits.folds import inner_splits, make_splits
from mil.splits.record import USED_TEST_FOR_CHOICE
from mil.splits.splits import PARTS, Splits
from mil.splits.tables import read_splits, split_rows, write_splits
from mil.splits.verification import verify_splits


def make_cohort(rows: list[tuple[str, str]]) -> Cohort:
    """A cohort of (patient, class) slides."""
    names = tuple(sorted({label for _, label in rows}))
    return Cohort(
        slide_ids=tuple(f"s{at:04d}" for at in range(len(rows))),
        patient_ids=tuple(patient for patient, _ in rows),
        labels=np.array([names.index(label) for _, label in rows], dtype=np.int64),
        class_names=names,
        target="y",
        attrition=Attrition(len(rows), len(rows)),
    )


def assert_honest(splits: Splits, cohort: Cohort) -> None:
    """Checked here from the slides up, with none of the code under test."""
    tested: dict[str, int] = defaultdict(int)
    for fold in range(splits.n_folds):
        for seed in splits.seeds:
            parts = splits.parts(fold, seed).tolist()
            where: dict[str, set[str]] = defaultdict(set)
            for patient, part in zip(cohort.patient_ids, parts, strict=True):
                where[patient].add(part)
            assert all(len(each) == 1 for each in where.values()), "a patient in two parts"
            assert set(parts) == set(PARTS), "an empty part"
            trained = {label for label, part in zip(cohort.labels.tolist(), parts, strict=True) if part == "train"}
            assert trained == set(range(len(cohort.class_names))), "a class without training slides"
            for slide_id, part in zip(cohort.slide_ids, parts, strict=True):
                tested[slide_id] += part == "test"
    assert set(tested.values()) == {len(splits.seeds)}, "a slide not tested exactly once per seed"


@st.composite
def cohorts(draw) -> Cohort:
    """Few patients, unequal and mixed, every class in two of them or more: where splitting is hard."""
    n_classes = draw(st.integers(2, 4))
    n_patients = draw(st.integers(4, 14))
    rows = []
    for patient in range(n_patients):
        held = draw(st.lists(st.integers(0, n_classes - 1), min_size=1, max_size=8))
        rows += [(f"p{patient}", f"c{label}") for label in held]
    for label in range(n_classes):
        for patient in draw(st.permutations(range(n_patients)))[:2]:
            rows.append((f"p{patient}", f"c{label}"))
    return make_cohort(draw(st.permutations(rows)))


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.integers(2, 5), st.integers(0, 3))
def test_every_split_is_honest_or_refused(cohort, folds, split_seed):
    try:
        splits = make_splits(cohort, folds, split_seed, seeds=(0, 7))
    except SplitError:
        return  # rightly or not is tested below, against brute force
    assert_honest(splits, cohort)
    for index, name in enumerate(cohort.class_names):
        lacking = [f for f in range(folds) if index not in cohort.labels[splits.test_fold == f]]
        warned = [text for text in splits.warnings if repr(name) in text]
        expected = f"no test slide in fold {', '.join(map(str, lacking))}"
        assert not lacking or any(expected in text for text in warned)


def assignments(n_patients: int, folds: int):
    """Every assignment of patients to folds, by brute force."""
    return (fold_of for fold_of in np.ndindex(*[folds] * n_patients) if len(set(fold_of)) == folds)


def has_honest_split(cohort: Cohort, folds: int) -> bool:
    patients = sorted(set(cohort.patient_ids))
    held = {p: {int(y) for q, y in zip(cohort.patient_ids, cohort.labels, strict=True) if q == p} for p in patients}
    everything = set(range(len(cohort.class_names)))

    def has_room(test: set[str]) -> bool:
        rest = [p for p in patients if p not in test]
        return any(set().union(*(held[p] for p in rest if p != spared)) == everything for spared in rest)

    return any(
        all(has_room({p for p, f in zip(patients, fold_of, strict=True) if f == fold}) for fold in range(folds))
        for fold_of in assignments(len(patients), folds)
    )


@st.composite
def tight_cohorts(draw) -> Cohort:
    """Four to six patients, most classes in exactly two of them."""
    n_patients = draw(st.integers(4, 6))
    pairs = draw(st.lists(st.permutations(range(n_patients)), min_size=2, max_size=5))
    rows = [(f"p{patient}", f"c{label}") for label, order in enumerate(pairs) for patient in order[:2]]
    return make_cohort(rows + [(f"p{patient}", "c0") for patient in range(n_patients)])


@settings(max_examples=60, deadline=None)
@given(tight_cohorts(), st.integers(2, 3))
def test_a_refusal_is_right(cohort, folds):
    try:
        assert_honest(make_splits(cohort, folds), cohort)
    except SplitError:
        assert not has_honest_split(cohort, folds)
    else:
        assert has_honest_split(cohort, folds)


@settings(max_examples=15, deadline=None)
@given(cohorts(), st.randoms())
def test_row_order_does_not_matter(cohort, random):
    order = list(range(len(cohort)))
    random.shuffle(order)
    shuffled = cohort.subset(order)
    try:
        splits = make_splits(cohort, 3)
    except SplitError:
        with pytest.raises(SplitError):
            make_splits(shuffled, 3)
        return
    assert sorted(split_rows(splits, cohort)) == sorted(split_rows(make_splits(shuffled, 3), shuffled))


def large_cohort() -> Cohort:
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b", "c"], 300, p=[0.6, 0.3, 0.1])
    return make_cohort([(f"p{p}", str(y)) for p, y in zip(rng.integers(0, 150, 300), labels, strict=True)])


def test_large_cohorts_split_evenly():
    cohort = large_cohort()
    splits = make_splits(cohort, folds=5, validation_fraction=0.2)
    per_fold = np.array([np.bincount(cohort.labels[splits.test_fold == fold]) for fold in range(5)])
    assert np.ptp(per_fold.sum(axis=1)) <= 6
    assert (np.ptp(per_fold, axis=0) <= 3).all()
    for fold in range(5):
        for seed in splits.seeds:
            validates = splits.parts(fold, seed) == "validation"
            expected = 0.2 * np.bincount(cohort.labels[splits.test_fold != fold])
            np.testing.assert_allclose(np.bincount(cohort.labels[validates]), expected, atol=2.5)
    assert splits.warnings == ()


def test_seeds_decide_what_they_name():
    cohort = large_cohort()
    one, again = make_splits(cohort), make_splits(cohort)
    np.testing.assert_array_equal(one.test_fold, again.test_fold)
    np.testing.assert_array_equal(one.validation, again.validation)
    assert (make_splits(cohort, split_seed=1).test_fold != one.test_fold).any()
    assert (one.parts(0, 0) != one.parts(0, 1)).any()
    assert ((one.parts(0, 0) == "test") == (one.parts(0, 1) == "test")).all()
    # A seed gives the same validation part whichever seeds stand beside it.
    np.testing.assert_array_equal(make_splits(cohort, seeds=(2,)).parts(3, 2), one.parts(3, 2))


@pytest.mark.data
@pytest.mark.parametrize("target", ["grade", "label"])
@pytest.mark.parametrize("split_seed", [0, 1, 2])
def test_glas_splits(data_folder: Path, target, split_seed):
    cohort = read_cohort(data_folder / "glas" / "labels.csv", target)
    splits = make_splits(cohort, folds=5, split_seed=split_seed, seeds=(0, 1, 2))
    assert_honest(splits, cohort)
    sizes = np.bincount(splits.test_fold)
    assert sizes.min() >= 10
    assert sizes.max() <= 32
    for seed in splits.seeds:
        validating = [(splits.parts(fold, seed) == "validation").sum() for fold in range(5)]
        assert min(validating) >= 10
        assert max(validating) <= 32
    if target == "grade":
        (healthy,) = [text for text in splits.warnings if "'healthy'" in text]
        assert "has 2 patients, fewer than the 5 folds: no test slide in fold" in healthy


def test_fewer_slides_than_folds_in_every_class():
    # scikit-learn has no proposal here.
    cohort = make_cohort([(f"p{at}", label) for at, label in enumerate("aabbccdd")])
    assert_honest(make_splits(cohort, folds=4), cohort)


def test_the_search_alone_is_honest_and_even(monkeypatch):
    monkeypatch.setattr("mil.splits.folds.FOLD_DRAWS", 0)
    cohort = large_cohort()
    splits = make_splits(cohort)
    assert_honest(splits, cohort)
    assert np.ptp(np.bincount(splits.test_fold)) <= 6
    assert (make_splits(cohort, split_seed=1).test_fold != splits.test_fold).any()


@pytest.mark.parametrize(
    ("rows", "folds", "message"),
    [
        ([("p1", "a"), ("p2", "a"), ("p2", "b"), ("p1", "b")], 2, "2 patients for 2 folds → expected at least 3"),
        ([("p1", "a"), ("p2", "b"), ("p3", "a"), ("p4", "b")], 5, "4 patients for 5 folds"),
        # p1 holds a class with each other patient: while it is tested, none of them can be spared.
        ([("p1", "a"), ("p2", "a"), ("p1", "b"), ("p3", "b")], 3, "'a' (patients 'p1', 'p2')"),
        ([("p1", "a"), ("p1", "b"), ("p2", "b"), ("p3", "a")], 2, "no assignment of patients to folds does"),
    ],
)
def test_impossible_cohorts_are_refused_by_name(rows, folds, message):
    with pytest.raises(SplitError, match=re.escape(message)):
        make_splits(make_cohort(rows), folds)


@pytest.mark.parametrize(
    "keywords",
    [
        {"folds": 1},
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"seeds": (-1,)},
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
    ],
)
def test_impossible_arguments_are_refused(keywords):
    with pytest.raises(SplitError, match=r"→.*→"):
        make_splits(large_cohort(), **keywords)


def test_unknown_fold_or_seed_is_refused():
    splits = make_splits(large_cohort())
    for fold, seed in ((5, 0), (-1, 0), (0, 3)):
        with pytest.raises(SplitError, match="seed of 0, 1, 2"):
            splits.parts(fold, seed)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Splits, Cohort]:
    cohort = large_cohort().subset(range(60))
    splits = make_splits(cohort, folds=3, seeds=(4, 2))
    write_splits(tmp_path / "splits.csv", splits, cohort)
    return tmp_path / "splits.csv", splits, cohort


def test_splits_survive_the_file(written):
    path, splits, cohort = written
    again = read_splits(path, cohort.subset(range(59, -1, -1)))
    for fold in range(3):
        for seed in (2, 4):
            np.testing.assert_array_equal(again.parts(fold, seed)[::-1], splits.parts(fold, seed))
    assert again.warnings == splits.warnings


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fold,seed", "fold,sead", "got the columns"),
        (r"(?m)^0,4,s0000,.*\n", "", "no row for some of the 60 slides in 'fold 0, seed 4'"),
        (r"(?m)^0,4,s0000,p\d+", "0,4,s0000,other", "slide 's0000' of patient 'other'"),
        (r"(?m)^0,4,s0000,", "0,4,unknown,", "slides of this cohort only"),
        (r"(?m)^0,4,s0001,", "0,4,s0000,", "row 3"),
        (r"(?m)(?<=,)test$", "tests", "split 'tests'"),
        (r"(?m)^0,4,", "zero,4,", "fold 'zero'"),
        (r"(?m)^(0,4,.*),validation$", r"\1,train", "empty validation part"),
        (r"(?m)^(0,4,.*),test$", r"\1,train", "tested in no fold"),
        (r"(?m)^(0,[24],.*),test$", r"\1,train", "tested in no fold"),
        (r"(?m)^(?!fold).*\n", "", "no rows"),
    ],
)
def test_bad_split_files_are_refused(written, old, new, message):
    path, _, cohort = written
    text = path.read_text()
    assert re.search(old, text)
    path.write_text(re.sub(old, new, text))
    with pytest.raises(SplitError, match=re.escape(message)):
        read_splits(path, cohort)


def test_a_leaking_split_file_is_refused(written):
    path, _, cohort = written
    shared = next(p for p in cohort.patient_ids if cohort.patient_ids.count(p) > 1 and "train" in parts_of(p, written))
    slide_id = cohort.slide_ids[cohort.patient_ids.index(shared)]
    text = re.sub(rf"(?m)^0,4,{slide_id},{shared},train$", f"0,4,{slide_id},{shared},validation", path.read_text())
    path.write_text(text)
    with pytest.raises(SplitError, match=f"patient '{shared}' in train and validation"):
        read_splits(path, cohort)


def parts_of(patient: str, written: tuple[Path, Splits, Cohort]) -> set[str]:
    _, splits, cohort = written
    return {str(part) for who, part in zip(cohort.patient_ids, splits.parts(0, 4), strict=True) if who == patient}


def test_a_split_file_without_a_training_class_is_refused(written):
    path, splits, cohort = written
    rows = [row for row in split_rows(splits, cohort) if row[:2] == (0, 4)]
    rare = {cohort.patient_ids[at] for at in np.flatnonzero(cohort.labels == 2)}
    moved = {
        f"0,4,{s},{p},train": f"0,4,{s},{p},validation" for _, _, s, p, part in rows if p in rare and part == "train"
    }
    text = path.read_text()
    for old, new in moved.items():
        text = text.replace(old, new)
    path.write_text(text)
    with pytest.raises(SplitError, match="no training slide of class 'c'"):
        read_splits(path, cohort)


# ------------------------------------------------------------------------------------------------------------- repeats


@settings(max_examples=25, deadline=None)
@given(cohorts(), st.integers(2, 3), st.integers(1, 3))
def test_repeats_are_the_folds_of_the_seeds_that_follow(cohort, folds, repeats):
    try:
        expected = [make_splits(cohort, folds, 5 + repeat, seeds=(3, 1)) for repeat in range(repeats)]
    except SplitError:
        with pytest.raises(SplitError):
            make_splits(cohort, folds, 5, seeds=(3, 1), repeats=repeats)
        return
    splits = make_splits(cohort, folds, 5, seeds=(3, 1), repeats=repeats)
    assert (splits.n_folds, splits.repeats) == (folds * repeats, repeats)
    assert splits.repeat_of_fold.tolist() == [repeat for repeat in range(repeats) for _ in range(folds)]
    np.testing.assert_array_equal(splits.codes, np.concatenate([each.codes for each in expected]))
    for repeat in range(repeats):
        # assert_honest wants each slide tested once per seed: so it is in each repeat by itself
        assert_honest(replace(splits, codes=splits.codes[splits.repeat_of_fold == repeat]), cohort)


def test_repeats_survive_the_file_and_count_through(tmp_path: Path):
    cohort = large_cohort().subset(range(60))
    splits = make_splits(cohort, folds=3, repeats=2)
    write_splits(tmp_path / "splits.csv", splits, cohort)
    again = read_splits(tmp_path / "splits.csv", cohort)
    np.testing.assert_array_equal(again.codes, splits.codes)
    assert again.repeats == 2
    np.testing.assert_array_equal(splits.parts(4, 1), make_splits(cohort, folds=3, split_seed=1).parts(1, 1))
    with pytest.raises(SplitError, match=r"read Splits\.test"):
        _ = splits.test_fold
    with pytest.raises(SplitError, match="repeats=0"):
        make_splits(cohort, repeats=0)


def test_a_repeat_that_adds_nothing_is_reported():
    # one fold tests two of a and one of b, the other the rest: nine ways
    cohort = make_cohort([(f"p{at}", label) for at, label in enumerate("aaabbb")])
    splits = make_splits(cohort, folds=2, repeats=10)
    assert any("has the test folds of repeat" in text for text in splits.warnings)
    assert not any("has the test folds" in text for text in make_splits(large_cohort(), repeats=3).warnings)


def test_whole_repeats_are_told_from_other_folds():
    cohort = large_cohort().subset(range(60))
    splits = make_splits(cohort, folds=3, repeats=2)
    # the folds of two repeats, shuffled into each other, are no repeats of anything
    mixed = replace(splits, codes=splits.codes[[0, 3, 1, 4, 2, 5]])
    assert (mixed.repeats, mixed.repeat_of_fold.tolist()) == (1, [0] * 6)
    # nor are folds that test every slide equally often, but overlap
    pairs = np.zeros((3, 1, 3), dtype=np.int8)
    pairs[[0, 0, 1, 1, 2, 2], 0, [0, 1, 1, 2, 2, 0]] = 2
    assert replace(splits, codes=pairs, seeds=(0,)).repeats == 1
    assert replace(splits, codes=pairs[[0, 0, 1, 1, 2, 2]], seeds=(0,)).repeats == 1
    assert replace(splits, codes=np.concatenate([pairs, pairs]), seeds=(0,)).repeat_of_fold.tolist() == [0] * 6


# -------------------------------------------------------------------------------------------------------- nested folds


@settings(max_examples=25, deadline=None)
@given(cohorts(), st.integers(2, 3), st.integers(2, 3))
def test_inner_folds_never_see_the_outer_test_part(cohort, folds, n_inner):
    try:
        outer = make_splits(cohort, folds, seeds=(0, 7))
    except SplitError:
        return
    for fold in range(folds):
        tested = outer.parts(fold, 7) == "test"
        rest = cohort.subset(np.flatnonzero(~tested))
        try:
            inner = inner_splits(outer, cohort, fold, 7, n_inner)
        except SplitError:
            with pytest.raises(SplitError):
                make_splits(rest, n_inner)
            continue
        assert inner.seeds == (7,)
        assert all(set(inner.parts(each, 7)[tested]) == {"unused"} for each in range(n_inner))
        assert_honest(replace(inner, codes=inner.codes[:, :, ~tested]), rest)


def test_inner_folds_belong_to_their_outer_fold_and_seed():
    cohort = large_cohort()
    outer = make_splits(cohort, 3, seeds=(0, 1))
    one, again = inner_splits(outer, cohort, 1, 0, 4), inner_splits(outer, cohort, 1, 0, 4)
    np.testing.assert_array_equal(one.codes, again.codes)
    assert (inner_splits(outer, cohort, 1, 1, 4).test != one.test).any()
    assert one.record.parameters["outer_fold"] == 1
    assert one.record.method == "inner"
    with pytest.raises(SplitError, match="got fold 3"):
        inner_splits(outer, cohort, 3, 0, 4)
    with pytest.raises(SplitError, match=r"inner folds of fold 1, seed 0: got folds=1 →"):
        inner_splits(outer, cohort, 1, 0, 1)


# ------------------------------------------------------------------------------------------- verification and record


def test_verification_names_the_shared_patients_and_their_slides():
    cohort = make_cohort([(f"p{at // 2}", label) for at, label in enumerate("aaaabbbbaabb")])
    splits = make_splits(cohort, 3, seeds=(0,))
    at = int(np.flatnonzero(splits.codes[0, 0] == 0)[0])
    codes = splits.codes.copy()
    codes[0, 0, at] = 1
    patient, slide_id = cohort.patient_ids[at], cohort.slide_ids[at]
    with pytest.raises(
        SplitError, match=f"fold 0, seed 0: got patient '{patient}' in train and validation .*{slide_id}"
    ):
        verify_splits(replace(splits, codes=codes), cohort)


def test_verification_wants_one_test_part_for_all_seeds():
    cohort = large_cohort()
    splits = make_splits(cohort, 3)
    codes = splits.codes.copy()
    codes[0, 1] = codes[1, 1]
    with pytest.raises(SplitError, match="the same test slides for every seed"):
        verify_splits(replace(splits, codes=codes), cohort)
    with pytest.raises(SplitError, match="for 10 slides"):
        verify_splits(splits, cohort.subset(range(10)))


def test_the_record_says_how(written):
    path, splits, cohort = written
    assert splits.record.to_dict() == {
        "method": "kfold",
        "parameters": {"folds": 3, "repeats": 1, "split_seed": 0, "seeds": [4, 2], "validation_fraction": 0.2},
        "source": None,
        "sha256": None,
        "validation": "drawn",
        "marks": [],
    }
    read = read_splits(path, cohort).record
    assert (read.method, read.source, read.validation) == ("file", str(path), "given")
    content = path.read_bytes()
    assert read.sha256 == sha256(f"splits.csv\0{len(content)}\0".encode() + content).hexdigest()
    marked = splits.marked(USED_TEST_FOR_CHOICE).marked(USED_TEST_FOR_CHOICE)
    assert marked.record.marks == (USED_TEST_FOR_CHOICE,)
    assert splits.record.marks == ()


def test_a_file_joins_ids_as_label_tables_do(written):
    path, splits, cohort = written
    path.write_text(re.sub(r"(?m)^(\d,\d,s\d+),", r"\1.svs,", path.read_text()))
    for fold in range(3):
        np.testing.assert_array_equal(read_splits(path, cohort).parts(fold, 4), splits.parts(fold, 4))
    twins = replace(cohort, slide_ids=("x/s0000", "y/s0000", *cohort.slide_ids[2:]))
    with pytest.raises(SplitError, match=r"row 2: got slide 's0000.svs', which fits 'x/s0000', 'y/s0000'"):
        read_splits(path, twins)


def test_some_of_the_seeds():
    splits = make_splits(large_cohort(), 3, seeds=(4, 2, 9))
    some = splits.with_seeds((9, 4))
    np.testing.assert_array_equal(some.parts(1, 9), splits.parts(1, 9))
    np.testing.assert_array_equal(some.parts(2, 4), splits.parts(2, 4))
    with pytest.raises(SplitError, match="for 4, 2, 9"):
        splits.with_seeds((4, 5))
