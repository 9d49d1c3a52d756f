"""Ensembles: the mean of what several runs say, over heads, features, folds and seeds.

A run's out-of-fold predictions already are an ensemble of its seeds; for a new slide it is one of all its replicas.
Several runs are averaged with equal weights. Nothing is fitted, so that out-of-fold predictions stay honest; runs that
were picked by their test folds make the figures of their ensemble too good, and only whoever picked can know that.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from mil import statistics
from mil.artefact import refuse_artefact
from mil.cohort import Attrition, Cohort
from mil.errors import RunError, listed
from mil.files import put_in_place, write_csv, write_json
from mil.looks import Look
from mil.out_of_fold import (
    OutOfFold,
    aligned_probabilities,
    out_of_fold_rows,
    read_out_of_fold,
    require_same_slides,
)

Average = Literal["probabilities", "logits"]
FloatArray = npt.NDArray[np.float64]
ENSEMBLE = "ensemble.json"
_FILES = frozenset({ENSEMBLE, "oof.csv", "metrics.json"})
_SMALLEST = 1e-12


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several runs as one.

    Attributes:
        folders: of the members, which stay where they are.
        average: what is averaged: probabilities, or their logarithms (then scaled to sum to one).
        cohort: slides, patients and labels that all members share.
        probabilities: float64 [n, C], out of fold.
        metrics: the content of ``metrics.json``.

    Example:
        >>> ensemble = make_ensemble(["runs/abmil", "runs/transmil"])       # doctest: +SKIP
        >>> ensemble.metrics["out_of_fold"]["macro_f1"]                     # doctest: +SKIP
    """

    folders: tuple[Path, ...]
    average: Average
    cohort: Cohort
    probabilities: FloatArray
    metrics: dict[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write ``oof.csv``, ``metrics.json`` and ``ensemble.json``; the look at the test folds is counted.

        Raises:
            RunError: ``folder`` holds anything but an earlier ensemble.
        """
        folder = Path(folder).absolute()
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else {""} if folder.exists() else set()
        if there - _FILES:
            raise RunError(f"got {folder} for an ensemble → it holds {listed(sorted(there))} → give a new folder")
        look = Look.at(folder, self.cohort, "ensemble", self.metrics["entry"])
        metrics = self.metrics | {"looks": look.count_earlier() + 1}
        partial = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
        try:
            partial.mkdir(parents=True)
            members = {"average": self.average, "members": [str(path) for path in self.folders]}
            write_json(partial / ENSEMBLE, members)
            write_csv(partial / "oof.csv", out_of_fold_rows(self.cohort, self.probabilities))
            write_json(partial / "metrics.json", metrics)
            look.append()
            put_in_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder


def make_ensemble(folders: Sequence[str | Path], average: Average = "probabilities") -> Ensemble:
    """Average the out-of-fold predictions of runs of the same slides.

    Every prediction comes from a replica that saw neither the slide nor its patient, whatever the folds of its run.

    Raises:
        RunError: fewer than two runs, one run twice, a run that cannot be read, a packed model, or runs of other
            slides, patients, labels or classes.
    """
    paths = tuple(Path(folder).absolute() for folder in folders)
    if len(set(paths)) < len(paths) or len(paths) < 2:
        raise RunError(f"got {listed(map(str, paths))} → expected two or more different runs → name each once")
    for path in paths:
        refuse_artefact(path, "runs, which are averaged before they are packed")
    runs = [read_out_of_fold(path) for path in paths]
    require_same_slides(zip(map(str, paths), runs, strict=True))
    first = runs[0]
    n = len(first.slide_ids)
    cohort = Cohort(
        first.slide_ids, first.patient_ids, first.labels, first.class_names, first.metrics["target"], Attrition(n, n)
    )
    probabilities = combine([aligned_probabilities(run, first) for run in runs], average)
    return Ensemble(paths, average, cohort, probabilities, _metrics(paths, runs, cohort, probabilities, average))


def combine(members: Sequence[FloatArray], average: Average = "probabilities") -> FloatArray:
    """The mean of several predictions [n, C], rows summing to one.

    ``logits`` takes the mean of log p, which is the geometric mean: one member that rules a class out decides.

    >>> combine([np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])]).round(3).tolist()
    [[0.7, 0.3]]
    """
    means: FloatArray
    if average == "probabilities":
        means = np.mean(members, axis=0)
    else:
        means = np.exp(np.mean([np.log(np.maximum(each, _SMALLEST)) for each in members], axis=0))
    total: FloatArray = means / means.sum(axis=1, keepdims=True)
    return total


def read_ensemble(folder: Path) -> tuple[tuple[Path, ...], Average]:
    """The members of a saved ensemble, and what is averaged.

    Raises:
        RunError: there is none, or a member has gone.
    """
    try:
        plain = json.loads((folder / ENSEMBLE).read_text(encoding="utf-8"))
        members = tuple(Path(each) for each in plain["members"])
        average: Average = plain["average"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"got {folder} as ensemble → its {ENSEMBLE} cannot be read → make it again") from error
    gone = [str(path) for path in members if not (path / "metrics.json").is_file()]
    if gone:
        raise RunError(
            f"got the ensemble {folder} → its member {listed(gone)} has gone → bring it back, or make another"
        )
    return members, average


def is_ensemble(folder: Path) -> bool:
    """Whether a folder was written by `Ensemble.save`."""
    return (folder / ENSEMBLE).is_file()


def over_members(
    members: Sequence[Path], average: Average, predict: Callable[[Path], tuple[tuple[str, ...], FloatArray]]
) -> tuple[tuple[str, ...], FloatArray]:
    """Slide ids and probabilities [n, C] of an ensemble for new slides, from those of each member."""
    found = [predict(member) for member in members]
    ids = found[0][0]
    for member, (other, _) in zip(members, found, strict=True):
        if other != ids:
            raise RunError(f"got other slides for {member} than for {members[0]} → name the slides, or extract all")
    return ids, combine([values for _, values in found], average)


def _metrics(
    paths: Sequence[Path], runs: Sequence[OutOfFold], cohort: Cohort, probabilities: FloatArray, average: Average
) -> dict[str, Any]:
    found = statistics.evaluate(cohort.labels, probabilities, cohort.patient_ids, cohort.class_names)
    members = []
    for path, run in zip(paths, runs, strict=True):
        difference = statistics.paired_difference(
            cohort.labels, probabilities, aligned_probabilities(run, runs[0]), cohort.patient_ids
        )
        scores = {name: run.metrics["out_of_fold"][name] for name in ("macro_f1", "auroc")}
        members.append({"run": str(path), "head": run.metrics["head"], "entry": run.metrics["entry"]} | scores)
        members[-1]["gain_macro_f1"] = difference._asdict()
    return {
        "target": cohort.target,
        "class_names": list(cohort.class_names),
        "head": "ensemble of " + ", ".join(run.metrics["head"] for run in runs),
        "entry": ", ".join(dict.fromkeys(run.metrics["entry"] for run in runs)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "average": average,
        "members": members,
        "n_replicas": sum(run.metrics["n_replicas"] for run in runs),
        "synthetic": any(run.metrics["synthetic"] for run in runs),
        "warnings": list(found["warnings"]),
        "looks": 1,
        "out_of_fold": found,
    }
