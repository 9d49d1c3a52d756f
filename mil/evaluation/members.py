"""What every member of a model says about the slides of one cohort; a single run is a model of one member."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mil.arrays import BoolArray, FloatArray, IntArray
from mil.cohort.cohort import Cohort
from mil.cohort.targets import SURVIVAL
from mil.errors import RunError, listed
from mil.evaluation.averaging import Average, combine, standardise_risks
from mil.evaluation.predictions import Outcomes, ReplicaPredictions


@dataclass(frozen=True, eq=False)
class MemberPredictions:
    """Members of the same n slides and targets, in one order.

    Attributes:
        members: of each the predictions of its replicas; of several the risks are on one scale, see
            `mil.evaluation.averaging`.
        average: what is averaged over members; over the replicas of a member it is always what they say.
    """

    members: tuple[ReplicaPredictions, ...]
    average: Average = "probabilities"

    @classmethod
    def aligned(cls, members: Sequence[ReplicaPredictions], average: Average) -> "MemberPredictions":
        """Put slides and classes of all members into the order of the first; slides that one lacks are left out.

        Raises:
            RunError: other targets or classes, or other patients or labels for the same slide; members for survival
                that were tested in other folds, or whose risks do not vary.
        """
        first, *others = (member.cohort.slide_ids for member in members)
        shared = [slide_id for slide_id in first if all(slide_id in each for each in map(set, others))]
        for member in members[1:]:
            _require_same_target(members[0].cohort, member.cohort)
        found = tuple(_reordered(member, shared, members[0].cohort) for member in members)
        for member in found[1:]:
            _require_same_labels(found[0], member)
        aligned = cls(found, average)
        if aligned.cohort.task != SURVIVAL or len(found) == 1:
            return aligned
        if not aligned.share_folds():
            raise RunError(
                "got members for survival that were tested in different folds → expected the same folds, as patients "
                "are compared within a fold alone → train the members with the same folds and split_seed"
            )
        return cls(tuple(map(standardise_risks, found)), average)

    @property
    def cohort(self) -> Cohort:
        """The slides that all members know."""
        return self.members[0].cohort

    @property
    def folds(self) -> IntArray:
        """The folds of the first member, sorted."""
        return np.unique([replica.fold for replica in self.members[0].replicas])

    def share_folds(self) -> bool:
        """Whether every fold tests the same slides in all members, so that it may be judged on its own."""
        first = self.members[0]
        return all(
            np.array_equal(MemberPredictions((each,)).folds, self.folds)
            and all(np.array_equal(_tests(each, fold), _tests(first, fold)) for fold in self.folds)
            for each in self.members
        )

    def tests(self, fold: int) -> BoolArray:
        """The slides [n] that a fold tests in the first member."""
        return _tests(self.members[0], fold)

    def held(self, part: str) -> int:
        """How many slides some replica of some member had in a part."""
        return int(np.any([(member.parts == part).any(axis=0) for member in self.members], axis=0).sum())

    def mean_over(self, part: str, fold: int | None = None) -> tuple[IntArray, FloatArray]:
        """The slides that every member had in a part, as rows of the cohort, and what is said of them [rows, values].

        A member says the mean of its replicas that had the slide in that part; of one fold, if that is given.

        Raises:
            RunError: there is no such slide.
        """
        weights = [_held(member, part, fold) for member in self.members]
        rows = np.flatnonzero(np.all([each.any(axis=0) for each in weights], axis=0))
        if not len(rows):
            raise RunError(
                f"got a model without {part} slides{'' if fold is None else f' in fold {fold}'} that all its members "
                f"share → expected some to choose a threshold by → give --abstain-below instead"
            )
        means = [_mean(member, each, rows) for member, each in zip(self.members, weights, strict=True)]
        return rows, means[0] if len(means) == 1 else combine(means, self.average, self.cohort.task)

    def tested(self) -> tuple[Cohort, FloatArray]:
        """The slides that every member tested, and what is said of them out of fold [tested, values]."""
        rows, values = self.mean_over("test")
        return self.cohort.subset(rows), values

    def outcomes(self) -> Outcomes:
        """The same beside the truth, as scoring wants it: of survival by fold, as patients are compared within one."""
        if self.cohort.task != SURVIVAL:
            return Outcomes(*self.tested())
        found = [self.mean_over("test", fold) for fold in self.folds.tolist() if self.tests(fold).any()]
        return Outcomes.of_folds(Outcomes(self.cohort.subset(rows), values) for rows, values in found)


def _require_same_target(first: Cohort, other: Cohort) -> None:
    if not first.is_predicted_like(other):
        told = [
            f"of task {each.task}, target {each.target}"
            + (f" (classes {listed(each.class_names)})" if each.values is None else "")
            for each in (first, other)
        ]
        raise RunError(
            f"got members {', and '.join(told)} → expected one task and the same columns or classes → average runs of "
            f"one target"
        )


def _reordered(said: ReplicaPredictions, slide_ids: Sequence[str], wanted: Cohort) -> ReplicaPredictions:
    """The slides in this order, and classes or columns in the order of another cohort."""
    at = {slide_id: row for row, slide_id in enumerate(said.cohort.slide_ids)}
    rows = [at[slide_id] for slide_id in slide_ids]
    cohort, parts, values = said.cohort.subset(rows), said.parts[:, rows], said.probabilities[:, rows]
    if cohort.values is None:
        names = wanted.class_names
        labels = np.array([names.index(cohort.class_names[label]) for label in cohort.labels], dtype=np.int64)
        order = [cohort.class_names.index(name) for name in names]
        cohort = replace(cohort, class_names=names, labels=labels)
        return ReplicaPredictions(cohort, said.replicas, parts, values[:, :, order])
    if cohort.task == SURVIVAL or cohort.columns == wanted.columns:
        return replace(said, cohort=cohort, parts=parts, probabilities=values)
    order = [cohort.columns.index(name) for name in wanted.columns]
    cohort = replace(cohort, target=wanted.target, values=cohort.values[:, order])
    tasks = tuple({**task, "columns": list(wanted.columns)} for task in said.tasks)
    return ReplicaPredictions(cohort, said.replicas, parts, values[:, :, order], tasks)


def _require_same_labels(first: ReplicaPredictions, other: ReplicaPredictions) -> None:
    # unknown labels are NaN, which equals nothing; their text does
    pairs = [
        zip(each.cohort.patient_ids, map(str, each.cohort.targets.tolist()), strict=True) for each in (first, other)
    ]
    differing = [slide_id for slide_id, one, two in zip(first.cohort.slide_ids, *pairs, strict=True) if one != two]
    if differing:
        raise RunError(
            f"got members that differ in patient or label of {listed(differing)} → expected runs of one label table → "
            f"train them with the same"
        )


def _of_fold(said: ReplicaPredictions, fold: int | None) -> BoolArray:
    """Which replicas are of a fold, [R]; all where none is given."""
    folds = np.array([replica.fold for replica in said.replicas])
    return np.ones(len(folds), dtype=bool) if fold is None else folds == fold


def _tests(said: ReplicaPredictions, fold: int) -> BoolArray:
    found: BoolArray = (said.parts[_of_fold(said, fold)] == "test").any(axis=0)
    return found


def _held(said: ReplicaPredictions, part: str, fold: int | None) -> FloatArray:
    """1 where a replica had a slide in the part, [R, n]."""
    held: FloatArray = ((said.parts == part) & _of_fold(said, fold)[:, None]).astype(np.float64)
    return held


def _mean(said: ReplicaPredictions, held: FloatArray, rows: IntArray) -> FloatArray:
    weights = held[:, rows] / held[:, rows].sum(axis=0)
    mean: FloatArray = np.einsum("rn,rnc->nc", weights, said.probabilities[:, rows])
    return mean
