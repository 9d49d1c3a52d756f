"""Patient-grouped, stratified splits, verified after splitting.

Every slide is in the test part of exactly one fold per repeat, whatever the seed; the validation part is drawn from the
rest per (fold, seed). A patient never appears in two parts, and every training part holds every class, always. A class
may be absent from a test or validation part (of ten patients, two may hold it): that is reported as a warning.

Folds are numbered through all repeats: fold 7 of 3 repeats of 5 folds is the third of the second repeat. So a fold and
a seed name a replica, however the folds were made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mil.arrays import BoolArray, IntArray
from mil.errors import SplitError, listed
from mil.splits.record import SplitRecord

PARTS = ("train", "validation", "test")
UNUSED = "unused"
PART_NAMES = np.array((*PARTS, UNUSED))
TRAIN_CODE, VALIDATION_CODE, TEST_CODE, UNUSED_CODE = range(4)
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
        return np.asarray(self.codes[:, 0] == TEST_CODE)

    @property
    def validation(self) -> BoolArray:
        """The slides that validate, bool [n_folds, len(seeds), n]."""
        return np.asarray(self.codes == VALIDATION_CODE)

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
        found = number_of_repeat(self.test)
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
        return np.asarray(PART_NAMES[self.codes[fold, self.seeds.index(seed)]])

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


def number_of_repeat(test: BoolArray) -> IntArray | None:
    """The repeat of each fold [n_folds], or None unless the folds test every slide once, and so on per repeat."""
    times = test.cumsum(axis=0)
    whole = (times == times[:, :1]).all(axis=1)
    n_repeats = int(whole.sum())
    if not whole[-1] or (times[whole, 0] != np.arange(1, n_repeats + 1)).any():
        return None
    return np.concatenate([[0], whole[:-1].cumsum()]).astype(np.int64)
