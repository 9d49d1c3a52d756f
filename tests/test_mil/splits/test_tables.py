"""Splits from files: joined as label tables are, complete, and refused when they are of something else."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil.errors import CohortError, SplitError
from mil.splits.fixed import fixed_splits
from mil.splits.folds import make_splits
from mil.splits.tables import read_clam_splits, read_column, read_split_column, read_split_file, write_splits
from tests.test_mil.splits.test_fixed import cohorts_and_parts, is_honest
from tests.test_mil.splits.test_splits import make_cohort

COHORT = make_cohort([(f"p{at // 2}", label) for at, label in enumerate("ab" * 12)])
WORDS = ["train"] * 12 + ["val"] * 4 + ["test"] * 8


def write_clam(path: Path, slide_ids, words, columns=("train", "val", "test")) -> None:
    """A file as pandas writes it for CLAM: an index column without a name, columns of unequal length."""
    lists = [[slide for slide, word in zip(slide_ids, words, strict=True) if word == part] for part in columns]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *columns])
        for at in range(max(map(len, lists))):
            writer.writerow([at, *(each[at] if at < len(each) else "" for each in lists)])


def write_table(path: Path, slide_ids, words, column="split") -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("slide_id", column), *zip(slide_ids, words, strict=True)])


@settings(max_examples=40, deadline=None)
@given(cohorts_and_parts(), st.booleans())
def test_files_hold_what_was_fixed(tmp_path_factory, drawn, endings):
    cohort, parts = drawn
    if not is_honest(cohort, parts):
        return
    folder = tmp_path_factory.mktemp("splits")
    ids = [f"{slide}.svs" if endings else slide for slide in cohort.slide_ids]
    for fold, words in enumerate(parts):
        write_clam(folder / f"splits_{fold}.csv", ids, words)
    write_table(folder / "labels.csv", ids, parts[0])
    expected = fixed_splits(cohort, parts, seeds=(0, 7))
    found = read_clam_splits(folder, cohort, seeds=(0, 7))
    np.testing.assert_array_equal(found.codes, expected.codes)
    assert found.warnings == expected.warnings
    np.testing.assert_array_equal(read_clam_splits(folder / "splits_0.csv", cohort, (0, 7)).codes, expected.codes[:1])
    column = read_split_column(folder / "labels.csv", "split", cohort, seeds=(0, 7))
    np.testing.assert_array_equal(column.codes, expected.codes[:1])
    # what a run of these writes can be read again, unused and untested slides included
    write_splits(folder / "splits.csv", found, cohort)
    np.testing.assert_array_equal(read_split_file(folder, cohort, (7,)).codes, expected.codes[:, 1:])


def test_the_order_of_folds_is_their_number(tmp_path: Path):
    for fold in range(11):
        words = ["test" if at // 2 == fold else "val" if at // 2 == 11 else "train" for at in range(24)]
        write_clam(tmp_path / f"splits_{fold}.csv", COHORT.slide_ids, words)
        # what CLAM writes beside
        (tmp_path / f"splits_{fold}_bool.csv").write_text(",train,val,test\n")
        (tmp_path / f"splits_{fold}_descriptor.csv").write_text(",train,val,test\n")
    splits = read_clam_splits(tmp_path, COHORT)
    for fold in range(11):
        assert np.flatnonzero(splits.test[fold]).tolist() == [2 * fold, 2 * fold + 1]
    before = splits.record
    assert (before.method, before.source, before.validation) == ("fixed", str(tmp_path), "given")
    assert before.parameters["files"][10] == "splits_10.csv"
    write_clam(tmp_path / "splits_4.csv", COHORT.slide_ids, WORDS)
    assert read_clam_splits(tmp_path, COHORT).record.sha256 != before.sha256
    (tmp_path / "splits_4.csv").unlink()
    with pytest.raises(SplitError, match=r"got splits 0, 1, 2, 3, 5, .* without a gap"):
        read_clam_splits(tmp_path, COHORT)


def test_slides_that_one_side_lacks_are_reported(tmp_path: Path):
    write_clam(tmp_path / "splits_0.csv", [*COHORT.slide_ids, "gone"], [*WORDS, "train"])
    larger = make_cohort([*zip(COHORT.patient_ids, "ab" * 12, strict=True), ("p99", "a")])
    splits = read_split_file(tmp_path, larger)
    assert "1 slides of the split are not in the cohort ('gone')" in splits.warnings
    assert "1 slides are in no part of any fold ('s0024')" in splits.warnings
    assert splits.parts(0, 0)[24] == "unused"


def test_folders_in_ids_must_agree(tmp_path: Path):
    nested = replace(COHORT, slide_ids=tuple(f"site/{slide}" for slide in COHORT.slide_ids))
    write_clam(tmp_path / "splits_0.csv", COHORT.slide_ids, WORDS)
    np.testing.assert_array_equal(read_clam_splits(tmp_path, nested).codes, read_clam_splits(tmp_path, COHORT).codes)
    twins = replace(COHORT, slide_ids=("a/s0001", "b/s0001", *COHORT.slide_ids[2:]))
    with pytest.raises(SplitError, match="got slide 's0001', which fits 'a/s0001', 'b/s0001'"):
        read_clam_splits(tmp_path, twins)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,split\ns0,train\n", "got the columns 'slide_id', 'split' → expected train, val and test"),
        (",train,val\n0,s0000,s0001\n", "got the columns 'train', 'val'"),
        (",train,val,validation,test\n0,s0000,s0001,s0002,s0003\n", "got the columns"),
        (",train,val,test\nnormal_1,True,False,False\n", "got True and False for slide ids"),
        (",train,val,test\n0,s0000,,s0023\n1,s0004,,s0000\n", "got slide 's0000' as 'train' and as 'test'"),
        (",train,val,test\n0,s0000,,s0023\n1,s0004,,s0000.svs\n", "'s0000.svs' and 's0000' as 'train' and as 'test'"),
        (",train,val,test\n0,7,s0001,s0002\n", "got train slides such as '7', none of them in the cohort"),
        (",train,val,test\n0,s0000,7,s0004\n", "got validation slides such as '7', none of them in the cohort"),
        (",train,val,test\n0,s0000,s0002,s0001\n", "patient 'p0' in train and test (slides 's0000', 's0001')"),
        (",train,val,test\n0,s0000,s0002,\n", "got no test slide"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text, message):
    path = tmp_path / "splits_0_bool.csv"
    path.write_text(text)
    with pytest.raises(SplitError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        read_split_file(path, COHORT)


def test_no_file_is_refused(tmp_path: Path):
    with pytest.raises(SplitError, match=r"got no splits_0\.csv → expected splits_0\.csv"):
        read_split_file(tmp_path, COHORT)
    with pytest.raises(SplitError, match="got no such path"):
        read_split_file(tmp_path / "absent", COHORT)


def test_a_run_folder_and_its_seeds(tmp_path: Path):
    splits = make_splits(COHORT, 3, seeds=(0, 4))
    write_splits(tmp_path / "splits.csv", splits, COHORT)
    np.testing.assert_array_equal(read_split_file(tmp_path, COHORT, (4,)).parts(2, 4), splits.parts(2, 4))
    with pytest.raises(SplitError, match="got seeds 0, 1, where splits are for 0, 4"):
        read_split_file(tmp_path / "splits.csv", COHORT, (0, 1))


def test_a_column(tmp_path: Path):
    path = tmp_path / "labels.csv"
    write_table(path, [f"{slide}.svs" for slide in COHORT.slide_ids], ["NA", "", *WORDS[2:]], "official")
    splits = read_split_column(path, "official", COHORT)
    assert splits.parts(0, 1).tolist() == ["unused"] * 2 + ["train"] * 10 + ["validation"] * 4 + ["test"] * 8
    assert splits.record.parameters["column"] == "official"
    # "NA" is a code of a tissue source site: a column of sites is read as it is
    assert read_column(path, "official", COHORT)[:3] == ("NA", "", "train")
    with pytest.raises(CohortError, match="did you mean 'official'"):
        read_split_column(path, "oficial", COHORT)
    write_table(path, COHORT.slide_ids, ["tset", *WORDS[1:]])
    with pytest.raises(
        SplitError, match=r"labels.csv, fold 0: got 'tset' as part of slide 's0000'.*did you mean 'test'"
    ):
        read_split_column(path, "split", COHORT)
    write_table(path, [*COHORT.slide_ids, "s0000.svs"], [*WORDS, "test"])
    with pytest.raises(SplitError, match=r"got slide 's0000.svs' and 's0000' as 'train' and as 'test'"):
        read_split_column(path, "split", COHORT)
