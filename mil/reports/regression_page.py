"""The page of a run of numbers."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mil.arrays import FloatArray
from mil.cohort.targets import REGRESSION
from mil.evaluation.headlines import HEADLINES
from mil.reports.values import Answers, patients_of, rank_values
from mil.visualization import target_figures


def number_figures(answers: Answers) -> Iterator[tuple[str, Any]]:
    """Names and figures of the page of numbers."""
    truth, predicted = answers.outcomes.truth, answers.outcomes.predicted
    for at in range(len(answers.columns)):
        yield f"scatter-{at}", target_figures.scatter_plot(truth[:, at], predicted[:, at])


def number_view(answers: Answers) -> dict[str, Any]:
    """What the template shows of numbers alone."""
    targets, truth = answers.run.evaluation["targets"], answers.outcomes.truth
    means, deviations = truth.mean(axis=0).tolist(), truth.std(axis=0).tolist()
    folds = answers.run.rows_by_fold
    return {
        "number_rows": [
            (at, column, targets[column], means[at], deviations[at]) for at, column in enumerate(answers.columns)
        ],
        "number_metrics": HEADLINES[REGRESSION],
        "composition": [
            (fold, len(rows), patients_of(answers, rows), _spans(truth[rows])) for fold, rows in folds.items()
        ],
        "slides": _number_slides(answers),
    }


def _spans(truth: FloatArray) -> list[tuple[float | None, float | None]]:
    """Least and greatest of each target, from truth [n, K]."""
    if not len(truth):
        return [(None, None)] * truth.shape[1]
    return list(zip(truth.min(axis=0).tolist(), truth.max(axis=0).tolist(), strict=True))


def _number_slides(answers: Answers) -> list[dict[str, Any]]:
    """The largest error first, of several targets by the standard deviations of each."""
    truth, predicted = answers.outcomes.truth, answers.outcomes.predicted
    errors = predicted - truth
    spread = truth.std(axis=0)
    scaled = np.abs(errors) / np.where(spread > 0, spread, 1.0)
    values = {"true": truth, "predicted": predicted, "error": np.abs(errors)}
    ranks = {name: rank_values(each) for name, each in values.items()}
    places = np.argsort(np.argsort(-scaled.max(axis=1), kind="stable")).tolist()
    return [
        {
            "place": places[at],
            "wrong": False,
            "cells": [
                {"true": answers.shown(at, column), "predicted": predicted[at, column], "error": errors[at, column]}
                | {f"{name}_rank": ranks[name][at, column] for name in ranks}
                for column in range(truth.shape[1])
            ],
        }
        for at in range(len(truth))
    ]
