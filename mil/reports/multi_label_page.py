"""The page of a run of several yes-or-no labels."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mil.arrays import FloatArray
from mil.cohort.targets import MULTI_LABEL
from mil.reports.page import curve_pair, triple
from mil.reports.values import Answers, forest_rows
from mil.visualization import plotting
from mil.visualization.plotting import ForestRow

LABEL_METRICS = {"auroc": "AUROC", "f1": "F1", "sensitivity": "Sensitivity", "specificity": "Specificity"}


def label_figures(answers: Answers) -> Iterator[tuple[str, Any]]:
    """Names and figures of the page of labels."""
    evaluation = answers.run.evaluation
    yield "metrics", forest_rows(MULTI_LABEL, evaluation)
    rows = [
        ForestRow(label, *triple(evaluation["targets"][column][key]), group=column)
        for column in answers.columns
        for key, label in LABEL_METRICS.items()
    ]
    yield "labels", plotting.forest_plot(rows)
    patients = np.array(answers.run.patient_ids)
    for at in _curved_labels(answers):
        known = np.isfinite(answers.outcomes.truth[:, at])
        positive = answers.outcomes.truth[known, at] == 1
        yield from curve_pair(at, positive, answers.outcomes.predicted[known, at], patients[known].tolist())


def _curved_labels(answers: Answers) -> list[int]:
    """Labels that some tested slides have and some lack, by number."""
    return [at for at, column in enumerate(answers.outcomes.truth.T) if (column == 1).any() and (column == 0).any()]


def label_view(answers: Answers) -> dict[str, Any]:
    """What the template shows of labels alone."""
    targets, truth = answers.run.evaluation["targets"], answers.outcomes.truth
    wrong = np.isfinite(truth) & ((answers.outcomes.predicted >= 0.5) != (truth == 1))
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
                    for true, p, missed in zip(truth[at], answers.outcomes.predicted[at], wrong[at], strict=True)
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
