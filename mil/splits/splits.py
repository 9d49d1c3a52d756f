"""Patient-grouped, stratified splits, verified after splitting.

Every slide is in the test part of exactly one fold per repeat, whatever the seed; the validation part is drawn from the
rest per (fold, seed). A patient never appears in two parts, and every training part holds every class, always. A class
may be absent from a test or validation part (of ten patients, two may hold it): that is reported as a warning.

Folds are numbered through all repeats: fold 7 of 3 repeats of 5 folds is the third of the second repeat. So a fold and
a seed name a replica, however the folds were made.
"""

import csv
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold

from mil.cohort.cohort import Cohort, SlideIndex
from mil.errors import SplitError, listed
from mil.splits.patients import BoolArray, IntArray, Patients
from mil.splits.record import SplitRecord, file_hash

PARTS = ("train", "validation", "test")
UNUSED = "unused"
SPLIT_COLUMNS = ("fold", "seed", "slide_id", "patient_id", "split")
FOLD_DRAWS = 10
EVEN_ENOUGH = 0.05
VALIDATION_DRAWS = 64
SEARCH_STEPS = 20_000

_NAMES = np.array((*PARTS, UNUSED))
_TRAIN, _VALIDATION, _TEST, _UNUSED = range(4)

CodeArray = npt.NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Splits:
    """Which part every slide is in, for every fold and seed.

    Attributes:
        codes: int8 [n_folds, len(seeds), n], 0 to 3 for "train", "validation", "test" and "unused" (in no part).
        seed: the seed of the test folds; None for splits that were not drawn.
        seeds: the seeds of the validation parts.
        record: how they were made.
        warnings: classes that some test or validation parts lack, and whatever else a reader should know.

    Example:
        >>> splits = make_splits(cohort, folds=5, seeds=(0, 1, 2))      # doctest: +SKIP
        >>> splits.parts(fold=0, seed=2)                                # doctest: +SKIP
        array(['train', 'test', 'validation', ...], dtype='<U10')
    """

    codes: CodeArray
    seed: int | None
    seeds: tuple[int, ...]
    record: SplitRecord
    warnings: tuple[str, ...] = ()

    @property
    def n_folds(self) -> int:
        """Number of folds, those of all repeats together."""
        return len(self.codes)

    @property
    def test(self) -> BoolArray:
        """The slides that each fold tests, the same for every seed, bool [n_folds, n]."""
        return np.asarray(self.codes[:, 0] == _TEST)

    @property
    def validation(self) -> BoolArray:
        """The slides that validate, bool [n_folds, len(seeds), n]."""
        return np.asarray(self.codes == _VALIDATION)

    @property
    def test_fold(self) -> IntArray:
        """The fold that tests each slide, int64 [n].

        Raises:
            SplitError: some slide is tested in no fold, or in several.
        """
        test = self.test
        if (test.sum(axis=0) != 1).any():
            raise SplitError(
                f"got {self.n_folds} folds that do not test every slide once → expected one test fold per slide, which "
                f"repeated and fixed splits do not have → read Splits.test, [folds, slides]"
            )
        return np.asarray(test.argmax(axis=0), dtype=np.int64)

    @property
    def repeat_of_fold(self) -> IntArray:
        """The repeat that each fold belongs to, int64 [n_folds]; all 0 where the folds are no (repeated) k-fold."""
        found = _repeat_of_fold(self.test)
        return np.zeros(self.n_folds, dtype=np.int64) if found is None else found

    @property
    def repeats(self) -> int:
        """How often the folds test every slide; 1 where some slides are tested more often than others."""
        return int(self.repeat_of_fold[-1]) + 1

    def parts(self, fold: int, seed: int) -> npt.NDArray[np.str_]:
        """The part of every slide, "train", "validation", "test" or (fixed and inner splits only) "unused", [n].

        Raises:
            SplitError: the fold or the seed was not split for.
        """
        if fold not in range(self.n_folds) or seed not in self.seeds:
            raise SplitError(
                f"got fold {fold}, seed {seed} → expected a fold from 0 to {self.n_folds - 1} and a seed of "
                f"{listed(self.seeds)} → ask for one of these, or make the splits with that seed"
            )
        return np.asarray(_NAMES[self.codes[fold, self.seeds.index(seed)]])

    def with_seeds(self, seeds: Sequence[int]) -> "Splits":
        """The same folds for some of the seeds, in this order.

        Raises:
            SplitError: a seed that was not split for.
        """
        missing = sorted(set(seeds) - set(self.seeds))
        if missing:
            raise SplitError(
                f"got seeds {listed(seeds)}, where splits are for {listed(self.seeds)} → expected seeds that were "
                f"split for → pass seeds=[{', '.join(map(str, self.seeds))}], or make the splits anew"
            )
        at = [self.seeds.index(seed) for seed in seeds]
        return replace(self, codes=self.codes[:, at], seeds=tuple(seeds))

    def marked(self, mark: str) -> "Splits":
        """The same with a mark in their record, such as `mil.splits.record.USED_TEST_FOR_CHOICE`."""
        return replace(self, record=self.record.marked(mark))


def _repeat_of_fold(test: BoolArray) -> IntArray | None:
    """The repeat of each fold [n_folds], or None unless the folds test every slide once, and so on per repeat."""
    times = test.cumsum(axis=0)
    whole = (times == times[:, :1]).all(axis=1)
    n_repeats = int(whole.sum())
    if not whole[-1] or (times[whole, 0] != np.arange(1, n_repeats + 1)).any():
        return None
    return np.concatenate([[0], whole[:-1].cumsum()]).astype(np.int64)


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
    codes = np.full((n_inner, 1, len(cohort)), _UNUSED, dtype=np.int8)
    codes[:, :, within] = inner.codes
    parameters = {**inner.record.parameters, "outer_fold": fold, "outer_method": splits.record.method}
    return replace(inner, codes=codes, record=replace(inner.record, method="inner", parameters=parameters))


def draw_parts(
    patients: Patients, tests: BoolArray, split_seed: int, seeds: tuple[int, ...], validation_fraction: float
) -> CodeArray:
    """Codes [n_folds, len(seeds), n] of given test patients [n_folds, P], with validation parts drawn beside them."""
    codes = np.full((len(tests), len(seeds), len(patients.of_slide)), _TRAIN, dtype=np.int8)
    for fold, test in enumerate(tests):
        codes[fold][:, test[patients.of_slide]] = _TEST
        for at, seed in enumerate(seeds):
            rng = np.random.default_rng((split_seed, fold, seed))
            chosen = draw_validation(patients, test, validation_fraction, rng)
            codes[fold, at, chosen[patients.of_slide]] = _VALIDATION
    return codes


def split_rows(splits: Splits, cohort: Cohort) -> Iterator[tuple[int, int, str, str, str]]:
    """Rows of `splits.csv`, in the order of `SPLIT_COLUMNS`: one per fold, seed and slide."""
    for fold in range(splits.n_folds):
        for seed in splits.seeds:
            parts = splits.parts(fold, seed).tolist()
            for slide_id, patient_id, part in zip(cohort.slide_ids, cohort.patient_ids, parts, strict=True):
                yield fold, seed, slide_id, patient_id, part


def write_splits(path: str | Path, splits: Splits, cohort: Cohort) -> None:
    """Write `splits.csv`, from which `read_splits` gives the same parts back."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(SPLIT_COLUMNS)
        writer.writerows(split_rows(splits, cohort))


def read_splits(path: str | Path, cohort: Cohort, fixed: bool = False) -> Splits:
    """Read a `splits.csv` for exactly these slides, and verify it as if it had just been drawn.

    Slide ids join by the rules of `mil.cohort.cohort.join_store`.

    Args:
        path: the file.
        cohort: n slides.
        fixed: accept slides that are unused, or tested in no fold or in several, as splits from elsewhere have them.

    Raises:
        SplitError: the file is no split file, is of other slides or patients, misses a (fold, seed), tests a slide in
            no fold or in several (unless `fixed`), or breaks another promise of `make_splits`.
    """
    path = Path(path)
    table = _read_parts(path, cohort)
    folds = 1 + max(fold for fold, _ in table)
    seeds = tuple(sorted({seed for _, seed in table}))
    missing = [f"fold {f}, seed {s}" for f in range(folds) for s in seeds if len(table[f, s]) != len(cohort)]
    if missing:
        raise SplitError(
            f"{path}: got no row for some of the {len(cohort)} slides in {listed(missing)} → expected every slide in "
            f"every fold and seed → make the splits anew for this cohort"
        )
    code = {name: at for at, name in enumerate(_NAMES.tolist())}
    codes = np.array(
        [[[code[table[f, s][x]] for x in cohort.slide_ids] for s in seeds] for f in range(folds)], dtype=np.int8
    )
    test = codes == _TEST
    uneven = _repeat_of_fold(test[:, 0]) is None or (codes == _UNUSED).any()
    if (test != test[:, :1]).any() or (uneven and not fixed):
        raise SplitError(
            f"{path}: got a slide that is tested in no fold, in several, or for some seeds only → expected one test "
            f"fold per slide (and repeat), common to all seeds → make the splits anew"
        )
    record = SplitRecord("file", {"seeds": list(seeds)}, str(path), file_hash(path), "given")
    return verify_splits(Splits(codes, None, seeds, record), cohort)


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


def check_draws(split_seed: int, seeds: tuple[int, ...], validation_fraction: float) -> None:
    """Refuse what no validation part can be drawn with.

    Raises:
        SplitError: seeds that are negative, repeated or none at all, or a fraction outside 0 to 1.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(*seeds, split_seed) < 0:
        raise SplitError(
            f"got seeds {listed(seeds)} and split_seed {split_seed} → expected one or more different seeds, 0 or more "
            f"→ change the seeds"
        )
    if not 0 < validation_fraction < 1:
        raise SplitError(
            f"got validation_fraction={validation_fraction} → expected a value between 0 and 1 (both excluded), "
            f"because early stopping needs a validation part → pass 0.2, for example"
        )


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


def draw_validation(patients: Patients, test: BoolArray, fraction: float, rng: np.random.Generator) -> BoolArray:
    """The patients [P] that validate beside these test patients: the first of the best draws."""
    rest = np.flatnonzero(~test)
    wanted = fraction * patients.counts[rest].sum(axis=0)
    # A class of one remaining patient belongs to training: no draw can be blamed for lacking it.
    coverable = patients.holds[rest].sum(axis=0) > 1
    best, best_cost = None, np.inf
    for attempt in range(VALIDATION_DRAWS):
        chosen = _grow_validation(patients, rest, wanted, attempt % 2 == 0, rng)
        held = patients.counts[chosen].sum(axis=0)
        off_size = abs(held.sum() / wanted.sum() - 1)
        # Within a third of the wanted size is as good as exact; a further quarter weighs like one class.
        cost = int((held[coverable] == 0).sum()) + 4 * max(0.0, off_size - 1 / 3)
        if cost < best_cost - 1e-9:
            best, best_cost = chosen, cost
        if cost == 0:
            break
    chosen_mask = np.zeros(len(patients.ids), dtype=bool)
    chosen_mask[best] = True
    return chosen_mask


def _grow_validation(
    patients: Patients, rest: IntArray, wanted: npt.NDArray[np.float64], cover: bool, rng: np.random.Generator
) -> IntArray:
    """Draw patients one by one, never the last one of a class; `cover` starts with one of every class if it can.

    Then a patient is taken whenever it brings the slides per class closer to `wanted` [C]. Never empty.
    """
    order = rng.permutation(rest)
    holders = patients.holds[rest].sum(axis=0)
    held = np.zeros(len(wanted))
    chosen: list[int] = []

    def take(candidate: int) -> None:
        nonlocal holders, held
        chosen.append(candidate)
        holders = holders - patients.holds[candidate]
        held = held + patients.counts[candidate]

    def can_spare(candidate: int) -> bool:
        return candidate not in chosen and bool((holders - patients.holds[candidate] > 0).all())

    for index in np.argsort(holders, kind="stable") if cover else ():
        spare = (each for each in order[patients.holds[order, index]] if held[index] == 0 and can_spare(each))
        for candidate in list(spare)[:1]:
            take(candidate)
    for candidate in order:
        closer = np.abs(held + patients.counts[candidate] - wanted).sum() < np.abs(held - wanted).sum()
        if closer and can_spare(candidate):
            take(candidate)
    if not chosen:
        take(next(candidate for candidate in order if can_spare(candidate)))
    return np.array(chosen, dtype=np.int64)


def verify_splits(splits: Splits, cohort: Cohort) -> Splits:
    """The splits with their warnings, after every part was checked slide by slide, whoever made them.

    Raises:
        SplitError: a patient in two parts (named with the slides), an empty part, a test part that differs between
            seeds, or a training part without some class.
    """
    if (splits.codes.shape[2] != len(cohort)) or ((splits.codes == _TEST) != splits.test[:, None]).any():
        raise SplitError(
            f"got codes {list(splits.codes.shape)} for {len(cohort)} slides → expected [folds, seeds, slides], with "
            f"the same test slides for every seed → split anew"
        )
    for fold in range(splits.n_folds):
        for at, seed in enumerate(splits.seeds):
            _refuse_dishonest(splits.codes[fold, at], cohort, f"fold {fold}, seed {seed}")
    absences = [_describe_absence(splits, cohort, index) for index in range(len(cohort.class_names))]
    found = (*splits.warnings, *filter(None, absences), *_describe_same_folds(splits))
    return replace(splits, warnings=tuple(dict.fromkeys(found)))


def _describe_absence(splits: Splits, cohort: Cohort, index: int) -> str:
    """Which test and validation parts lack a class, as a warning; empty if none does."""
    of_class = cohort.labels == index
    n_patients = len({cohort.patient_ids[at] for at in np.flatnonzero(of_class)})
    tests = [str(fold) for fold in np.flatnonzero(~(splits.test & of_class).any(axis=1))]
    validations = []
    for fold in range(splits.n_folds):
        lacking = np.flatnonzero(~(splits.validation[fold] & of_class).any(axis=1))
        if lacking.size:
            validations.append(f"{fold} (seed {', '.join(str(splits.seeds[at]) for at in lacking)})")
    if not tests and not validations:
        return ""
    folds = splits.n_folds // splits.repeats
    few = f", fewer than the {folds} folds" if n_patients < folds else ""
    text = f"{cohort.noun} {cohort.class_names[index]!r} has {n_patients} patients{few}:"
    text += f" no test slide in fold {', '.join(tests)};" if tests else ""
    text += f" no validation slide in fold {', '.join(validations)};" if validations else ""
    return text.rstrip(";")


def _describe_same_folds(splits: Splits) -> Iterator[str]:
    """A warning per repeat that drew the folds of an earlier one: it adds no information."""
    repeat_of, first = splits.repeat_of_fold, dict[frozenset[bytes], int]()
    for repeat in range(splits.repeats):
        folds = frozenset(test.tobytes() for test in splits.test[repeat_of == repeat])
        if first.setdefault(folds, repeat) != repeat:
            yield f"repeat {repeat} has the test folds of repeat {first[folds]}: the cohort has few ways to be split"


def _refuse_dishonest(codes: CodeArray, cohort: Cohort, where: str) -> None:
    """Check one (fold, seed), codes [n]."""
    for code, part in enumerate(PARTS):
        if not (codes == code).any():
            raise SplitError(f"{where}: got an empty {part} part → expected slides in every part → split anew")
    refuse_shared_patients(codes, cohort, where)
    missing = np.setdiff1d(np.arange(len(cohort.class_names)), cohort.labels[codes == _TRAIN])
    if missing.size:
        raise SplitError(
            f"{where}: got no training slide of {cohort.noun} {listed(cohort.class_names[at] for at in missing)} → "
            f"expected every class in every training part → split anew, or merge the class with another"
        )


def refuse_shared_patients(codes: CodeArray, cohort: Cohort, where: str) -> None:
    """Check that no patient is in two parts, given the codes [n] of one (fold, seed).

    Raises:
        SplitError: one is; it is named with its slides.
    """
    shared = _describe_shared(codes, cohort)
    if shared:
        more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        raise SplitError(
            f"{where}: got {'; '.join(shared[:3])}{more} → expected each patient in one part → split by patient"
        )


def _describe_shared(codes: CodeArray, cohort: Cohort) -> list[str]:
    """The patients that are in several parts, each with its slides."""
    patients, of_slide = np.unique(cohort.patient_ids, return_inverse=True)
    present = np.zeros((len(patients), len(PARTS)), dtype=bool)
    used = codes != _UNUSED
    present[of_slide[used], codes[used]] = True
    found = []
    for at in np.flatnonzero(present.sum(axis=1) > 1):
        parts = " and ".join(part for part, here in zip(PARTS, present[at], strict=True) if here)
        slides = listed((cohort.slide_ids[x] for x in np.flatnonzero(used & (of_slide == at))), 4)
        found.append(f"patient {str(patients[at])!r} in {parts} (slides {slides})")
    return found


def _read_parts(path: Path, cohort: Cohort) -> defaultdict[tuple[int, int], dict[str, str]]:
    """The part of every slide by (fold, seed), as written."""
    if not path.is_file():
        raise SplitError(f"got {path}, which is no file → expected a splits.csv → check the path")
    patient_of = dict(zip(cohort.slide_ids, cohort.patient_ids, strict=True))
    index = SlideIndex(cohort.slide_ids)
    table: defaultdict[tuple[int, int], dict[str, str]] = defaultdict(dict)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != SPLIT_COLUMNS:
            raise SplitError(
                f"{path}: got the columns {listed(reader.fieldnames or ())} → expected {listed(SPLIT_COLUMNS)} → pass "
                f"the splits.csv of a run"
            )
        for row in reader:
            where = f"{path}, row {reader.line_num}"
            slide_id = _check_split_row(where, row, index, patient_of)
            parts = table[int(row["fold"]), int(row["seed"])]
            if slide_id in parts:
                raise SplitError(
                    f"{where}: got slide {slide_id!r} again → expected it once per fold and seed → delete it"
                )
            parts[slide_id] = row["split"]
    if not table:
        raise SplitError(f"{path}: got no rows → expected one per fold, seed and slide → make the splits anew")
    return table


def _check_split_row(where: str, row: dict[str, str], index: SlideIndex, patient_of: dict[str, str]) -> str:
    """The cohort's id of the slide of a row that fits the cohort."""
    slide_id, patient_id = row["slide_id"], row["patient_id"]
    found = index.find(slide_id)
    if len(found) > 1:
        raise SplitError(
            f"{where}: got slide {slide_id!r}, which fits {listed(found)} → expected the id of one slide → write the "
            f"store's id into the file"
        )
    slide_id = found[0] if found else slide_id
    if patient_of.get(slide_id) != patient_id:
        expected = f"patient {patient_of[slide_id]!r}" if slide_id in patient_of else "slides of this cohort only"
        raise SplitError(
            f"{where}: got slide {slide_id!r} of patient {patient_id!r} → expected {expected} → use the label table "
            f"and the store the splits were made for, or make them anew"
        )
    if row["split"] not in _NAMES or not (row["fold"].isdecimal() and row["seed"].isdecimal()):
        raise SplitError(
            f"{where}: got fold {row['fold']!r}, seed {row['seed']!r}, split {row['split']!r} → expected two integers "
            f"and one of {listed(_NAMES.tolist())} → mend the row"
        )
    return slide_id
