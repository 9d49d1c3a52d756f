"""Evaluation on an external labelled cohort: a model meets slides that had no part in making it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from extract.store import Store, open_store
from extract.store.core.remote_path import StorePath
from mil.arrays import BoolArray
from mil.bags.stored import is_synthetic
from mil.cohort.cohort import Cohort
from mil.cohort.joining import join_store
from mil.cohort.reading import read_cohort
from mil.cohort.targets import KINDS, check_times, target_columns
from mil.deployment.inference import available_slides, predict
from mil.deployment.model import model_folders, model_records
from mil.deployment.predictions import Predictions
from mil.errors import CohortError, RunError, did_you_mean, listed
from mil.evaluation.abstention_rule import abstention_of
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.tables import truth_cells, truth_names
from mil.files import Row, new_folder, probability_text, write_csv, write_json
from mil.runs.lineage import Lineage, TrainingCohort, read_lineage
from mil.runs.lineage import overlap as overlap_with
from mil.runs.look_ledger import Look
from mil.statistics.calibration import evaluate_calibration, evaluate_label_calibration
from mil.training.checkpoint import CheckpointRecord, package_versions

Overlap = Literal["refuse", "drop", "mark"]
OVERLAPS = ("refuse", "drop", "mark")


@dataclass(frozen=True, eq=False)
class ExternalEvaluation:
    """What a model is worth on a cohort that it was not made with.

    Attributes:
        cohort: the labelled slides that were predicted.
        predictions: in the order of the cohort.
        trained_on: bool [n], slides that were trained on, or whose patient was; only with ``overlap="mark"``.
        metrics: the content of ``metrics.json``; its ``looks`` counts this look alone until it is saved.

    Example:
        >>> found = evaluate_external("models/subtype", "b.zarr", "b.csv", "subtype")   # doctest: +SKIP
        >>> found.metrics["external"]["auroc"]                                          # doctest: +SKIP
        {'value': 0.83, 'low': 0.74, 'high': 0.9}
    """

    cohort: Cohort
    predictions: Predictions
    trained_on: BoolArray
    metrics: dict[str, Any]

    def save(self, folder: str | Path) -> "ExternalEvaluation":
        """Write ``metrics.json``, ``predictions.csv`` and ``attrition.csv``; the look at the cohort is counted.

        Raises:
            RunError: ``folder`` exists and is not empty, or cannot be written.
        """
        folder = Path(folder).absolute()
        look = Look.at(
            folder, self.cohort, f"{self.metrics['head']} of {self.metrics['model']}", self.predictions.entry
        )
        metrics = self.metrics | {"looks": look.count_earlier() + 1}
        with new_folder(folder) as partial:
            write_csv(partial / "predictions.csv", self._rows())
            write_csv(partial / "attrition.csv", _attrition_rows(metrics["attrition"]))
            write_json(partial / "metrics.json", metrics)
            look.append()
        return replace(self, metrics=metrics)

    def _rows(self) -> Iterator[Row]:
        cohort, found = self.cohort, self.predictions
        classes = cohort.has_classes
        names = [f"p_{name}" for name in found.class_names] if classes else found.value_names
        predicted, sure = (("predicted",), ("confidence", "abstained")) if classes else ((), ())
        yield ("slide_id", "patient_id", *truth_names(cohort), *predicted, *names, *sure, "trained_on")
        for at, slide_id in enumerate(cohort.slide_ids):
            who = (slide_id, cohort.patient_ids[at], *truth_cells(cohort, at))
            values = [probability_text(value) for value in found.probabilities[at]]
            known = _flag(self.trained_on[at])
            if classes:
                confidence = probability_text(found.confidence[at])
                yield (*who, found.predicted[at], *values, confidence, _flag(found.abstained[at]), known)
            else:
                yield (*who, *values, known)


def _flag(value: object) -> str:
    return str(bool(value)).lower()


def evaluate_external(
    run_folder: str | Path,
    store: Store | str | StorePath,
    labels: str | Path,
    target: str | None = None,
    entry: str | None = None,
    device: str = "auto",
    *,
    slide_column: str | None = None,
    patient_column: str | None = None,
    classes: Sequence[str] | None = None,
    overlap: Overlap = "refuse",
    distinct_patients: bool = False,
) -> ExternalEvaluation:
    """Apply a run, a packed model or an ensemble to labelled slides and score it, with intervals over patients.

    Args:
        run_folder: written by ``mil train``, ``mil pack`` or ``mil ensemble``.
        store: holds features of the recipe that the model was trained on.
        labels: label table, see `mil.read_cohort`.
        target: its column of labels, spelled as the model's classes; by default that of the model. Of other targets
            its columns, separated by commas: those of the model in any order, or others in the model's order.
        entry: the features entry; by default the one whose recipe fits.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        slide_column: column of the slide ids.
        patient_column: column of the patient ids.
        classes: the labels to keep; by default all. Of classes only.
        overlap: what becomes of slides that were trained on, or whose patient was: ``refuse``, ``drop`` leaves them
            out, ``mark`` keeps them and says so with the result. Slides are known by their file's name, patients by
            their id. Trainings that the weights started from count too.
        distinct_patients: see `mil.read_cohort`.

    Raises:
        CohortError: a label table that cannot be used or lacks a column, labels that the model does not know, or
            several times or events of one patient.
        RunError: slides that were trained on, unless they are dropped or marked; or none is left.
        MilError, ExtractError: as in `mil.predict`.
    """
    folder = Path(run_folder)
    reader = open_store(store) if isinstance(store, str | StorePath) else store
    _check_choice(overlap)
    records = model_records(folder)
    first = records[0]
    wanted, renamed = _own_columns(first, target)
    task = first.task["task"]
    table = read_cohort(
        labels, wanted, slide_column, patient_column, classes, False, task, distinct_patients=distinct_patients
    )
    joined = join_store(table, available_slides(reader, records, entry), for_training=False)
    if joined.has_classes:
        _refuse_unknown_classes(table, first, labels)
        joined = _in_order_of(first.class_names, joined)
    elif not joined.kind.has_scale:
        check_times(str(labels), joined.columns, np.asarray(joined.values), np.array(joined.patient_ids))
    lineages = [read_lineage(each) for each in model_folders(folder)]
    trainings = [each for lineage in lineages for each in lineage.cohorts]
    cohort, trained_on, dropped = _settle(joined, trainings, overlap)
    predictions = predict(folder, reader, entry, cohort.slide_ids, device)
    metrics = _metrics(records, cohort, predictions, trained_on, dropped)
    metrics["warnings"] = [*_unknown_starts(lineages), *renamed, *metrics["warnings"]]
    metrics |= {"model": str(folder), "synthetic": is_synthetic(reader, cohort.slide_ids)}
    return ExternalEvaluation(cohort, predictions, trained_on, metrics)


def _check_choice(overlap: str) -> None:
    if overlap not in OVERLAPS:
        raise RunError(
            f"got overlap={overlap!r} → expected one of {listed(OVERLAPS)} → {did_you_mean(overlap, OVERLAPS)}choose "
            f"one of these"
        )


def _own_columns(record: CheckpointRecord, target: str | None) -> tuple[str, list[str]]:
    """The columns of the table in the order of the model's, and a warning where they have other names.

    Raises:
        CohortError: not as many as the model has, or one of the model's names in another's place.
    """
    task = record.task["task"]
    if target is None or KINDS[task].has_classes:
        return target or record.target, []
    own, given = target_columns(task, record.target), target_columns(task, target)
    # time and event have an order; others are matched by name
    if KINDS[task].has_scale and set(given) == set(own):
        return record.target, []
    moved = [name for name, here in zip(given, own, strict=False) if name in own and name != here]
    if len(given) != len(own) or moved:
        raise CohortError(
            f"got target {target!r} for a model of {task} {record.target!r} → expected these columns, or as many "
            f"others in this order → name them so, or leave --target out"
        )
    pairs = [f"{here!r} as {name!r}" for here, name in zip(given, own, strict=True) if here != name]
    return target, [f"columns of other names were read: {', '.join(pairs)}"] if pairs else []


def _refuse_unknown_classes(cohort: Cohort, record: CheckpointRecord, labels: str | Path) -> None:
    unknown = [name for name in cohort.class_names if name not in record.class_names]
    if unknown:
        raise CohortError(
            f"{labels}, column {cohort.target!r}: got the classes {listed(unknown)}, which the model does not know → "
            f"expected some of {listed(record.class_names)} → {did_you_mean(unknown[0], record.class_names)}write them "
            f"as the model does, or leave them out by naming the others with --class"
        )


def _in_order_of(class_names: Sequence[str], cohort: Cohort) -> Cohort:
    """The same cohort with labels that index the model's classes, those without slides included."""
    at = np.array([class_names.index(name) for name in cohort.class_names], dtype=np.int64)
    return replace(cohort, class_names=tuple(class_names), labels=at[cohort.labels])


def _unknown_starts(lineages: Sequence[Lineage]) -> list[str]:
    unknown = sorted({each for lineage in lineages for each in lineage.unknown})
    return [
        f"the weights grew from {listed(unknown)}, and nothing says any more which slides that was trained on: if any "
        f"of them is in this cohort, these figures are too good"
    ] * bool(unknown)


def _settle(
    cohort: Cohort, trainings: Sequence[TrainingCohort], choice: Overlap
) -> tuple[Cohort, BoolArray, tuple[str, ...]]:
    """The cohort that is evaluated, which of its slides were trained on, and the ids of those left out.

    Raises:
        RunError: slides or patients that were trained on, unless they are dropped or marked.
    """
    slides, patients = overlap_with(trainings, cohort.slide_ids, cohort.patient_ids)
    known = slides | patients
    if not known.any() or choice == "mark":
        return cohort, known, ()
    ids = tuple(cohort.slide_ids[at] for at in np.flatnonzero(known))
    if choice == "refuse":
        who = sorted({cohort.patient_ids[at] for at in np.flatnonzero(patients)})
        raise RunError(
            f"got {len(ids)} of {len(cohort)} slides that the model was trained on, or whose patient was: slides "
            f"{listed(ids)} (by file name: {int(slides.sum())}), patients {listed(who)} → expected a cohort that had "
            f"no part in the training → leave them out with --overlap drop, or, where only the names are the same, "
            f"keep them with --overlap mark"
        )
    if known.all():
        raise RunError(
            f"got {len(ids)} slides, all of which the model was trained on, or their patient was → expected others → "
            f"evaluate another cohort"
        )
    kept = cohort.subset(np.flatnonzero(~known).tolist())
    return kept, np.zeros(len(kept), dtype=bool), ids


def _metrics(
    records: Sequence[CheckpointRecord],
    cohort: Cohort,
    found: Predictions,
    trained_on: BoolArray,
    dropped: Sequence[str],
) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    scores = _outcomes(cohort, found).evaluate()
    own, cautions = _of_probabilities(cohort, found)
    warnings = list(dict.fromkeys([*_warn_of_one_class(cohort), *scores["warnings"], *cautions]))
    n_trained = int(trained_on.sum())
    if n_trained:
        warnings.insert(
            0,
            f"{n_trained} of {len(cohort)} slides were trained on, or their patient was: these figures are NOT of an "
            f"external cohort",
        )
    rows = [(reason, count, list(ids)) for reason, count, ids in cohort.attrition.rows()[:-1]]
    rows.append(("slides that the model was trained on, or whose patient was (left out)", len(dropped), list(dropped)))
    return {
        "target": cohort.target,
        "trained_target": records[0].target,
        "task": cohort.task,
        "class_names": list(cohort.stated_classes),
        "head": ", ".join(record.head for record in records),
        "entry": found.entry,
        "n_replicas": len(found.replicas),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "attrition": [*rows, ("slides kept", len(cohort), [])],
        "trained_on": n_trained,
        "warnings": warnings,
        "looks": 1,
        "external": scores,
        **own,
    }


def _outcomes(cohort: Cohort, found: Predictions) -> Outcomes:
    """One model says all of this, so that patients are compared with all others for survival."""
    return Outcomes(cohort, found.probabilities, () if cohort.kind.has_scale else (0,) * len(cohort))


def _of_probabilities(cohort: Cohort, found: Predictions) -> tuple[dict[str, Any], list[str]]:
    """What only probabilities have, calibration and (of classes) abstention, and what to be warned of there."""
    values, patients = found.probabilities, cohort.patient_ids
    if cohort.has_classes:
        calibration = evaluate_calibration(cohort.labels, values, patients, cohort.class_names)
        abstention = abstention_of(cohort.labels, values, found.abstain_below)
        return {"calibration": calibration, "abstention": abstention}, calibration["warnings"]
    labels = None
    if cohort.kind.has_probabilities:
        labels = evaluate_label_calibration(
            np.asarray(cohort.values, dtype=np.float64), values, patients, cohort.columns
        )
    return {"calibration": labels, "abstention": None}, []


def _warn_of_one_class(cohort: Cohort) -> list[str]:
    present = np.unique(cohort.labels)
    if not cohort.has_classes or len(present) > 1:
        return []
    return [
        f"all {len(cohort)} slides are of class {cohort.class_names[present[0]]!r}: how well it is told from others "
        f"cannot be said; AUROC is undefined, and all other figures rest on the recall of this class"
    ]


def _attrition_rows(rows: Sequence[tuple[str, int, Sequence[str]]]) -> Iterator[Row]:
    yield ("reason", "count", "ids")
    for reason, count, ids in rows:
        yield (reason, count, " ".join(ids))
