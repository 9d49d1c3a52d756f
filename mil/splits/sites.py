"""Splits by site: does a head hold where the slides come from somewhere else?

Slides of one hospital share scanner, stain and case mix. A head that learns to tell hospitals apart scores well on
folds that mix them, and fails elsewhere.

References:
    Howard et al., The impact of site-specific digital histology signatures on deep learning model accuracy and bias,
    Nature Communications 12, 4423 (2021), https://doi.org/10.1038/s41467-021-24698-1
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mil.arrays import BoolArray, FloatArray, IntArray
from mil.cohort.cohort import Cohort
from mil.errors import SplitError, listed
from mil.splits.folds import check_repeats, draw_test_folds
from mil.splits.patients import Patients
from mil.splits.record import SplitRecord
from mil.splits.splits import Splits
from mil.splits.validation import check_draws, draw_parts
from mil.splits.verification import verify_splits

SHAKES = 8
_BARCODE = re.compile(r"(?<![A-Z0-9])TCGA-([A-Z0-9]{2})-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE)


def tcga_site(slide_id: str) -> str:
    """The tissue source site in a TCGA barcode, its second field.

    An institution that sent tissue for several studies has a code for each.

    Raises:
        SplitError: the id holds no barcode.

    >>> tcga_site("TCGA-3X-AAVA-01Z-00-DX1.8C63C7F0")
    '3X'
    """
    codes = _BARCODE.findall(slide_id)
    if not codes:
        raise SplitError(
            f"got slide {slide_id!r} → expected a TCGA barcode such as TCGA-3X-AAVA-01Z-00-DX1 in its id → name a "
            f"column of sites instead"
        )
    # the file's own name comes last
    return str(codes[-1]).upper()


@dataclass(frozen=True, eq=False)
class Sites(Patients):
    """Sites in the place of patients: what folds are made of, while parts are still drawn by patient.

    Attributes:
        patients: the P patients.
        of_patient: int64 [P], index of each patient's site.
    """

    noun: ClassVar[str] = "sites"

    patients: Patients
    of_patient: IntArray

    @staticmethod
    def at(cohort: Cohort, sites: Sequence[str]) -> "Sites":
        """Those of the cohort, from the site of every slide [n].

        Raises:
            SplitError: not one site per slide, an empty one, or a patient with slides of several sites.
        """
        _check_sites(cohort, sites)
        patients, units = Patients.of(cohort), Patients.of(replace(cohort, patient_ids=tuple(sites)))
        of_patient = np.zeros(len(patients.ids), dtype=np.int64)
        of_patient[patients.of_slide] = units.of_slide
        return Sites(units.ids, units.of_slide, units.counts, units.holds, patients, of_patient)

    def blocking(self, test: BoolArray) -> IntArray:
        """As `Patients.blocking`, for sites [S] that are tested; a single patient can be spared to validate."""
        return self.patients.blocking(test[self.of_patient])


def leave_one_site_out(
    cohort: Cohort,
    sites: Sequence[str],
    split_seed: int = 0,
    seeds: Sequence[int] = (0, 1, 2),
    validation_fraction: float = 0.2,
) -> Splits:
    """A fold per site, in the order of their names: all slides of that site are tested, none is trained on.

    Validation parts are drawn by patient from the other sites, as `make_splits` draws them.

    Args:
        cohort: n slides.
        sites: [n] the site of every slide.
        split_seed: draws the validation parts, with the seeds.
        seeds: draw the validation parts.
        validation_fraction: of the slides outside the test part, between 0 and 1.

    Raises:
        SplitError: an argument is impossible, there is one site, a patient has slides of two sites, or a class is not
            left in training and validation once some site is out.
    """
    seeds = tuple(seeds)
    check_draws(split_seed, seeds, validation_fraction)
    found = Sites.at(cohort, sites)
    if len(found.ids) < 2:
        raise SplitError(
            f"got the one site {listed(found.ids)} for all slides → expected two or more, as each is left out in turn "
            f"→ check what names the sites, or use folds that need none (split=kfold)"
        )
    tests = np.eye(len(found.ids), dtype=bool)
    for site, test in zip(found.ids, tests, strict=True):
        blocking = found.blocking(test)
        if blocking.size:
            raise SplitError(
                f"got class {listed(cohort.class_names[at] for at in blocking)} at too few patients outside site "
                f"{site!r} → expected every class in the training part beside a validation part, whichever site is "
                f"left out → merge the class with another, empty its cells, or use site-preserved folds"
            )
    codes = draw_parts(found.patients, tests[:, found.of_patient], split_seed, seeds, validation_fraction)
    parameters = {
        "sites": list(found.ids),
        "split_seed": split_seed,
        "seeds": list(seeds),
        "validation_fraction": validation_fraction,
    }
    return verify_splits(Splits(codes, split_seed, seeds, SplitRecord("leave_one_site_out", parameters)), cohort)


def site_preserved_splits(
    cohort: Cohort,
    sites: Sequence[str],
    folds: int = 3,
    split_seed: int = 0,
    seeds: Sequence[int] = (0, 1, 2),
    validation_fraction: float = 0.2,
    repeats: int = 1,
) -> Splits:
    """Folds in which every site lies in one test part only, with classes as even as can be found.

    Validation parts are drawn by patient, as `make_splits` draws them: they share sites with the training part.

    Deviations from the paper: slides are counted, not patients; what is made even is the share of every class and of
    all slides that each fold holds, so that a rare class weighs as much as a common one; and the folds are found by a
    seeded search that moves and exchanges sites until no such step improves them, from several starts, where the paper
    solves a quadratic program.

    Args:
        cohort: n slides.
        sites: [n] the site of every slide.
        folds: number of test parts per repeat, from 2 to the number of sites.
        split_seed: draws the folds; repeat r has the seed `split_seed` + r.
        seeds: draw the validation parts.
        validation_fraction: of the slides outside the test part, between 0 and 1.
        repeats: how often every slide is tested, 1 or more; each time with other folds, if the search finds some.

    Raises:
        SplitError: an argument is impossible, a patient has slides of two sites, or no assignment of sites keeps every
            class in every training part.
    """
    seeds = tuple(seeds)
    check_draws(split_seed, seeds, validation_fraction)
    check_repeats(repeats)
    found = Sites.at(cohort, sites)
    if not 2 <= folds <= len(found.ids):
        raise SplitError(
            f"got folds={folds} for {len(found.ids)} site{'s' * (len(found.ids) != 1)}, {listed(found.ids)} → expected "
            f"2 or more folds, with a site or more in each → change folds"
        )
    codes, site_folds, earlier = [], [], set[bytes]()
    for repeat_seed in range(split_seed, split_seed + repeats):
        rng = np.random.default_rng(repeat_seed)
        fold_of = _draw_site_folds(found, cohort.class_names, folds, rng, earlier)
        earlier.add(_groups(fold_of))
        tests = fold_of[found.of_patient] == np.arange(folds)[:, None]
        codes.append(draw_parts(found.patients, tests, repeat_seed, seeds, validation_fraction))
        site_folds += [[found.ids[at] for at in np.flatnonzero(fold_of == fold)] for fold in range(folds)]
    parameters = {
        "folds": folds,
        "repeats": repeats,
        "sites": site_folds,
        "split_seed": split_seed,
        "seeds": list(seeds),
        "validation_fraction": validation_fraction,
    }
    record = SplitRecord("site_preserved", parameters)
    return verify_splits(Splits(np.concatenate(codes), split_seed, seeds, record), cohort)


def _check_sites(cohort: Cohort, sites: Sequence[str]) -> None:
    if len(sites) != len(cohort):
        raise SplitError(f"got {len(sites)} sites for {len(cohort)} slides → expected one per slide → pass them all")
    empty = [slide_id for slide_id, site in zip(cohort.slide_ids, sites, strict=True) if not site]
    if empty:
        raise SplitError(
            f"got no site for slides {listed(empty)} → expected a site for every slide → fill in the column of sites"
        )
    of_patient: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for slide_id, patient_id, site in zip(cohort.slide_ids, cohort.patient_ids, sites, strict=True):
        of_patient[patient_id].setdefault(site, slide_id)
    torn = {patient: slides for patient, slides in of_patient.items() if len(slides) > 1}
    if torn:
        names = [
            f"{patient!r} ({', '.join(f'slide {slide!r} at {site!r}' for site, slide in slides.items())})"
            for patient, slides in list(torn.items())[:3]
        ]
        more = f" and {len(torn) - 3} more" if len(torn) > 3 else ""
        raise SplitError(
            f"got slides of several sites for patient {', '.join(names)}{more} → expected each patient at one site, "
            f"because neither may cross folds → give the patient's slides one site, or give both sites one name"
        )


def _draw_site_folds(
    sites: Sites, class_names: tuple[str, ...], folds: int, rng: np.random.Generator, earlier: set[bytes]
) -> IntArray:
    """The fold of each site [S]: the most even that is found, and that no earlier repeat had."""
    start = draw_test_folds(sites, class_names, folds, rng)
    starts = [start, *(_shaken(sites, start, folds, rng) for _ in range(SHAKES))]
    found = [_even_out(sites, each, folds) for each in starts]
    fresh = [fold_of for fold_of in found if _groups(fold_of) not in earlier]
    return min(fresh or found, key=lambda fold_of: site_unevenness(sites, fold_of, folds))


def _groups(fold_of: IntArray) -> bytes:
    """Which sites [S] are together, whatever the numbers of the folds."""
    _, first, fold = np.unique(fold_of, return_index=True, return_inverse=True)
    return first[fold].tobytes()


def _shaken(sites: Sites, fold_of: IntArray, folds: int, rng: np.random.Generator) -> IntArray:
    """Half of the sites [S] moved anywhere, where that is valid: another start for the same search."""
    for site in rng.permutation(len(fold_of))[: (len(fold_of) + 1) // 2]:
        step = fold_of.copy()
        step[site] = rng.integers(folds)
        if _is_valid_step(sites, fold_of, step):
            fold_of = step
    return fold_of


def _is_valid_step(sites: Sites, before: IntArray, after: IntArray) -> bool:
    """Whether valid folds [S] stay so: only those that a site leaves or enters can have changed."""
    moved = before != after
    changed = [after == fold for fold in {*before[moved].tolist(), *after[moved].tolist()}]
    return all(test.any() and sites.blocking(test).size == 0 for test in changed)


def site_unevenness(sites: Patients, fold_of: IntArray, folds: int) -> float:
    """Sum of squares of what each fold [S] holds of a class, or of all slides, beyond an even share; 0 at best."""
    return float((_loads(_shares(sites), fold_of, folds) ** 2).sum())


def _shares(sites: Patients) -> FloatArray:
    """Of each class, and of all slides, the share that each site holds, [S, C + 1]."""
    counts = np.concatenate([sites.counts, sites.counts.sum(axis=1, keepdims=True)], axis=1)
    shares: FloatArray = counts / counts.sum(axis=0)
    return shares


def _loads(shares: FloatArray, fold_of: IntArray, folds: int) -> FloatArray:
    """What each fold holds of every class and of all slides, beyond an even share, [folds, C + 1]."""
    loads = np.full((folds, shares.shape[1]), -1 / folds)
    np.add.at(loads, fold_of, shares)
    return loads


def _even_out(sites: Sites, fold_of: IntArray, folds: int) -> IntArray:
    """Take the best valid step, a site moved or two exchanged, until none improves."""
    shares = _shares(sites)
    step: IntArray | None = fold_of
    while step is not None:
        fold_of = step
        step = next(_better_steps(sites, shares, fold_of, folds), None)
    return fold_of


def _better_steps(sites: Sites, shares: FloatArray, fold_of: IntArray, folds: int) -> Iterator[IntArray]:
    """Valid assignments [S] that are one step away and more even, best first.

    If a fold with load a gives d to a fold with load b, the sum of squares changes by 2 d·d - 2 d·(a - b). A site that
    moves gives its share; of two that are exchanged, the difference is given.
    """
    n_sites = len(fold_of)
    loads = _loads(shares, fold_of, folds)
    own = loads[fold_of]
    moves = 2 * (shares**2).sum(axis=1)[:, None] - 2 * np.einsum("sc,sfc->sf", shares, own[:, None] - loads)
    given = shares[:, None] - shares
    swaps = 2 * (given**2).sum(axis=2) - 2 * (given * (own[:, None] - own)).sum(axis=2)
    gains = np.concatenate([moves, np.triu(swaps)], axis=1)
    order = np.argsort(gains, axis=None, kind="stable")
    for flat in order[gains.ravel()[order] < -1e-9]:
        site, to = divmod(int(flat), folds + n_sites)
        step = fold_of.copy()
        if to < folds:
            step[site] = to
        else:
            step[[site, to - folds]] = fold_of[[to - folds, site]]
        if _is_valid_step(sites, fold_of, step):
            yield step
