"""The report of a run whose target is no class: several labels, numbers or survival; see `write_report`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mil.cohort.targets import HEADLINES, MULTI_LABEL, REGRESSION, SURVIVAL, target_columns
from mil.errors import RunError
from mil.reports.page import (
    Thumbnails,
    curve_pair,
    learning_curves,
    shared_view,
    slide_rows,
    spread_of,
    triple,
    write_page,
)
from mil.runs.run_tables import RunFiles, finite, read_run
from mil.statistics.survival import Patients, by_patient, high_risk, kaplan_meier
from mil.visualization import plotting, target_figures
from mil.visualization.plotting import ForestRow

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

SPREAD_METRICS = {
    MULTI_LABEL: ("macro_auroc", "macro_f1"),
    REGRESSION: ("r2", "pearson", "mae"),
    SURVIVAL: ("concordance",),
}
LABEL_METRICS = {"auroc": "AUROC", "f1": "F1", "sensitivity": "Sensitivity", "specificity": "Specificity"}
GUESSES = {
    "macro_auroc": 0.5,
    "macro_balanced_accuracy": 0.5,
    "r2": 0.0,
    "pearson": 0.0,
    "spearman": 0.0,
    "concordance": 0.5,
}
"""What a draw gives, or always the mean."""


def write_target_report(
    folder: Path, metrics: dict[str, Any], thumbnails: Thumbnails | None = None, title: str | None = None
) -> Path:
    """Write the page and figures of a run of labels, numbers or survival; returns the page's path.

    Args:
        folder: of the run.
        metrics: see `mil.runs.run_tables.read_metrics`.
        thumbnails: gives a slide's thumbnail, uint8 [height, width, 3], or None where it has none.
        title: the heading; target and head by default.

    Raises:
        RunError: a file of the run is missing, or lacks columns or values.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    answers = _read_answers(folder, metrics)
    own = _PAGES[answers.run.metrics["task"]]

    def figures() -> Iterator[tuple[str, Any]]:
        yield from own.figures(answers)
        yield from learning_curves(answers.run)
        yield from _spread_figures(answers.run)

    def view() -> dict[str, Any]:
        shown = _view(answers) | own.view(answers)
        bases = slide_rows(answers.run, thumbnails)
        slides = [base | row for base, row in zip(bases, shown["slides"], strict=True)]
        has_thumbnails = any(slide["thumbnail"] for slide in slides)
        return shown | {"slides": sorted(slides, key=lambda slide: slide["place"]), "has_thumbnails": has_thumbnails}

    return write_page(answers.run, "target_report.html", figures, view, title)


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Answers:
    """What is true of n slides, and what was said of them out of fold.

    Attributes:
        run: the files.
        columns: names of the K targets; time and event of survival.
        truth: [n, K], NaN where a label is unknown.
        said: [n, K] probabilities or numbers, of survival [n, 1] risks.
    """

    run: RunFiles
    columns: tuple[str, ...]
    truth: FloatArray
    said: FloatArray

    @cached_property
    def fold_groups(self) -> list[int] | None:
        """The fold that tests each slide; None where some are tested by several, whose risks are means of models."""
        folds = [self.run.test_folds.get(row["slide_id"], []) for row in self.run.out_of_fold]
        return [each[0] for each in folds] if all(len(each) == 1 for each in folds) else None

    def shown(self, at: int, column: int) -> str:
        """A true number as its table has it."""
        return self.run.out_of_fold[at][f"target_{self.columns[column]}"]

    @cached_property
    def patients(self) -> Patients:
        """Of survival: one row a patient."""
        return by_patient(self.truth, self.said[:, 0], self.run.patient_ids, self.fold_groups)

    @cached_property
    def high(self) -> BoolArray:
        """Whether the risk of each of `patients` is above the median of its fold."""
        return high_risk(self.patients)


def _read_answers(folder: Path, metrics: dict[str, Any]) -> _Answers:
    task = metrics["task"]
    columns = target_columns(task, metrics["target"])
    form = {MULTI_LABEL: "p_{}", REGRESSION: "predicted_{}", SURVIVAL: "risk"}[task]
    true_names = [f"target_{column}" for column in columns]
    said_names = ["risk"] if task == SURVIVAL else [form.format(column) for column in columns]
    run = read_run(folder, metrics, (*true_names, *said_names))
    truth = _values(run, true_names, may_lack=task == MULTI_LABEL)
    return _Answers(run, columns, truth, _values(run, said_names, may_lack=False))


def _values(run: RunFiles, names: Sequence[str], may_lack: bool) -> FloatArray:
    """Columns of oof.csv, [n, names]."""
    values = np.full((len(run.out_of_fold), len(names)), np.nan)
    for at, row in enumerate(run.out_of_fold):
        for column, name in enumerate(names):
            value = finite(row[name])
            if value is None and not (may_lack and row[name] == ""):
                raise RunError(
                    f"got {run.folder / 'oof.csv'} with {row[name]!r} in column {name!r} of slide {row['slide_id']!r} "
                    "→ expected a number → bring the file back from a copy of the run, or train again"
                )
            values[at, column] = np.nan if value is None else value
    return values


# ---------------------------------------------------------------------------------------------- all three


def _spread_metrics(run: RunFiles) -> list[str]:
    """Those that have a value somewhere: errors of several units have no mean, see `mil.statistics.regression`."""
    wanted = SPREAD_METRICS[run.metrics["task"]]
    found = [key for key in wanted if any(replica[key] is not None for replica in run.replicas)]
    return found or [wanted[0]]


def _spread_figures(run: RunFiles) -> Iterator[tuple[str, Any]]:
    task = run.metrics["task"]
    # R² has no lower end, and errors have the unit of their target
    draw = target_figures.free_spread_plot if task == REGRESSION else plotting.spread_plot
    for metric in _spread_metrics(run):
        yield f"spread-{metric}", draw(spread_of(run, metric), run.folds)


def _view(answers: _Answers) -> dict[str, Any]:
    """What the template shows of every task, besides figures and slides."""
    run = answers.run
    task, evaluation = run.metrics["task"], run.evaluation
    names = HEADLINES[task]
    word = {MULTI_LABEL: "Labels", REGRESSION: "Numbers"}.get(task)
    outputs = (word, f"{len(answers.columns)}") if word else ("Patients with the event", f"{evaluation['n_events']}")
    return shared_view(run, outputs, {key: names[key] for key in _spread_metrics(run)}) | {
        "task": task,
        "columns": list(answers.columns),
        "metric_rows": [(key, label, evaluation[key], GUESSES.get(key)) for key, label in names.items()],
    }


def _forest(names: Mapping[str, str], evaluation: Mapping[str, Any]) -> Any:
    """The headline metrics, of which all lie between 0 and 1."""
    # the figure has room for 18 letters, and the table beside it says "mean"
    short = {key: label.removeprefix("Mean ") for key, label in names.items()}
    rows = [
        ForestRow(label[:1].upper() + label[1:], *triple(evaluation[key]), reference=GUESSES.get(key))
        for key, label in short.items()
    ]
    return plotting.forest_plot(rows)


# ---------------------------------------------------------------------------------------------- labels


def _label_figures(answers: _Answers) -> Iterator[tuple[str, Any]]:
    evaluation = answers.run.evaluation
    yield "metrics", _forest(HEADLINES[MULTI_LABEL], evaluation)
    rows = [
        ForestRow(label, *triple(evaluation["targets"][column][key]), group=column)
        for column in answers.columns
        for key, label in LABEL_METRICS.items()
    ]
    yield "labels", plotting.forest_plot(rows)
    patients = np.array(answers.run.patient_ids)
    for at in _curved_labels(answers):
        known = np.isfinite(answers.truth[:, at])
        positive = answers.truth[known, at] == 1
        yield from curve_pair(at, positive, answers.said[known, at], patients[known].tolist())


def _curved_labels(answers: _Answers) -> list[int]:
    """Labels that some tested slides have and some lack, by number."""
    return [at for at, column in enumerate(answers.truth.T) if (column == 1).any() and (column == 0).any()]


def _label_view(answers: _Answers) -> dict[str, Any]:
    targets, truth = answers.run.evaluation["targets"], answers.truth
    wrong = np.isfinite(truth) & ((answers.said >= 0.5) != (truth == 1))
    return {
        "label_rows": [(column, targets[column]) for column in answers.columns],
        "label_metrics": LABEL_METRICS,
        "curves": [(at, answers.columns[at]) for at in _curved_labels(answers)],
        "composition": [(fold, _label_counts(truth[rows])) for fold, rows in answers.run.rows_by_fold.items()],
        "slides": [
            {
                "place": at,
                "wrong": bool(wrong[at].any()),
                "cells": [
                    {"true": _yes_or_no(true), "p": p, "wrong": bool(missed)}
                    for true, p, missed in zip(truth[at], answers.said[at], wrong[at], strict=True)
                ],
            }
            for at in range(len(truth))
        ],
    }


def _label_counts(truth: FloatArray) -> list[tuple[int, int]]:
    """Positive and known slides of each label, from truth [n, K]."""
    return list(zip((truth == 1).sum(axis=0).tolist(), np.isfinite(truth).sum(axis=0).tolist(), strict=True))


def _yes_or_no(value: float) -> str | None:
    return None if np.isnan(value) else "yes" if value == 1 else "no"


# ---------------------------------------------------------------------------------------------- numbers


def _number_figures(answers: _Answers) -> Iterator[tuple[str, Any]]:
    for at in range(len(answers.columns)):
        yield f"scatter-{at}", target_figures.scatter_plot(answers.truth[:, at], answers.said[:, at])


def _number_view(answers: _Answers) -> dict[str, Any]:
    targets, truth = answers.run.evaluation["targets"], answers.truth
    means, deviations = truth.mean(axis=0).tolist(), truth.std(axis=0).tolist()
    folds = answers.run.rows_by_fold
    return {
        "number_rows": [
            (at, column, targets[column], means[at], deviations[at]) for at, column in enumerate(answers.columns)
        ],
        "number_metrics": HEADLINES[REGRESSION],
        "composition": [
            (fold, len(rows), _patients_of(answers, rows), _spans(truth[rows])) for fold, rows in folds.items()
        ],
        "slides": _number_slides(answers),
    }


def _spans(truth: FloatArray) -> list[tuple[float | None, float | None]]:
    """Least and greatest of each target, from truth [n, K]."""
    if not len(truth):
        return [(None, None)] * truth.shape[1]
    return list(zip(truth.min(axis=0).tolist(), truth.max(axis=0).tolist(), strict=True))


def _number_slides(answers: _Answers) -> list[dict[str, Any]]:
    """The largest error first, of several targets by the standard deviations of each."""
    truth, said = answers.truth, answers.said
    errors = said - truth
    spread = truth.std(axis=0)
    scaled = np.abs(errors) / np.where(spread > 0, spread, 1.0)
    ranks = {name: _ranks(values) for name, values in (("true", truth), ("said", said), ("error", np.abs(errors)))}
    places = np.argsort(np.argsort(-scaled.max(axis=1), kind="stable")).tolist()
    return [
        {
            "place": places[at],
            "wrong": False,
            "cells": [
                {"true": answers.shown(at, column), "said": said[at, column], "error": errors[at, column]}
                | {f"{name}_rank": ranks[name][at, column] for name in ranks}
                for column in range(truth.shape[1])
            ],
        }
        for at in range(len(truth))
    ]


def _ranks(values: FloatArray) -> npt.NDArray[np.int64]:
    """Ranks [n, K] of the values in their columns, by which the page sorts: text has no order of signed numbers."""
    columns = [np.unique(column, return_inverse=True)[1] for column in values.T]
    return np.stack(columns, axis=1).astype(np.int64)


def _patients_of(answers: _Answers, rows: Sequence[int]) -> int:
    return len({answers.run.patient_ids[at] for at in rows})


# ---------------------------------------------------------------------------------------------- survival


def _survival_figures(answers: _Answers) -> Iterator[tuple[str, Any]]:
    yield "metrics", _forest(HEADLINES[SURVIVAL], answers.run.evaluation)
    patients = answers.patients
    groups = {name: (patients.times[own], patients.events[own]) for name, own in _risk_groups(answers).items()}
    yield "survival", target_figures.survival_plot(groups, answers.columns[0])


def _risk_groups(answers: _Answers) -> dict[str, BoolArray]:
    """Members of the groups of patients, by name."""
    return {"above the median risk": answers.high, "at or below it": ~answers.high}


def _survival_view(answers: _Answers) -> dict[str, Any]:
    patients = answers.patients
    of_patient = dict(zip(patients.ids, answers.high.tolist(), strict=True))
    risks = _ranks(answers.said)[:, 0].tolist()
    times = _ranks(answers.truth)[:, 0].tolist()
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
                "event": bool(answers.truth[at, 1] == 1),
                "risk": answers.said[at, 0],
                "high": of_patient[answers.run.patient_ids[at]],
                "time_rank": times[at],
                "risk_rank": risks[at],
            }
            for at in range(len(answers.truth))
        ],
    }


def _group(patients: Patients, own: BoolArray) -> tuple[int, int, float | None]:
    """Patients, events, and the first time at which half of a group or less are without the event."""
    curve = kaplan_meier(patients.times[own], patients.events[own])
    reached = curve.times[curve.alive <= 0.5]
    return int(own.sum()), int(patients.events[own].sum()), float(reached[0]) if len(reached) else None


def _events_of(answers: _Answers, rows: Sequence[int]) -> tuple[int, int]:
    """Patients among slides, and how many of them have the event."""
    ids = answers.run.patient_ids
    return _patients_of(answers, rows), len({ids[at] for at in rows if answers.truth[at, 1] == 1})


class _Page(NamedTuple):
    """What is a task's own."""

    figures: Callable[[_Answers], Iterator[tuple[str, Any]]]
    view: Callable[[_Answers], dict[str, Any]]


_PAGES = {
    MULTI_LABEL: _Page(_label_figures, _label_view),
    REGRESSION: _Page(_number_figures, _number_view),
    SURVIVAL: _Page(_survival_figures, _survival_view),
}
