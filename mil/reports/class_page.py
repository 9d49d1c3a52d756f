"""The page of a run of classes: figures, tables, operating points."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mil.cohort.targets import CLASSIFICATION
from mil.errors import RunError
from mil.evaluation.headlines import HEADLINES, RECORDS, replica_metrics
from mil.evaluation.tables import stated_outcomes
from mil.reports.page import Thumbnails, curve_pair, learning_curves, shared_view, slide_rows, spread_of, triple
from mil.runs.run_tables import RunFiles, finite, read_run
from mil.statistics.abstention import evaluate_abstention
from mil.statistics.calibration import evaluate_calibration
from mil.visualization import curve_figures, plotting
from mil.visualization.plotting import ForestRow

METRICS = HEADLINES[CLASSIFICATION]
SPREAD_METRICS = replica_metrics(CLASSIFICATION)
CLASS_METRICS = {"recall": "Recall", "precision": "Precision", "f1": "F1", "auroc": "AUROC"}
COUNTS = {"tp": "TP", "fp": "FP", "fn": "FN", "tn": "TN"}


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Classes:
    """A run of classes, and every class at its operating point."""

    run: RunFiles
    operating: list[dict[str, Any]]

    @property
    def names(self) -> list[str]:
        return list(self.run.metrics["class_names"])

    @cached_property
    def predictions(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Labels [n], probabilities [n, C] and patients [n], out of fold."""
        outcomes = stated_outcomes(self.run.out_of_fold, self.run.metrics)
        values = outcomes.predicted
        return outcomes.cohort.labels, values / values.sum(axis=1, keepdims=True), self.run.patient_ids

    @cached_property
    def calibration(self) -> dict[str, Any]:
        """See `mil.statistics.calibration.evaluate_calibration`; runs of earlier versions do not hold it."""
        stored: dict[str, Any] | None = self.run.metrics.get("calibration")
        return stored or evaluate_calibration(*self.predictions, self.names)

    @cached_property
    def abstention(self) -> dict[str, Any]:
        """See `mil.statistics.abstention.evaluate_abstention`."""
        return evaluate_abstention(*self.predictions, self.names)


def read_classes(folder: Path, metrics: dict[str, Any]) -> _Classes:
    """Truth and predictions of a run of classes.

    Raises:
        RunError: a table lacks a column or holds something else than numbers.
    """
    run = read_run(folder, metrics, ("target", "predicted"))
    classes = _Classes(run, _operating_points(folder))
    _check_classes(classes)
    return classes


def _operating_points(folder: Path) -> list[dict[str, Any]]:
    """Every class at the highest Youden index, see `mil.evaluation.operating_points`; none of a run that holds no such
    predictions."""
    # they load torch, which no other part of a page needs
    from mil.evaluation.operating_points import operate_one_vs_rest
    from mil.runs.run_folder import read_predictions

    if not (folder / "predictions.csv").is_file():
        return []
    return [
        {
            "class_name": point.class_name,
            "thresholds": [min(point.thresholds), max(point.thresholds)],
            "sensitivity": point.sensitivity,
            "specificity": point.specificity,
        }
        for point in operate_one_vs_rest(read_predictions(folder))
    ]


def _check_classes(classes: _Classes) -> None:
    """Every label and probability column of oof.csv belongs to a class of metrics.json."""
    names, run = classes.names, classes.run
    for row in run.out_of_fold:
        lacking = [f"p_{name}" for name in names if f"p_{name}" not in row]
        strange = [row[key] for key in ("target", "predicted") if row[key] not in names]
        if lacking or strange:
            found = f"without {', '.join(lacking)}" if lacking else f"with the class {strange[0]!r}"
            raise RunError(
                f"got {run.folder / 'oof.csv'} {found} (slide {row['slide_id']!r}) → expected the classes "
                f"{', '.join(map(repr, names))} of metrics.json → keep the files of one run together"
            )


# ---------------------------------------------------------------------------------------------- figures


def class_figures(classes: _Classes) -> Iterator[tuple[str, Any]]:
    """The figures of a run by file name."""
    run, guesses = classes.run, _guesses(classes)
    evaluation = run.evaluation
    yield (
        "metrics",
        plotting.forest_plot(
            [ForestRow(label, *triple(evaluation[key]), reference=guesses[key]) for key, label in METRICS.items()]
        ),
    )
    yield (
        "classes",
        plotting.forest_plot(
            [
                ForestRow(label, *triple(evaluation["classes"][name][key]), group=name)
                for name in classes.names
                for key, label in CLASS_METRICS.items()
            ]
        ),
    )
    yield "confusion", plotting.confusion_plot(np.asarray(evaluation["confusion"]), classes.names)
    yield from _class_curves(classes)
    yield "reliability", curve_figures.reliability_plot(classes.calibration["reliability"])
    yield "abstention", curve_figures.abstention_plot({"": classes.abstention["curve"]})
    yield from learning_curves(run)
    for metric in SPREAD_METRICS:
        yield f"spread-{metric}", plotting.spread_plot(spread_of(run, metric), run.folds)


def _class_curves(classes: _Classes) -> Iterator[tuple[str, Any]]:
    """ROC and precision-recall curves of the classes that have slides on both sides."""
    labels, probabilities, patients = classes.predictions
    for at in _curved_classes(classes):
        yield from curve_pair(at, labels == at, probabilities[:, at], patients)


def _curved_classes(classes: _Classes) -> list[int]:
    """Classes with a curve, by number; of two classes one tells all."""
    labels, _, _ = classes.predictions
    found = [at for at in range(len(classes.names)) if 0 < (labels == at).sum() < len(labels)]
    return found[1:] if len(classes.names) == 2 else found


def _guesses(classes: _Classes) -> dict[str, float | None]:
    """What guessing without looking at the slides gives: always the commonest class, or a draw."""
    supports = [classes.run.evaluation["classes"][name]["support"] for name in classes.names]
    return {name: each.guessed(supports) for name, each in RECORDS[CLASSIFICATION].items()}


# ---------------------------------------------------------------------------------------------- the page


def class_view(classes: _Classes, thumbnails: Thumbnails | None) -> dict[str, Any]:
    """All that the template shows, besides the figures."""
    run, names = classes.run, classes.names
    evaluation, guesses = run.evaluation, _guesses(classes)
    slides = _slides(classes, thumbnails)
    return shared_view(run, ("Classes", f"{len(names)}"), {key: METRICS[key] for key in SPREAD_METRICS}) | {
        "class_names": names,
        "metric_rows": [(label, evaluation[key], guesses[key]) for key, label in METRICS.items()],
        "class_rows": [(name, evaluation["classes"][name]) for name in names],
        "class_metrics": CLASS_METRICS,
        "counts": COUNTS,
        "curves": [(at, names[at]) for at in _curved_classes(classes)],
        "calibration": classes.calibration,
        "abstention": classes.abstention,
        "operating": classes.operating,
        "composition": _composition(classes),
        "slides": slides,
        "has_thumbnails": any(slide["thumbnail"] for slide in slides),
    }


def _composition(classes: _Classes) -> list[tuple[int, list[tuple[int, int]]]]:
    """By fold, the (slides, patients) of each class in its test part."""
    run = classes.run
    found = []
    for fold, rows in run.rows_by_fold.items():
        patients = defaultdict(list)
        for at in rows:
            patients[run.out_of_fold[at]["target"]].append(run.patient_ids[at])
        found.append((fold, [(len(patients[name]), len(set(patients[name]))) for name in classes.names]))
    return found


def _slides(classes: _Classes, thumbnails: Thumbnails | None) -> list[dict[str, Any]]:
    run = classes.run
    return [
        slide
        | {
            "true": row["target"],
            "predicted": row["predicted"],
            "wrong": row["predicted"] != row["target"],
            "probabilities": [(name, finite(row[f"p_{name}"])) for name in classes.names],
        }
        for slide, row in zip(slide_rows(run, thumbnails), run.out_of_fold, strict=True)
    ]
