"""Splits that somebody else has fixed: the parts are given, and only checked and completed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from mil.arrays import BoolArray, IntArray
from mil.cohort.cohort import Cohort
from mil.errors import SplitError, did_you_mean, listed
from mil.splits.patients import Patients
from mil.splits.record import SplitRecord
from mil.splits.splits import PARTS, UNUSED, CodeArray, Splits
from mil.splits.validation import check_draws, draw_validation
from mil.splits.verification import refuse_shared_patients, verify_splits

_CODES = {part: code for code, part in enumerate((*PARTS, UNUSED))}
_VALIDATION = _CODES["validation"]

_SPELLINGS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
    "": UNUSED,
    UNUSED: UNUSED,
}


def part_name(text: str) -> str | None:
    """The part that a word means, "unused" for none at all; None where it means no part.

    >>> part_name("Val")
    'validation'
    """
    return _SPELLINGS.get(text.strip().lower())


def fixed_splits(
    cohort: Cohort,
    parts: Sequence[Sequence[str]],
    record: SplitRecord | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    validation_fraction: float = 0.2,
    split_seed: int = 0,
) -> Splits:
    """Splits with the parts that are given, the same for every seed.

    A fold that names no validation slide gets a validation part from its training part, drawn by patient for each seed
    as `make_splits` draws it: early stopping has to watch something, and that is never the test part.

    Args:
        cohort: n slides.
        parts: [n_folds, n], words for the part of every slide (train, val or validation, test); empty for none.
        record: where they come from; by default method "fixed" and nothing else.
        seeds: the seeds that replicas are trained with; they draw the validation parts that are not given.
        validation_fraction: of a training part, where its validation part is drawn.
        split_seed: draws the validation parts, with the seeds.

    Raises:
        SplitError: another word, a patient in two parts (they are named, with the slides), no training or test slide,
            or a training part without some class, or too small to spare a validation part.
    """
    seeds = tuple(seeds)
    check_draws(split_seed, seeds, validation_fraction)
    if not len(parts):
        raise SplitError("got no fold → expected the part of every slide, for one fold or more → name them")
    record = record or SplitRecord("fixed")
    source = f"{record.source}, " if record.source else ""
    codes = np.stack([_fold_codes(cohort, words, f"{source}fold {fold}") for fold, words in enumerate(parts)])
    given = (codes == _VALIDATION).any(axis=1)
    found = np.repeat(codes[:, None], len(seeds), axis=1)
    for fold in np.flatnonzero(~given).tolist():
        training = _Training(cohort, codes[fold], f"{source}fold {fold}")
        for at, seed in enumerate(seeds):
            rng = np.random.default_rng((split_seed, fold, seed))
            found[fold, at, training.draw(validation_fraction, rng)] = _VALIDATION
    if not given.all():
        drawn = {"split_seed": split_seed, "seeds": list(seeds), "validation_fraction": validation_fraction}
        record = replace(record, parameters={**record.parameters, **drawn})
    record = replace(record, validation="given" if given.all() else "mixed" if given.any() else "drawn")
    return verify_splits(Splits(found, None, seeds, record, tuple(_remarks(cohort, codes, given))), cohort)


def _fold_codes(cohort: Cohort, words: Sequence[str], where: str) -> CodeArray:
    """Codes [n] of one fold; words and patients are checked."""
    if len(words) != len(cohort):
        raise SplitError(
            f"{where}: got parts of {len(words)} slides → expected one for each of the {len(cohort)} slides → leave "
            f"the word empty for slides that are in no part"
        )
    names = [part_name(word) for word in words]
    for slide_id, word, name in zip(cohort.slide_ids, words, names, strict=True):
        if name is None:
            raise SplitError(
                f"{where}: got {word!r} as part of slide {slide_id!r} → expected train, val (or validation), test, or "
                f"an empty cell → {did_you_mean(word, list(_SPELLINGS))}mend the word"
            )
    codes = np.array([_CODES[name] for name in names if name is not None], dtype=np.int8)
    for part in ("train", "test"):
        if not (codes == _CODES[part]).any():
            raise SplitError(
                f"{where}: got no {part} slide → expected slides to train with and others to test on → name some; a "
                f"missing validation part is drawn from the training part"
            )
    refuse_shared_patients(codes, cohort, where)
    return codes


class _Training:
    """The training part of one fold, given as codes [n], from which validation parts are drawn by patient."""

    def __init__(self, cohort: Cohort, codes: CodeArray, where: str) -> None:
        self._slides = np.flatnonzero(codes == _CODES["train"])
        self._patients = Patients.of(cohort.subset(self._slides))
        self._nobody = np.zeros(len(self._patients.ids), dtype=bool)
        blocking = self._patients.blocking(self._nobody)
        if blocking.size:
            raise SplitError(
                f"{where}: got no validation part, and class {listed(cohort.class_names[at] for at in blocking)} at "
                f"too few training patients to draw one → expected every class in the training part beside it → name "
                f"validation slides (never from the test part)"
            )

    def draw(self, fraction: float, rng: np.random.Generator) -> IntArray:
        """Positions of the slides that validate."""
        chosen = draw_validation(self._patients, self._nobody, fraction, rng)
        return np.asarray(self._slides[chosen[self._patients.of_slide]])


def _remarks(cohort: Cohort, codes: CodeArray, given: BoolArray) -> Iterator[str]:
    """What a reader should know of fixed splits, codes [n_folds, n]."""
    if not given.all():
        folds = ", ".join(map(str, np.flatnonzero(~given)))
        yield f"no validation slides are given in fold {folds}: they are drawn from the training part, by seed"
    times = (codes == _CODES["test"]).sum(axis=0)
    for text, chosen in (
        ("in no part of any fold", (codes == _CODES[UNUSED]).all(axis=0)),
        ("tested in no fold: they have no out-of-fold prediction", times == 0),
        ("tested in several folds, and others in fewer: test parts overlap", (times > 1) & (times > times.min())),
    ):
        if chosen.any():
            names = listed((cohort.slide_ids[at] for at in np.flatnonzero(chosen)), 4)
            yield f"{int(chosen.sum())} slides are {text} ({names})"
