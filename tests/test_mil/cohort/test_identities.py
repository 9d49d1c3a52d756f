"""Two spellings of one patient never pass for two patients."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mil.cohort.identities import composed, find_alike, possible_names, recorded_names
from mil.cohort.reading import read_cohort
from mil.errors import CohortError
from mil.runs.lineage import TrainingCohort

WORDS = st.text(st.characters(categories=("Lu", "Ll", "Nd")), min_size=1, max_size=12)
SEPARATORS = st.sampled_from(["-", "_", " ", ".", "/"])


def _pairs(*patient_ids: str) -> list[tuple[str, str]]:
    return [(each.first, each.second) for each in find_alike(patient_ids)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("100", "100.0"),
        ("100", "100."),
        ("7", "007"),
        ("１２", "12"),  # digits of full width
        ("a", "A"),
        ("straße", "STRASSE"),
        ("doe john", "doejohn"),
        ("P-7", "P_7"),
        ("P-7", "P7"),
        ("P 7", "p-007"),
        ("P–7", "P-7"),  # a dash from a word processor
        ("TCGA-AA-0001", "TCGA-AA-0001-01A"),
        ("TCGA-AA-0001-01A", "TCGA-AA-0001-11A"),
        ("tcga-aa-0001-01a", "TCGA-AA-0001"),
        ("C3L-00001-21", "C3L-00001-22"),
        ("GTEX-1117F", "GTEX-1117F-0126"),
        ("case 12", "case 12 (2)"),
        ("12", "12_b"),
    ],
)
def test_spellings_of_one_patient_are_found(first, second):
    assert _pairs(first, second, "other") == [tuple(sorted((first, second)))]
    assert recorded_names(first) & possible_names(second)
    assert recorded_names(second) & possible_names(first)


@pytest.mark.parametrize(
    "patient_ids",
    [
        ("1", "2", "10", "11", "100"),
        ("1-11", "11-1", "111"),
        ("P1", "P10", "P11", "P100"),
        ("TCGA-AA-0001", "TCGA-AA-0002", "TCGA-AB-0001"),
        ("site-1-3", "site-2-3", "site-13"),
        ("Müller", "Muller", "Mueller"),
        ("12.5", "125", "1.25"),
    ],
)
def test_different_patients_are_let_be(patient_ids):
    assert find_alike(patient_ids) == []


@given(WORDS, SEPARATORS, WORDS)
def test_a_suffix_is_noticed_whatever_the_words(word, separator, suffix):
    assume(separator != "." or not word.isdigit())  # 1.0 is a number
    assert len(find_alike([word, f"{word}{separator}{suffix}"])) == 1


@given(st.text(min_size=1, max_size=12))
def test_forms_of_unicode_are_one(text):
    decomposed = unicodedata.normalize("NFD", text)
    assert composed(f" {decomposed} ") == composed(text)


@given(st.integers(0, 10**9), st.integers(0, 5), st.sampled_from(["", ".", ".0", ".000", ",0"]))
def test_numbers_are_compared_as_numbers(number, zeros, ending):
    first, second = str(number), "0" * zeros + str(number) + ending
    assert len(find_alike([first, second])) == (first != second)


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=40))
def test_distinct_numbers_are_distinct_patients(numbers):
    assert find_alike(map(str, numbers)) == []


# ------------------------------------------------------------------------------------------------------- label tables


def _write(path: Path, patients: list[str]) -> Path:
    rows = [f"s{at},{patient},{'ab'[at % 2]}" for at, patient in enumerate(patients)]
    path.write_text("slide_id,patient_id,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_a_table_with_two_spellings_is_refused_with_the_pairs(tmp_path):
    table = _write(tmp_path / "t.csv", ["100", "7", "100.0", "8", "9", "10"])
    with pytest.raises(CohortError, match="may be one patient") as error:
        read_cohort(table, "label")
    for part in ("'100' (slide s0, row 2)", "'100.0' (slide s2, row 4)", "equal as numbers", "distinct_patients=true"):
        assert part in str(error.value)
    assert len(set(read_cohort(table, "label", distinct_patients=True).patient_ids)) == 6


def test_forms_of_unicode_become_one_patient_and_it_is_said(tmp_path):
    names = ["M\u00fcller", "b", "Mu\u0308ller", "c", "d", "e"]
    cohort = read_cohort(_write(tmp_path / "t.csv", names), "label")
    assert cohort.patient_ids[0] == cohort.patient_ids[2] == "M\u00fcller"
    assert ("patients written in several Unicode forms (each is one)", 1, ("M\u00fcller",)) in cohort.attrition.rows()
    plain = read_cohort(_write(tmp_path / "u.csv", ["a", "b", "a", "c", "d", "e"]), "label")
    assert not any("Unicode" in reason for reason, _, _ in plain.attrition.rows())


def test_slides_that_are_patients_of_their_own_may_have_suffixes(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("slide_id,label\nA,a\nA-1,b\nA-2,a\nB,b\n", encoding="utf-8")
    assert len(read_cohort(table, "label", patient_column="slide_id")) == 4


def test_a_training_knows_its_patients_under_other_spellings():
    cohort = TrainingCohort.of(["x"], ["TCGA-AA-0001", "100", "M\u00fcller", "9-A"], salt="s")
    for other in ("TCGA-AA-0001-01A", "100.0", "0100", "Mu\u0308ller", "9", "9_a"):
        assert cohort.knows_patient(other), other
    for other in ("TCGA-AA-0002", "1000", "Muller", "9-B", "90"):
        assert not cohort.knows_patient(other), other


def test_many_patients_are_compared_in_little_time():
    ids = [f"P{number:06d}" for number in np.random.default_rng(0).permutation(50_000)]
    assert find_alike(ids) == []
