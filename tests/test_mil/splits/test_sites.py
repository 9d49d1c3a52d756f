"""Splits by site: no site and no patient crosses, and sites lie as evenly as can be found."""

import re
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mil.errors import SplitError
from mil.splits.sites import Sites, _even_out, leave_one_site_out, site_preserved_splits, site_unevenness, tcga_site
from tests.test_mil.splits.test_splits import assert_honest, make_cohort


@st.composite
def sited_cohorts(draw):
    """A cohort and the site of every slide: three to six sites, patients of one site each, slides shuffled."""
    n_sites, n_classes = draw(st.integers(3, 6)), draw(st.integers(2, 3))
    n_patients = draw(st.integers(n_sites, 16))
    of_patient = [p if p < n_sites else draw(st.integers(0, n_sites - 1)) for p in range(n_patients)]
    rows = [(f"p{p}", f"c{draw(st.integers(0, n_classes - 1))}") for p in range(n_patients) for _ in range(1 + p % 3)]
    for label in range(n_classes):
        rows += [(f"p{p}", f"c{label}") for p in draw(st.permutations(range(n_patients)))[:2]]
    cohort = make_cohort(draw(st.permutations(rows)))
    return cohort, [f"site{of_patient[int(p[1:])]}" for p in cohort.patient_ids]


def brute_force(cohort, sites, folds: int):
    """The least unevenness of all assignments that leave every class in training beside one spared patient."""
    units = Sites.at(cohort, sites)
    found = np.inf
    for assignment in np.ndindex(*[folds] * len(units.ids)):
        fold_of = np.array(assignment)
        if len(set(assignment)) == folds and all(has_room(cohort, fold_of[units.of_slide] == f) for f in range(folds)):
            found = min(found, site_unevenness(units, fold_of, folds))
    return found


def has_room(cohort, tested) -> bool:
    """Whether some patient outside the test part can validate with every class still held by another."""
    held = defaultdict(set)
    for patient, label, out in zip(cohort.patient_ids, cohort.labels.tolist(), tested, strict=True):
        if not out:
            held[patient].add(label)
    everything = set(range(len(cohort.class_names)))
    return any(set().union(*(held[p] for p in held if p != spared)) == everything for spared in held)


def fold_of_site(splits, sites) -> dict[str, int]:
    """Every site's only test fold."""
    found = defaultdict(set)
    for site, fold in zip(sites, splits.test_fold.tolist(), strict=True):
        found[site].add(fold)
    assert all(len(folds) == 1 for folds in found.values()), "a site in two test parts"
    return {site: folds.pop() for site, folds in found.items()}


@settings(max_examples=60, deadline=None)
@given(sited_cohorts(), st.integers(2, 3), st.integers(0, 3))
def test_site_preserved_folds_are_honest_and_even_or_refused(drawn, folds, split_seed):
    cohort, sites = drawn
    best = brute_force(cohort, sites, folds)
    try:
        splits = site_preserved_splits(cohort, sites, folds, split_seed, seeds=(0, 7))
    except SplitError:
        assert best == np.inf
        return
    assert_honest(splits, cohort)
    fold_of = fold_of_site(splits, sites)
    units = Sites.at(cohort, sites)
    found = site_unevenness(units, np.array([fold_of[site] for site in units.ids]), folds)
    assert found >= best - 1e-9
    assert splits.record.parameters["sites"] == [sorted(s for s in fold_of if fold_of[s] == f) for f in range(folds)]


@settings(max_examples=60, deadline=None)
@given(sited_cohorts())
def test_each_site_is_left_out_once_or_it_is_refused(drawn):
    cohort, sites = drawn
    names = sorted(set(sites))
    room = [has_room(cohort, np.array(sites) == name) for name in names]
    if not all(room):
        with pytest.raises(SplitError, match=f"outside site '{names[room.index(False)]}'"):
            leave_one_site_out(cohort, sites)
        return
    splits = leave_one_site_out(cohort, sites, seeds=(0, 7))
    assert_honest(splits, cohort)
    assert fold_of_site(splits, sites) == {name: fold for fold, name in enumerate(names)}
    assert splits.record.parameters["sites"] == names


@settings(max_examples=15, deadline=None)
@given(sited_cohorts(), st.randoms())
def test_row_order_does_not_matter(drawn, random):
    cohort, sites = drawn
    order = list(range(len(cohort)))
    random.shuffle(order)
    shuffled = [sites[at] for at in order]
    try:
        splits = site_preserved_splits(cohort, sites, 3)
    except SplitError:
        return
    again = site_preserved_splits(cohort.subset(order), shuffled, 3)
    np.testing.assert_array_equal(again.codes, splits.codes[:, :, order])


def large_cohort():
    """300 patients at 20 sites of very different size, three classes that differ between sites."""
    rng = np.random.default_rng(0)
    site = rng.choice(20, 300, p=rng.dirichlet(np.ones(20)))
    labels = (rng.random(300) ** (1 + site % 3) * 3).astype(int)
    cohort = make_cohort([(f"p{p // 2}", f"c{label}") for p, label in enumerate(np.repeat(labels[::2], 2))])
    return cohort, [f"s{each}" for each in np.repeat(site[::2], 2)]


def test_many_sites_split_evenly_and_repeats_differ():
    cohort, sites = large_cohort()
    splits = site_preserved_splits(cohort, sites, 4, repeats=2, seeds=(0,))
    assert (splits.repeats, splits.n_folds) == (2, 8)
    shares = np.array([np.bincount(cohort.labels[test], minlength=3) for test in splits.test]) / np.bincount(
        cohort.labels
    )
    np.testing.assert_allclose(shares, 0.25, atol=0.09)
    np.testing.assert_array_equal(splits.codes[:4], site_preserved_splits(cohort, sites, 4, seeds=(0,)).codes)
    groups = [{frozenset(np.flatnonzero(test)) for test in splits.test[splits.repeat_of_fold == r]} for r in range(2)]
    assert groups[0] != groups[1]


def test_the_search_finds_the_most_even_folds_of_few_sites():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(20):
        site_of = np.r_[np.arange(6), rng.choice(6, 30, p=rng.dirichlet(np.ones(6)))]
        cohort = make_cohort([(f"p{p:02d}", f"c{rng.integers(3)}") for p in range(36)])
        sites = [f"s{each}" for each in site_of]
        fold_of = fold_of_site(site_preserved_splits(cohort, sites, 3, seeds=(0,)), sites)
        units = Sites.at(cohort, sites)
        uneven = site_unevenness(units, np.array([fold_of[site] for site in units.ids]), 3)
        found.append(uneven <= brute_force(cohort, sites, 3) + 1e-9)
    assert sum(found) >= 19


@pytest.mark.parametrize("split_seed", range(4))
def test_no_single_step_is_more_even(monkeypatch, split_seed):
    # one start, and that one not chosen among many
    monkeypatch.setattr("mil.splits.sites.SHAKES", 0)
    monkeypatch.setattr("mil.splits.folds.FOLD_DRAWS", 1)
    cohort, sites = large_cohort()
    fold_of = fold_of_site(site_preserved_splits(cohort, sites, 3, split_seed, seeds=(0,)), sites)
    units = Sites.at(cohort, sites)
    found = np.array([fold_of[site] for site in units.ids])
    least = site_unevenness(units, found, 3)
    for one in range(len(found)):
        for other in range(len(found)):
            swapped = found.copy()
            swapped[[one, other]] = found[[other, one]]
            assert site_unevenness(units, swapped, 3) >= least - 1e-9
        for fold in range(3):
            moved = found.copy()
            moved[one] = fold
            assert site_unevenness(units, moved, 3) >= least - 1e-9


@pytest.mark.parametrize("split", [site_preserved_splits, leave_one_site_out])
def test_bad_sites_are_refused_by_name(split):
    cohort, sites = large_cohort()
    with pytest.raises(SplitError, match="got 299 sites for 300 slides"):
        split(cohort, sites[:-1])
    with pytest.raises(SplitError, match="no site for slides 's0007'"):
        split(cohort, [*sites[:7], "", *sites[8:]])
    with pytest.raises(SplitError, match=re.escape("patient 'p3' (slide 's0006' at 's")):
        split(cohort, [*sites[:7], "elsewhere", *sites[8:]])
    with pytest.raises(SplitError, match="validation_fraction=0"):
        split(cohort, sites, validation_fraction=0.0)


def test_impossible_folds_are_refused():
    cohort, sites = large_cohort()
    for folds in (1, 21):
        with pytest.raises(SplitError, match=rf"got folds={folds} for \d+ sites, "):
            site_preserved_splits(cohort, sites, folds)
    alone = replace(cohort, labels=np.array([int(site == "s0") for site in sites]), class_names=("a", "b"))
    with pytest.raises(SplitError, match=r"class 'b' \(sites 's0'\) cannot stay"):
        site_preserved_splits(alone, sites, 3)
    with pytest.raises(SplitError, match="class 'b' at too few patients outside site 's0'"):
        leave_one_site_out(alone, sites)


def test_one_site_cannot_be_left_out():
    cohort, _ = large_cohort()
    with pytest.raises(SplitError, match=r"got the one site 'here' for all slides → .*split=kfold"):
        leave_one_site_out(cohort, ["here"] * len(cohort))
    with pytest.raises(SplitError, match=r"got folds=2 for 1 site, 'here' → "):
        site_preserved_splits(cohort, ["here"] * len(cohort), 2)


@pytest.mark.parametrize(
    ("slide_id", "site"),
    [
        ("TCGA-3X-AAVA-01Z-00-DX1.8C63C7F0-AA5A-4A1B", "3X"),
        ("brca/tcga-ad-6964-01A-01-TS1.svs", "AD"),
        ("TCGA-02-0001/TCGA-NA-A4QX-01Z", "NA"),
        ("TCGA-BRCA/TCGA_A2/TCGA-A2-A0CM", "A2"),
    ],
)
def test_tcga_site(slide_id, site):
    assert tcga_site(slide_id) == site


@pytest.mark.parametrize("slide_id", ["", "slide1", "TCGA-BRCA-0001", "TCGA-A2", "XTCGA-A2-A0CM", "TCGA-A2-A0CMX"])
def test_no_barcode_is_refused(slide_id):
    with pytest.raises(SplitError, match=re.escape(f"got slide {slide_id!r}")):
        tcga_site(slide_id)


def test_a_site_moves_where_no_exchange_helps():
    # twelve sites alike: only moves make five, four and three of them four each
    cohort = make_cohort([(f"p{at:02d}", label) for at in range(24) for label in "ab"])
    units = Sites.at(cohort, [f"s{int(patient[1:]) % 12:02d}" for patient in cohort.patient_ids])
    even = _even_out(units, np.repeat([0, 1, 2], [5, 4, 3]), 3)
    assert np.bincount(even).tolist() == [4, 4, 4]
