"""Predictions of several models about the same slides, in one order."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mil.cohort.cohort import Cohort
from mil.errors import RunError, listed
from mil.evaluation.averaging import Average
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.replica_predictions import ReplicaPredictions


def aligned(first_name: str, first: Outcomes, name: str, other: Outcomes) -> Outcomes:
    """What another model predicts, with rows and classes or columns in the order of the first.

    Raises:
        RunError: see `match`, or other folds for survival.
    """
    rows, columns = match(first_name, first.cohort, name, other.cohort)
    if first.folds != other.folds or (first.folds and first.cohort.slide_ids != other.cohort.slide_ids):
        raise _other_folds(f"{first_name} and {name}")
    return other if first.folds else replace(first, predicted=other.predicted[np.ix_(rows, columns)])


def join_runs(runs: Sequence[ReplicaPredictions], average: Average) -> ReplicaPredictions:
    """The members of an ensemble; slides and classes have the order of the first, and slides that one lacks are left
    out. Of several runs for survival the risks are put on one scale, see `mil.evaluation.averaging`.

    Raises:
        RunError: see `match`; runs for survival that were tested in other folds, or whose risks do not vary.
    """
    known = [set(run.cohort.slide_ids) for run in runs]
    shared = [slide_id for slide_id in runs[0].cohort.slide_ids if all(slide_id in each for each in known)]
    first = runs[0].cohort.subset(_positions(runs[0].cohort, shared))
    members = []
    for at, run in enumerate(runs, start=1):
        rows = _positions(run.cohort, shared)
        _, columns = match("member 1", first, f"member {at}", run.cohort.subset(rows))
        members.append(replace(run, cohort=first, parts=run.parts[:, rows], values=run.values[:, rows][..., columns]))
    joined = _join(members, average)
    if first.kind.has_scale or len(runs) == 1:
        return joined
    if not joined.share_folds():
        raise _other_folds("members")
    return _join([member.standardised() for member in members], average)


def _join(members: Sequence[ReplicaPredictions], average: Average) -> ReplicaPredictions:
    return ReplicaPredictions(
        cohort=members[0].cohort,
        replicas=tuple(replica for member in members for replica in member.replicas),
        parts=np.concatenate([member.parts for member in members]),
        values=np.concatenate([member.values for member in members]),
        members=tuple(at for at, member in enumerate(members) for _ in member.replicas),
        average=average,
    )


def match(first_name: str, first: Cohort, name: str, other: Cohort) -> tuple[list[int], list[int]]:
    """Where another cohort has the slides of the first, and what is predicted of it the classes or columns.

    Raises:
        RunError: other tasks, classes or columns, other slides, patients or truths.
    """
    if not first.is_predicted_like(other):
        raise RunError(
            f"got {first_name} {_target(first)}, and {name} {_target(other)} → expected one task and the same columns "
            f"or classes → take runs of one label table and target"
        )
    _require_same_slides(first_name, first, name, other)
    names = other.predicted_names
    columns = [names.index(each) for each in first.predicted_names] if first.kind.has_scale else [0]
    return _positions(other, first.slide_ids), columns


def _target(cohort: Cohort) -> str:
    classes = f" (classes {listed(cohort.class_names)})" if cohort.has_classes else ""
    return f"of task {cohort.task}, target {cohort.target}{classes}"


def _positions(cohort: Cohort, slide_ids: Sequence[str]) -> list[int]:
    at = {slide_id: row for row, slide_id in enumerate(cohort.slide_ids)}
    return [at[slide_id] for slide_id in slide_ids]


def _other_folds(who: str) -> RunError:
    return RunError(
        f"got {who} for survival, which were tested in different folds → expected the same folds, as patients are "
        f"compared within a fold alone → train them with the same folds and split_seed"
    )


def _require_same_slides(first_name: str, first: Cohort, name: str, other: Cohort) -> None:
    """Refuse a run of other slides, patients or labels, with the slides that differ."""
    facts, others = _facts(first, first.predicted_names), _facts(other, first.predicted_names)
    what = "class" if first.has_classes else "target"
    differences = {
        f"only in {first_name}": [slide for slide in facts if slide not in others],
        f"only in {name}": [slide for slide in others if slide not in facts],
        "of another patient": [s for s in facts if s in others and facts[s][0] != others[s][0]],
        f"of another {what}": [s for s in facts if s in others and facts[s][1] != others[s][1]],
    }
    told = [f"{len(slides)} slides {what}: {listed(slides)}" for what, slides in differences.items() if slides]
    if told:
        raise RunError(
            f"got {first_name} and {name} of different slides ({'; '.join(told)}) → expected runs of the same slides, "
            f"patients and labels → train both with one label table and target, on stores with the same slides"
        )


def _facts(cohort: Cohort, names: tuple[str, ...]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Patient and truth of every slide, columns in this order; text, since an unknown label equals nothing."""
    truths: list[tuple[str, ...]]
    if cohort.has_classes:
        truths = [(cohort.class_names[label],) for label in cohort.labels.tolist()]
    else:
        order = [cohort.columns.index(name) for name in names]
        truths = [tuple(map(str, row)) for row in cohort.targets[:, order].tolist()]
    return dict(zip(cohort.slide_ids, zip(cohort.patient_ids, truths, strict=True), strict=True))
