"""What every replica of a run or an ensemble predicts, and the means that scores are of.

A run is an ensemble of one member. The mean is taken over the replicas of a member first, and then over members.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np

from mil.arrays import BoolArray, FloatArray, IntArray
from mil.cohort.cohort import Cohort
from mil.errors import RunError
from mil.evaluation.averaging import Average, Scale, combine, mean_where
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.tables import truth_cells, truth_names
from mil.files import Row, probability_text
from mil.training.replica import PartArray, ReplicaId


@dataclass(frozen=True, eq=False)
class ReplicaPredictions:
    """What every replica predicts of every slide.

    Attributes:
        cohort: the n slides with patients and labels.
        replicas: the R replicas.
        parts: [R, n], the part that each slide was in.
        values: float64 [R, n, values], probabilities of classes or labels, numbers, or one risk, see
            `mil.training.tasks.decode`.
        members: [R], the member of an ensemble that each replica belongs to; may be left out for a run.
        average: what is averaged over members; over the replicas of a member it is always their values.
        head: its name, for messages.

    Example:
        >>> run.predictions.out_of_fold().shape      # doctest: +SKIP
        (106, 2)
    """

    cohort: Cohort
    replicas: tuple[ReplicaId, ...]
    parts: PartArray
    values: FloatArray
    members: tuple[int, ...] = ()
    average: Average = "probabilities"
    head: str = ""

    @property
    def probabilities(self) -> FloatArray:
        """`values`, as version 0.1 calls them."""
        return self.values

    @property
    def folds(self) -> IntArray:
        """The folds, ascending."""
        return np.unique(self._fold_of)

    @property
    def _fold_of(self) -> IntArray:
        return np.array([replica.fold for replica in self.replicas], dtype=np.int64)

    def subset(self, chosen: BoolArray) -> "ReplicaPredictions":
        """Some of the replicas, chosen [R]."""
        return replace(
            self,
            replicas=tuple(compress(self.replicas, chosen)),
            parts=self.parts[chosen],
            values=self.values[chosen],
            members=tuple(compress(self.members, chosen)),
        )

    def split(self) -> list["ReplicaPredictions"]:
        """Every member on its own."""
        if not self.members:
            return [self]
        member_of = np.array(self.members)
        return [self.subset(member_of == member) for member in np.unique(member_of)]

    def tests(self, fold: int) -> BoolArray:
        """The slides [n] that a fold tests."""
        return np.asarray(self._held("test", fold).any(axis=0))

    def share_folds(self) -> bool:
        """Whether every fold tests the same slides in all members, so that it may be judged on its own."""
        first, *others = self.split()
        return all(
            np.array_equal(each.folds, first.folds)
            and all(np.array_equal(each.tests(fold), first.tests(fold)) for fold in first.folds)
            for each in others
        )

    def held(self, part: str) -> int:
        """How many slides some replica had in a part."""
        return int((self.parts == part).any(axis=0).sum())

    def _held(self, part: str, fold: int | None) -> BoolArray:
        """Whether a replica, of this fold if one is given, had a slide in the part, [R, n]."""
        held: BoolArray = np.equal(self.parts, part)
        return held if fold is None else held & (self._fold_of == fold)[:, None]

    def mean_over(self, part: str, fold: int | None = None) -> tuple[IntArray, FloatArray]:
        """The slides that every member had in a part, as rows of the cohort, and their mean prediction [rows, values].

        That of a member is the mean of its replicas that had the slide in that part; of one fold, if that is given.

        Raises:
            RunError: there is no such slide.
        """
        members = [(each.values, each._held(part, fold)) for each in self.split()]
        rows = np.flatnonzero(np.all([held.any(axis=0) for _, held in members], axis=0))
        if not len(rows):
            validates = part == "validation"
            remedy = "give --abstain-below instead" if validates else "train again, or bring predictions.csv back"
            raise RunError(
                f"got a model without {part} slides{'' if fold is None else f' in fold {fold}'} that all its members "
                f"share → expected some to {'choose a threshold by' if validates else 'score'} → {remedy}"
            )
        means = [mean_where(*member)[rows] for member in members]
        return rows, means[0] if len(means) == 1 else combine(means, self.average, self.cohort.task)

    def tested(self) -> tuple[Cohort, FloatArray]:
        """The slides that every member tested, and their mean prediction out of fold [tested, values].

        Only fixed splits leave slides of a run untested.
        """
        rows, values = self.mean_over("test")
        return self.cohort.subset(rows), values

    def out_of_fold(self) -> FloatArray:
        """The same of all slides [n, values]; NaN for one that was not tested."""
        rows, values = self.mean_over("test")
        found = np.full((len(self.cohort), values.shape[1]), np.nan)
        found[rows] = values
        return found

    def outcomes(self) -> Outcomes:
        """The same beside the truth; for survival by fold, as patients are compared within one."""
        if self.cohort.kind.has_scale:
            return Outcomes(*self.tested())
        found = [self.mean_over("test", fold) for fold in self.folds.tolist() if self.tests(fold).any()]
        return Outcomes.of_folds(Outcomes(self.cohort.subset(rows), values) for rows, values in found)

    def scale(self, fold: int | None = None) -> Scale:
        """That of the risks of a run, or of one fold: means over its replicas, each on its own validation part.

        No slide that a fold tests has a say in that fold's scale.

        Raises:
            RunError: the risks of all validation slides are the same, or there are none.
        """
        held = zip(self.values[:, :, 0], self._held("validation", fold), strict=True)
        scale = Scale.of([risks[validates] for risks, validates in held if validates.any()])
        if scale is None:
            raise RunError(
                f"got a run of {self.head} whose risks are the same for all "
                f"{'' if fold is None else f'of fold {fold} '}validation slides → expected some that differ, which "
                f"tell its scale from that of others → leave it out"
            )
        return scale

    def standardised(self) -> "ReplicaPredictions":
        """A run whose risks have, in every fold, the unit of that fold's validation slides."""
        scales = {fold: self.scale(fold) for fold in dict.fromkeys(self._fold_of.tolist())}
        risks = [scales[each.fold].apply(values) for each, values in zip(self.replicas, self.values, strict=True)]
        return replace(self, values=np.stack(risks))

    def seed_scores(self, metric: str) -> Iterator[float]:
        """A headline metric of what the replicas of each seed alone predict out of fold."""
        seed_of = np.array([replica.seed for replica in self.replicas])
        for seed in dict.fromkeys(seed_of.tolist()):
            yield float(self.subset(seed_of == seed).outcomes().scores(only=metric)[metric][0])

    def rows(self) -> Iterator[Row]:
        """Rows of ``predictions.csv``."""
        cohort = self.cohort
        columns = (*truth_names(cohort), *cohort.prediction_names)
        yield ("slide_id", "patient_id", "replica", "fold", "seed", "split", *columns)
        for replica, parts, values in zip(self.replicas, self.parts, self.values, strict=True):
            for at, slide_id in enumerate(cohort.slide_ids):
                who = (slide_id, cohort.patient_ids[at], replica.name, replica.fold, replica.seed)
                yield (*who, parts[at], *truth_cells(cohort, at), *map(probability_text, values[at]))
