"""Test folds grouped by patient and stratified by class, drawn until they are even."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from mil.arrays import IntArray
from mil.cohort.cohort import Cohort
from mil.errors import SplitError, listed
from mil.splits.patients import Patients
from mil.splits.record import SplitRecord
from mil.splits.splits import UNUSED_CODE, CodeArray, Splits
from mil.splits.validation import check_draws, draw_parts
from mil.splits.verification import verify_splits

FOLD_DRAWS = 10
EVEN_ENOUGH = 0.05
SEARCH_STEPS = 20_000


def make_splits(
    cohort: Cohort,
    folds: int = 5,
    split_seed: int = 0,
    seeds: Sequence[int] = (0, 1, 2),
    validation_fraction: float = 0.2,
    repeats: int = 1,
) -> Splits:
    """Draw test folds, then a validation part per fold and seed; same cohort and seeds, same splits.

    Test folds come from scikit-learn's StratifiedGroupKFold: of a few draws, the valid one that spreads slides and
    classes most evenly; where no draw is valid, from a search over all assignments. Validation parts are the best of
    some draws: first by the classes they hold, then by their size; where draws are equally good, the seed decides.

    Args:
        cohort: n slides.
        folds: number of test parts per repeat, 2 or more.
        split_seed: draws the test folds; those of repeat r are drawn as `split_seed` + r alone would draw them.
        seeds: draw the validation parts.
        validation_fraction: of the slides outside the test part, between 0 and 1.
        repeats: how often every slide is tested, 1 or more; folds are numbered through all of them.

    Raises:
        SplitError: an argument is impossible, or no split keeps every class in every training part.
    """
    seeds = tuple(seeds)
    patients = Patients.of(cohort)
    _check_folds(patients, folds, repeats)
    check_draws(split_seed, seeds, validation_fraction)

    def draw(repeat_seed: int) -> CodeArray:
        fold_of = draw_test_folds(patients, cohort.class_names, folds, np.random.default_rng(repeat_seed))
        tests = fold_of == np.arange(folds)[:, None]
        return draw_parts(patients, tests, repeat_seed, seeds, validation_fraction)

    codes = np.concatenate([draw(split_seed + repeat) for repeat in range(repeats)])
    parameters = {
        "folds": folds,
        "repeats": repeats,
        "split_seed": split_seed,
        "seeds": list(seeds),
        "validation_fraction": validation_fraction,
    }
    return verify_splits(Splits(codes, split_seed, seeds, SplitRecord("kfold", parameters)), cohort)


def inner_splits(
    splits: Splits, cohort: Cohort, fold: int, seed: int, n_inner: int, validation_fraction: float = 0.2
) -> Splits:
    """Folds of the training and validation part of one outer fold, for choices that must not see its test part.

    They are splits of the whole cohort, so that the same bags serve: what the outer fold tests is "unused" in all of
    them. Whatever is chosen by the inner test parts (hyper-parameters, a head) is then tested on the outer one.

    Args:
        splits: the outer splits.
        cohort: their n slides.
        fold: the outer fold.
        seed: the outer seed, the only seed of the inner splits; it draws the inner folds too.
        n_inner: number of inner folds, 2 or more.
        validation_fraction: of the slides outside the inner test part.

    Raises:
        SplitError: the fold or the seed was not split for, or its slides are too few for inner folds.
    """
    outer = splits.parts(fold, seed)
    within = np.flatnonzero((outer == "train") | (outer == "validation"))
    split_seed = int(np.random.default_rng((splits.seed or 0, fold, seed)).integers(2**31))
    try:
        inner = make_splits(cohort.subset(within), n_inner, split_seed, (seed,), validation_fraction)
    except SplitError as error:
        raise SplitError(f"inner folds of fold {fold}, seed {seed}: {error}") from error
    codes = np.full((n_inner, 1, len(cohort)), UNUSED_CODE, dtype=np.int8)
    codes[:, :, within] = inner.codes
    parameters = {**inner.record.parameters, "outer_fold": fold, "outer_method": splits.record.method}
    return replace(inner, codes=codes, record=replace(inner.record, method="inner", parameters=parameters))


def _check_folds(patients: Patients, folds: int, repeats: int) -> None:
    if folds < 2:
        raise SplitError(f"got folds={folds} → expected 2 or more → raise folds")
    if len(patients.ids) < max(folds, 3):
        raise SplitError(
            f"got {len(patients.ids)} patients for {folds} folds → expected at least {max(folds, 3)}, one per fold and "
            f"three in all (train, validation, test) → lower folds or add patients"
        )
    check_repeats(repeats)


def check_repeats(repeats: int) -> None:
    """Refuse fewer repeats than one.

    Raises:
        SplitError: as said.
    """
    if repeats < 1:
        raise SplitError(f"got repeats={repeats} → expected 1 or more → raise repeats")


def draw_test_folds(patients: Patients, class_names: tuple[str, ...], folds: int, rng: np.random.Generator) -> IntArray:
    """The fold that tests each patient, [P].

    Raises:
        SplitError: no assignment of patients to folds keeps every class in every training part.
    """
    best, best_spread = None, np.inf
    for _ in range(FOLD_DRAWS):
        fold_of = _propose_test_folds(patients, folds, rng)
        if fold_of is None or not _is_valid(patients, fold_of, folds):
            continue
        spread = _unevenness(patients, fold_of, folds)
        if spread < best_spread - 1e-9:
            best, best_spread = fold_of, spread
        if best_spread < EVEN_ENOUGH:
            break
    return _search_test_folds(patients, class_names, folds, rng) if best is None else best


def _propose_test_folds(patients: Patients, folds: int, rng: np.random.Generator) -> IntArray | None:
    """One draw of scikit-learn's grouped stratified folds, [P]; None where it has none for so few slides."""
    patient, label = np.nonzero(patients.counts)
    repeats = patients.counts[patient, label]
    groups, labels = np.repeat(patient, repeats), np.repeat(label, repeats)
    if patients.counts.sum(axis=0).max() < folds:
        return None
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=int(rng.integers(2**31)))
    fold_of = np.empty(len(patients.ids), dtype=np.int64)
    with warnings.catch_warnings():
        # A class of fewer slides than folds: we report it ourselves, with the parts that lack it.
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, test) in enumerate(splitter.split(labels, labels, groups)):
            fold_of[groups[test]] = fold
    return fold_of


def _is_valid(patients: Patients, fold_of: IntArray, folds: int) -> bool:
    tests = [fold_of == fold for fold in range(folds)]
    return all(test.any() and patients.blocking(test).size == 0 for test in tests)


def _unevenness(patients: Patients, fold_of: IntArray, folds: int) -> float:
    """Twice the share of slides that even folds would move elsewhere, mean over every class and all slides."""
    held = np.zeros((folds, patients.counts.shape[1]))
    np.add.at(held, fold_of, patients.counts)
    held = np.concatenate([held, held.sum(axis=1, keepdims=True)], axis=1)
    return float(np.abs(held / held.sum(axis=0) - 1 / folds).sum(axis=0).mean())


def _search_test_folds(
    patients: Patients, class_names: tuple[str, ...], folds: int, rng: np.random.Generator
) -> IntArray:
    """Depth-first search for test folds [P] that leave every class in every training part, or a SplitError.

    Patients of rare classes come first, then large ones; each tries the emptiest fold first, so that the first
    assignment found is a fairly even one. A fold that blocks is never extended: no superset of it can be valid.
    """
    n_patients = len(patients.ids)
    rarest = np.where(patients.holds, patients.holds.sum(axis=0), n_patients).min(axis=1)
    order = np.lexsort((rng.random(n_patients), -patients.counts.sum(axis=1), rarest))
    fold_of = np.full(n_patients, -1, dtype=np.int64)
    blame: Counter[int] = Counter()
    pending = [_emptiest_first(patients, fold_of, folds)]
    for _ in range(SEARCH_STEPS):
        depth = len(pending) - 1
        fold_of[order[depth:]] = -1
        if not pending[-1]:
            pending.pop()
            if not pending:
                break
            continue
        fold_of[order[depth]] = pending[-1].pop()
        blocking = patients.blocking(fold_of == fold_of[order[depth]])
        blame.update(blocking.tolist())
        if blocking.size:
            continue
        if depth + 1 == n_patients:
            return fold_of
        pending.append(_emptiest_first(patients, fold_of, folds))
    raise _no_split(patients, class_names, folds, blame, exhausted=not pending)


def _emptiest_first(patients: Patients, fold_of: IntArray, folds: int) -> list[int]:
    """Folds worth trying for the next patient, best last (they are popped); -1 in `fold_of` [P] is not placed yet."""
    placed = fold_of >= 0
    sizes = np.bincount(fold_of[placed], patients.counts.sum(axis=1)[placed], minlength=folds)
    # Empty folds are alike: trying one of them is trying all. Tried before the others, they never stay empty: an
    # assignment that leaves one empty is still valid with a patient moved there, and that one was tried before.
    tried = np.r_[np.flatnonzero(sizes > 0), np.flatnonzero(sizes == 0)[:1]]
    return [int(fold) for fold in tried[np.argsort(-sizes[tried], kind="stable")]]


def _no_split(
    patients: Patients, class_names: tuple[str, ...], folds: int, blame: Counter[int], exhausted: bool
) -> SplitError:
    names = []
    for index, _ in blame.most_common(3):
        holders = [patients.ids[at] for at in np.flatnonzero(patients.holds[:, index])]
        names.append(f"{class_names[index]!r} ({patients.noun} {listed(holders, 4)})")
    noun = patients.noun
    tried = f"no assignment of {noun} to folds does" if exhausted else f"none found in {SEARCH_STEPS:,} steps"
    return SplitError(
        f"got {len(patients.ids)} {noun} for {folds} folds, where class {', '.join(names)} cannot stay in every "
        f"training part → expected every class in every training part beside a test and a validation part; {tried} → "
        f"raise folds, add {noun} of that class, merge it with another, or empty its cells, which leaves it out"
    )
