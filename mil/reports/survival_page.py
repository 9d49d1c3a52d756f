"""The page of a run of survival times."""

from collections.abc import Iterator, Sequence
from typing import Any

from mil.arrays import BoolArray
from mil.cohort.targets import SURVIVAL
from mil.reports.values import Answers, forest_rows, patients_of, rank_values
from mil.statistics.survival import Patients, kaplan_meier
from mil.visualization import target_figures


def survival_figures(answers: Answers) -> Iterator[tuple[str, Any]]:
    """Names and figures of the page of survival."""
    yield "metrics", forest_rows(SURVIVAL, answers.run.evaluation)
    patients = answers.patients
    groups = {name: (patients.times[own], patients.events[own]) for name, own in _risk_groups(answers).items()}
    yield "survival", target_figures.survival_plot(groups, answers.columns[0])


def _risk_groups(answers: Answers) -> dict[str, BoolArray]:
    """Members of the groups of patients, by name."""
    return {"above the median risk": answers.high, "at or below it": ~answers.high}


def survival_view(answers: Answers) -> dict[str, Any]:
    """What the template shows of survival alone."""
    patients = answers.patients
    of_patient = dict(zip(patients.ids, answers.high.tolist(), strict=True))
    risks = rank_values(answers.outcomes.predicted)[:, 0].tolist()
    times = rank_values(answers.outcomes.truth)[:, 0].tolist()
    return {
        "time": answers.columns[0],
        "event": answers.columns[1],
        "by_fold": answers.fold_groups is not None,
        "group_rows": [(name, *_group(patients, own)) for name, own in _risk_groups(answers).items()],
        "composition": [
            (fold, len(rows), *_events_of(answers, rows)) for fold, rows in answers.run.rows_by_fold.items()
        ],
        "slides": [
            {
                "place": at,
                "wrong": False,
                "time": answers.shown(at, 0),
                "event": bool(answers.outcomes.truth[at, 1] == 1),
                "risk": answers.outcomes.predicted[at, 0],
                "high": of_patient[answers.run.patient_ids[at]],
                "time_rank": times[at],
                "risk_rank": risks[at],
            }
            for at in range(len(answers.outcomes.truth))
        ],
    }


def _group(patients: Patients, own: BoolArray) -> tuple[int, int, float | None]:
    """Patients, events, and the first time at which half of a group or less are without the event."""
    curve = kaplan_meier(patients.times[own], patients.events[own])
    reached = curve.times[curve.alive <= 0.5]
    return int(own.sum()), int(patients.events[own].sum()), float(reached[0]) if len(reached) else None


def _events_of(answers: Answers, rows: Sequence[int]) -> tuple[int, int]:
    """Patients among slides, and how many of them have the event."""
    ids = answers.run.patient_ids
    return patients_of(answers, rows), len({ids[at] for at in rows if answers.outcomes.truth[at, 1] == 1})
