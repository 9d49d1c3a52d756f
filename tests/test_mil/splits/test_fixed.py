"""Fixed splits: kept as given, completed from the training part only, and refused when they leak."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil.errors import SplitError
from mil.splits.fixed import fixed_splits, part_name
from mil.splits.record import SplitRecord
from tests.test_mil.splits.test_splits import cohorts, make_cohort

WORDS = {"train": "train", "val": "validation", "test": "test", "": "unused"}


def cohort_of(*patients: str):
    """One slide per letter of each patient's labels."""
    return make_cohort([(f"p{at}", label) for at, labels in enumerate(patients) for label in labels])


@st.composite
def cohorts_and_parts(draw):
    """A cohort and, per fold, a word for each slide: by patient, or (rarely) by slide, so that some leak."""
    cohort = draw(cohorts())
    patients = sorted(set(cohort.patient_ids))
    parts = []
    for _ in range(draw(st.integers(1, 2))):
        word_of = {
            patient: draw(st.sampled_from(["train", "train", "train", "val", "test", ""])) for patient in patients
        }
        words = [word_of[patient] for patient in cohort.patient_ids]
        if draw(st.integers(0, 5)) == 0:
            words[draw(st.integers(0, len(words) - 1))] = "test"
        parts.append(words)
    return cohort, parts


def is_honest(cohort, parts) -> bool:
    """From the slides up: whether every fold is whole, does not leak, and can be trained on."""
    for words in parts:
        used = {(patient, word) for patient, word in zip(cohort.patient_ids, words, strict=True) if word}
        if len({patient for patient, _ in used}) < len(used) or not {"train", "test"} <= {word for _, word in used}:
            return False
        held: dict[str, set[int]] = {}
        for patient, label, word in zip(cohort.patient_ids, cohort.labels.tolist(), words, strict=True):
            if word == "train":
                held.setdefault(patient, set()).add(label)
        everything = set(range(len(cohort.class_names)))
        spared = [None] if "val" in words else list(held)
        if not any(set().union(*(held[p] for p in held if p != each)) == everything for each in spared):
            return False
    return True


@settings(max_examples=150, deadline=None)
@given(cohorts_and_parts())
def test_given_parts_are_kept_and_missing_ones_come_from_training(drawn):
    cohort, parts = drawn
    if not is_honest(cohort, parts):
        with pytest.raises(SplitError, match=r"→.*→"):
            fixed_splits(cohort, parts)
        return
    splits = fixed_splits(cohort, parts, seeds=(0, 7))
    for fold, words in enumerate(parts):
        for seed in (0, 7):
            found, wanted = splits.parts(fold, seed), np.array([WORDS[word] for word in words])
            if "val" in words:
                np.testing.assert_array_equal(found, wanted)
                continue
            moved = found != wanted
            assert moved.any()
            assert set(wanted[moved]) == {"train"}
            assert set(found[moved]) == {"validation"}
            torn = set(np.array(cohort.patient_ids)[moved]) & set(np.array(cohort.patient_ids)[found != "validation"])
            training = set(np.array(cohort.patient_ids)[found == "train"])
            assert not torn & training, "a patient both trains and validates"
            assert set(cohort.labels[found == "train"]) == set(range(len(cohort.class_names)))
    given_in = {"val" in words for words in parts}
    assert splits.record.validation == {(True,): "given", (False,): "drawn"}.get(tuple(given_in), "mixed")
    assert any("drawn from the training part" in text for text in splits.warnings) == (False in given_in)


def test_drawn_validation_belongs_to_the_seed():
    cohort = cohort_of(*"ab" * 12)
    words = [["train"] * 18 + ["test"] * 6]
    one, again = (fixed_splits(cohort, words, seeds=(0, 1), validation_fraction=0.3) for _ in range(2))
    np.testing.assert_array_equal(one.codes, again.codes)
    assert (one.parts(0, 0) != one.parts(0, 1)).any()
    np.testing.assert_array_equal(
        fixed_splits(cohort, words, seeds=(1,), validation_fraction=0.3).codes[:, 0], one.codes[:, 1]
    )
    assert (fixed_splits(cohort, words, seeds=(0, 1), validation_fraction=0.3, split_seed=1).codes != one.codes).any()
    assert (one.parts(0, 0) == "validation").sum() in (5, 6)


def test_a_shared_patient_is_refused_by_name_with_its_slides():
    cohort = cohort_of("ab", "ab", "ab", "ab")
    words = ["train", "train", "train", "test", "val", "val", "test", "test"]
    expected = "table.csv, fold 0: got patient 'p1' in train and test (slides 's0002', 's0003') → expected each patient"
    with pytest.raises(SplitError, match=re.escape(expected)):
        fixed_splits(cohort, [words], SplitRecord("fixed", source="table.csv"))
    # also where the validation part would be drawn, of the very patient
    words = ["train", "train", "train", "test", "train", "train", "test", "test"]
    with pytest.raises(SplitError, match="patient 'p1' in train and test"):
        fixed_splits(cohort, [words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train train train train train train", "fold 0: got no test slide"),
        ("test test test test val val", "fold 0: got no train slide"),
        ("train train train train test", "parts of 5 slides → expected one for each of the 6 slides"),
        (
            "train train tran train test test",
            "got 'tran' as part of slide 's0002' → expected train, val (or validation)",
        ),
        ("train train val val test test", ""),
        ("train train train train test test", ""),
        ("train train test test test test", "at too few training patients to draw one"),
    ],
)
def test_other_parts_are_refused(words, message):
    cohort = cohort_of("ab", "ab", "ab")
    if not message:
        fixed_splits(cohort, [words.split()])
        return
    with pytest.raises(SplitError, match=re.escape(message)):
        fixed_splits(cohort, [words.split()])


def test_a_class_without_training_slides_is_refused():
    with pytest.raises(SplitError, match="no training slide of class 'b'"):
        fixed_splits(cohort_of("a", "a", "b", "b"), [["train", "val", "test", "test"]])
    with pytest.raises(SplitError, match="got no fold"):
        fixed_splits(cohort_of("a", "a", "b", "b"), [])


def test_what_is_left_out_or_tested_twice_is_reported():
    cohort = cohort_of("ab", "ab", "ab", "ab", "ab")
    first = ["train"] * 4 + ["val"] * 2 + ["test"] * 2 + [""] * 2
    warnings = fixed_splits(cohort, [first]).warnings
    assert "2 slides are in no part of any fold ('s0008', 's0009')" in warnings
    assert any(text.startswith("8 slides are tested in no fold") for text in warnings)
    second = ["train"] * 4 + ["val"] * 2 + ["test"] * 4
    warnings = fixed_splits(cohort, [first, second]).warnings
    assert any(text.startswith("2 slides are tested in several folds") for text in warnings)
    assert not any("in no part" in text for text in warnings)


@pytest.mark.parametrize(
    ("text", "part"),
    [("Train", "train"), (" VAL ", "validation"), ("validation", "validation"), ("Testing", "test"), ("", "unused")],
)
def test_words(text, part):
    assert part_name(text) == part
    assert part_name(text + "x") is None
