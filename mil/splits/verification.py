"""Splits checked after they were made: no shared patient, every class in every training part."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mil.cohort.cohort import Cohort
from mil.errors import SplitError, listed
from mil.splits.splits import PARTS, TEST_CODE, TRAIN_CODE, UNUSED_CODE, CodeArray, Splits


def verify_splits(splits: Splits, cohort: Cohort) -> Splits:
    """The splits with their warnings, after every part was checked slide by slide, whoever made them.

    Raises:
        SplitError: a patient in two parts (named with the slides), an empty part, a test part that differs between
            seeds, or a training part without some class.
    """
    if (splits.codes.shape[2] != len(cohort)) or ((splits.codes == TEST_CODE) != splits.test[:, None]).any():
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
    missing = np.setdiff1d(np.arange(len(cohort.class_names)), cohort.labels[codes == TRAIN_CODE])
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
    used = codes != UNUSED_CODE
    present[of_slide[used], codes[used]] = True
    found = []
    for at in np.flatnonzero(present.sum(axis=1) > 1):
        parts = " and ".join(part for part, here in zip(PARTS, present[at], strict=True) if here)
        slides = listed((cohort.slide_ids[x] for x in np.flatnonzero(used & (of_slide == at))), 4)
        found.append(f"patient {str(patients[at])!r} in {parts} (slides {slides})")
    return found
