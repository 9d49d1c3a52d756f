"""A plan: each method does what its own function does, and takes nothing that it would not read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mil.errors import SplitError
from mil.splits.folds import make_splits
from mil.splits.plan import SplitPlan, split_cohort
from mil.splits.sites import leave_one_site_out, site_preserved_splits
from mil.splits.tables import write_splits
from tests.test_mil.splits.test_splits import make_cohort

COHORT = make_cohort([(f"p{at // 2}", label) for at, label in enumerate("ab" * 24)])
SITES = [f"site{at // 2 % 4}" for at in range(48)]
WORDS = ["train"] * 24 + ["val"] * 8 + ["test"] * 16


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A label table with columns of sites and parts."""
    rows = [f"{s},{site},{word}" for s, site, word in zip(COHORT.slide_ids, SITES, WORDS, strict=True)]
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["image,hospital,official", *rows]))
    return path


def test_each_method_is_its_function(table: Path):
    draws = {"split_seed": 3, "seeds": (0, 5), "validation_fraction": 0.25}
    by_site = {"sites": "hospital", "table": table, "slide_column": "image"}
    expected = {
        SplitPlan("kfold", 4, 2, **draws): make_splits(COHORT, 4, repeats=2, **draws),
        SplitPlan("site_preserved", 2, 2, **draws, **by_site): site_preserved_splits(
            COHORT, SITES, 2, repeats=2, **draws
        ),
        SplitPlan("leave_one_site_out", **draws, **by_site): leave_one_site_out(COHORT, SITES, **draws),
    }
    for plan, splits in expected.items():
        found = split_cohort(COHORT, plan)
        np.testing.assert_array_equal(found.codes, splits.codes)
        assert (found.record, found.warnings) == (splits.record, splits.warnings)


def test_the_plan_by_default_is_what_training_did_before():
    np.testing.assert_array_equal(split_cohort(COHORT, SplitPlan()).codes, make_splits(COHORT).codes)


def test_fixed_by_column_or_file(table: Path):
    plan = SplitPlan("fixed", column="official", table=table, slide_column="image", seeds=(0, 2))
    by_column = split_cohort(COHORT, plan)
    assert by_column.parts(0, 2).tolist() == [{"val": "validation"}.get(word, word) for word in WORDS]
    write_splits(table.parent / "splits.csv", by_column, COHORT)
    by_file = split_cohort(COHORT, SplitPlan("fixed", file=table.parent, seeds=(2,)))
    np.testing.assert_array_equal(by_file.codes, by_column.codes[:, 1:])


def test_sites_from_barcodes():
    ids = tuple(f"TCGA-{('A2', 'B6', 'C8')[at // 2 % 3]}-{at // 2:04d}-01Z-00-DX{at % 2}" for at in range(48))
    splits = split_cohort(replace(COHORT, slide_ids=ids), SplitPlan("leave_one_site_out", sites="tcga"))
    assert splits.record.parameters["sites"] == ["A2", "B6", "C8"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "kfolds"}, "did you mean 'kfold'"),
        ({"method": "leave_one_site_out"}, "name the column with sites="),
        ({"sites": "hospital"}, "got split=kfold with sites=hospital"),
        ({"method": "fixed"}, "split_column=None and split_file=None → expected exactly one"),
        ({"method": "fixed", "column": "a", "file": Path("b")}, "expected exactly one"),
        ({"column": "official"}, "use split=fixed, or remove them"),
        ({"method": "fixed", "column": "a", "repeats": 2}, "got repeats=2 with split=fixed"),
        ({"method": "leave_one_site_out", "sites": "tcga", "repeats": 2}, "split=leave_one_site_out"),
    ],
)
def test_what_does_not_go_together_is_refused(keywords, message):
    with pytest.raises(SplitError, match=message):
        SplitPlan(**keywords)


def test_a_column_needs_a_table():
    with pytest.raises(SplitError, match="got the column 'hospital' and no label table"):
        split_cohort(COHORT, SplitPlan("site_preserved", sites="hospital"))
