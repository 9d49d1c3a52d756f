"""Patient-grouped, stratified splits, verified after splitting.

Every slide is in the test part of exactly one fold, whatever the seed; the validation part is drawn from the rest per
(fold, seed). A patient never appears in two parts, and every training part holds every class, always. A class may be
absent from a test or validation part (of ten patients, two may hold it): that is reported as a warning.
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

from mil.cohort import Cohort
from mil.errors import SplitError, listed

PARTS = ("train", "validation", "test")
SPLIT_COLUMNS = ("fold", "seed", "slide_id", "patient_id", "split")
FOLD_DRAWS = 10
EVEN_ENOUGH = 0.05
VALIDATION_DRAWS = 64
SEARCH_STEPS = 20_000

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Splits:
    """Which part every slide is in, for every fold and seed.

    Attributes:
        test_fold: int64 [n], the fold that tests the slide.
        validation: bool [n_folds, len(seeds), n], the slides that validate.
        n_folds: number of folds.
        seed: the seed of the test folds; None for splits read from a file.
        seeds: the seeds of the validation parts.
        warnings: classes that some test or validation parts lack.

    Example:
        >>> splits = make_splits(cohort, folds=5, seeds=(0, 1, 2))      # doctest: +SKIP
        >>> splits.parts(fold=0, seed=2)                                # doctest: +SKIP
        array(['train', 'test', 'validation', ...], dtype='<U10')
    """

    test_fold: IntArray
    validation: BoolArray
    n_folds: int
    seed: int | None
    seeds: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    def parts(self, fold: int, seed: int) -> npt.NDArray[np.str_]:
        """The part of every slide, "train", "validation" or "test", [n].

        Raises:
            SplitError: the fold or the seed was not split for.
        """
        if fold not in range(self.n_folds) or seed not in self.seeds:
            raise SplitError(
                f"got fold {fold}, seed {seed} → expected a fold from 0 to {self.n_folds - 1} and a seed of "
                f"{listed(self.seeds)} → ask for one of these, or make the splits with that seed"
            )
        validates = self.validation[fold, self.seeds.index(seed)]
        return np.where(self.test_fold == fold, "test", np.where(validates, "validation", "train"))


@dataclass(frozen=True, eq=False)
class _Patients:
    """The cohort as splitting sees it: P patients, whole; nothing depends on the order of the table.

    Attributes:
        ids: [P] sorted.
        of_slide: int64 [n], index of each slide's patient.
        counts: int64 [P, C], slides of every class.
        holds: bool [P, C], counts > 0.
    """

    ids: tuple[str, ...]
    of_slide: IntArray
    counts: IntArray
    holds: BoolArray

    @classmethod
    def of(cls, cohort: Cohort) -> "_Patients":
        ids = tuple(sorted(set(cohort.patient_ids)))
        position = {patient: at for at, patient in enumerate(ids)}
        of_slide = np.array([position[patient] for patient in cohort.patient_ids], dtype=np.int64)
        counts = np.zeros((len(ids), len(cohort.class_names)), dtype=np.int64)
        np.add.at(counts, (of_slide, cohort.labels), 1)
        return cls(ids, of_slide, counts, counts > 0)

    def blocking(self, test: BoolArray) -> IntArray:
        """Classes that leave no room for a validation part once these patients [P] are tested; empty if all is well.

        There is room when one more patient can be spared with every class still held by another. If there is room
        beside a set of patients, there is room beside each subset of it.
        """
        rest = self.holds[~test]
        holders = rest.sum(axis=0)
        if (holders == 0).any():
            return np.flatnonzero(holders == 0)
        last = holders == 1
        return np.flatnonzero(last) if rest[:, last].any(axis=1).all() else np.empty(0, dtype=np.int64)


def make_splits(
    cohort: Cohort,
    folds: int = 5,
    split_seed: int = 0,
    seeds: Sequence[int] = (0, 1, 2),
    validation_fraction: float = 0.2,
) -> Splits:
    """Draw test folds, then a validation part per fold and seed; same cohort and seeds, same splits.

    Test folds come from scikit-learn's StratifiedGroupKFold: of a few draws, the valid one that spreads slides and
    classes most evenly; where no draw is valid, from a search over all assignments. Validation parts are the best of
    some draws: first by the classes they hold, then by their size; where draws are equally good, the seed decides.

    Args:
        cohort: n slides.
        folds: number of test parts, 2 or more.
        split_seed: draws the test folds.
        seeds: draw the validation parts.
        validation_fraction: of the slides outside the test part, between 0 and 1.

    Raises:
        SplitError: an argument is impossible, or no split keeps every class in every training part.
    """
    seeds = tuple(seeds)
    patients = _Patients.of(cohort)
    _check_arguments(patients, folds, split_seed, seeds, validation_fraction)
    fold_of = _draw_test_folds(patients, cohort.class_names, folds, np.random.default_rng(split_seed))
    validation = np.zeros((folds, len(seeds), len(cohort)), dtype=bool)
    for fold in range(folds):
        for at, seed in enumerate(seeds):
            rng = np.random.default_rng((split_seed, fold, seed))
            chosen = _draw_validation(patients, fold_of == fold, validation_fraction, rng)
            validation[fold, at] = chosen[patients.of_slide]
    splits = Splits(fold_of[patients.of_slide], validation, folds, split_seed, seeds)
    return _verified(splits, cohort)


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


def read_splits(path: str | Path, cohort: Cohort) -> Splits:
    """Read a `splits.csv` for exactly these slides, and verify it as if it had just been drawn.

    Raises:
        SplitError: the file is no split file, is of other slides or patients, misses a (fold, seed), tests a slide in
            no fold or in several, or breaks a promise of `make_splits`.
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
    parts = np.array([[[table[f, s][x] for x in cohort.slide_ids] for s in seeds] for f in range(folds)])
    test = parts == "test"
    if (test != test[:, :1]).any() or (test[:, 0].sum(axis=0) != 1).any():
        raise SplitError(
            f"{path}: got a slide that is tested in no fold, in several, or for some seeds only → expected one test "
            f"fold per slide, common to all seeds → make the splits anew"
        )
    test_fold = test[:, 0].argmax(axis=0).astype(np.int64)
    return _verified(Splits(test_fold, parts == "validation", folds, None, seeds), cohort)


def _check_arguments(
    patients: _Patients, folds: int, split_seed: int, seeds: tuple[int, ...], validation_fraction: float
) -> None:
    if folds < 2:
        raise SplitError(f"got folds={folds} → expected 2 or more → raise folds")
    if len(patients.ids) < max(folds, 3):
        raise SplitError(
            f"got {len(patients.ids)} patients for {folds} folds → expected at least {max(folds, 3)}, one per fold and "
            f"three in all (train, validation, test) → lower folds or add patients"
        )
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


def _draw_test_folds(
    patients: _Patients, class_names: tuple[str, ...], folds: int, rng: np.random.Generator
) -> IntArray:
    """The fold that tests each patient, [P]."""
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


def _propose_test_folds(patients: _Patients, folds: int, rng: np.random.Generator) -> IntArray | None:
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


def _is_valid(patients: _Patients, fold_of: IntArray, folds: int) -> bool:
    tests = [fold_of == fold for fold in range(folds)]
    return all(test.any() and patients.blocking(test).size == 0 for test in tests)


def _unevenness(patients: _Patients, fold_of: IntArray, folds: int) -> float:
    """Twice the share of slides that even folds would move elsewhere, mean over every class and all slides."""
    held = np.zeros((folds, patients.counts.shape[1]))
    np.add.at(held, fold_of, patients.counts)
    held = np.concatenate([held, held.sum(axis=1, keepdims=True)], axis=1)
    return float(np.abs(held / held.sum(axis=0) - 1 / folds).sum(axis=0).mean())


def _search_test_folds(
    patients: _Patients, class_names: tuple[str, ...], folds: int, rng: np.random.Generator
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


def _emptiest_first(patients: _Patients, fold_of: IntArray, folds: int) -> list[int]:
    """Folds worth trying for the next patient, best last (they are popped); -1 in `fold_of` [P] is not placed yet."""
    placed = fold_of >= 0
    sizes = np.bincount(fold_of[placed], patients.counts.sum(axis=1)[placed], minlength=folds)
    # Empty folds are alike: trying one of them is trying all. Tried before the others, they never stay empty: an
    # assignment that leaves one empty is still valid with a patient moved there, and that one was tried before.
    tried = np.r_[np.flatnonzero(sizes > 0), np.flatnonzero(sizes == 0)[:1]]
    return [int(fold) for fold in tried[np.argsort(-sizes[tried], kind="stable")]]


def _no_split(
    patients: _Patients, class_names: tuple[str, ...], folds: int, blame: Counter[int], exhausted: bool
) -> SplitError:
    names = []
    for index, _ in blame.most_common(3):
        holders = [patients.ids[at] for at in np.flatnonzero(patients.holds[:, index])]
        names.append(f"{class_names[index]!r} (patients {listed(holders, 4)})")
    tried = "no assignment of patients to folds does" if exhausted else f"none found in {SEARCH_STEPS:,} steps"
    return SplitError(
        f"got {len(patients.ids)} patients for {folds} folds, where class {', '.join(names)} cannot stay in every "
        f"training part → expected every class in every training part beside a test and a validation part; {tried} → "
        f"raise folds, add patients of that class, merge it with another, or empty its cells, which leaves it out"
    )


def _draw_validation(patients: _Patients, test: BoolArray, fraction: float, rng: np.random.Generator) -> BoolArray:
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
    patients: _Patients, rest: IntArray, wanted: npt.NDArray[np.float64], cover: bool, rng: np.random.Generator
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


def _verified(splits: Splits, cohort: Cohort) -> Splits:
    """The splits with their warnings, after every part was checked slide by slide, whoever made them."""
    for fold in range(splits.n_folds):
        for seed in splits.seeds:
            _refuse_dishonest(splits.parts(fold, seed), cohort, f"fold {fold}, seed {seed}")
    absences = (_describe_absence(splits, cohort, index) for index in range(len(cohort.class_names)))
    return replace(splits, warnings=tuple(text for text in absences if text))


def _describe_absence(splits: Splits, cohort: Cohort, index: int) -> str:
    """Which test and validation parts lack a class, as a warning; empty if none does."""
    of_class = cohort.labels == index
    n_patients = len({cohort.patient_ids[at] for at in np.flatnonzero(of_class)})
    holding = set(splits.test_fold[of_class].tolist())
    tests = [str(fold) for fold in range(splits.n_folds) if fold not in holding]
    validations = []
    for fold in range(splits.n_folds):
        lacking = np.flatnonzero(~(splits.validation[fold] & of_class).any(axis=1))
        if lacking.size:
            validations.append(f"{fold} (seed {', '.join(str(splits.seeds[at]) for at in lacking)})")
    if not tests and not validations:
        return ""
    few = f", fewer than the {splits.n_folds} folds" if n_patients < splits.n_folds else ""
    text = f"class {cohort.class_names[index]!r} has {n_patients} patients{few}:"
    text += f" no test slide in fold {', '.join(tests)};" if tests else ""
    text += f" no validation slide in fold {', '.join(validations)};" if validations else ""
    return text.rstrip(";")


def _refuse_dishonest(parts: npt.NDArray[np.str_], cohort: Cohort, where: str) -> None:
    patients = np.array(cohort.patient_ids)
    seen: dict[str, str] = {}
    for part in PARTS:
        if not (parts == part).any():
            raise SplitError(f"{where}: got an empty {part} part → expected slides in every part → split anew")
        for patient in np.unique(patients[parts == part]).tolist():
            if patient in seen:
                raise SplitError(
                    f"{where}: got patient {patient!r} in {seen[patient]} and {part} → expected each patient in one "
                    f"part → split by patient"
                )
            seen[patient] = part
    missing = np.setdiff1d(np.arange(len(cohort.class_names)), cohort.labels[parts == "train"])
    if missing.size:
        raise SplitError(
            f"{where}: got no training slide of class {listed(cohort.class_names[at] for at in missing)} → expected "
            f"every class in every training part → split anew, or merge the class with another"
        )


def _read_parts(path: Path, cohort: Cohort) -> defaultdict[tuple[int, int], dict[str, str]]:
    """The part of every slide by (fold, seed), as written."""
    if not path.is_file():
        raise SplitError(f"got {path}, which is no file → expected a splits.csv → check the path")
    patient_of = dict(zip(cohort.slide_ids, cohort.patient_ids, strict=True))
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
            slide_id = _check_split_row(where, row, patient_of)
            parts = table[int(row["fold"]), int(row["seed"])]
            if slide_id in parts:
                raise SplitError(
                    f"{where}: got slide {slide_id!r} again → expected it once per fold and seed → delete it"
                )
            parts[slide_id] = row["split"]
    if not table:
        raise SplitError(f"{path}: got no rows → expected one per fold, seed and slide → make the splits anew")
    return table


def _check_split_row(where: str, row: dict[str, str], patient_of: dict[str, str]) -> str:
    """The slide id of a row that fits the cohort."""
    slide_id, patient_id = row["slide_id"], row["patient_id"]
    if patient_of.get(slide_id) != patient_id:
        expected = f"patient {patient_of[slide_id]!r}" if slide_id in patient_of else "slides of this cohort only"
        raise SplitError(
            f"{where}: got slide {slide_id!r} of patient {patient_id!r} → expected {expected} → use the label table "
            f"and the store the splits were made for, or make them anew"
        )
    if row["split"] not in PARTS or not (row["fold"].isdecimal() and row["seed"].isdecimal()):
        raise SplitError(
            f"{where}: got fold {row['fold']!r}, seed {row['seed']!r}, split {row['split']!r} → expected two integers "
            f"and one of {listed(PARTS)} → mend the row"
        )
    return slide_id
