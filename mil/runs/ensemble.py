"""Ensembles: the mean of what several runs of one target say, over heads, features, folds and seeds.

A run's out-of-fold predictions already are an ensemble of its seeds; for a new slide it is one of all its replicas.
Several runs are averaged with equal weights. Nothing is fitted but the scale of risks, to validation slides, so that
out-of-fold predictions stay honest; runs that were picked by their test folds make the figures of their ensemble too
good, and only whoever picked can know that.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mil.arrays import FloatArray
from mil.cohort.cohort import Cohort
from mil.cohort.targets import CLASSIFICATION, KINDS
from mil.errors import RunError, listed
from mil.evaluation.alignment import join_runs, match
from mil.evaluation.averaging import Average, Averaging, Scale
from mil.evaluation.headlines import brief_metrics
from mil.evaluation.paired import gain_over
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.evaluation.tables import out_of_fold_rows
from mil.files import new_folder, read_json, write_csv, write_json
from mil.runs.folders import ENSEMBLE, is_ensemble, refuse_artefact
from mil.runs.look_ledger import Look
from mil.runs.run_folder import RunFolder, read_predictions

_FILES = frozenset({ENSEMBLE, "oof.csv", "metrics.json"})


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several runs as one.

    Attributes:
        folders: of the members, which stay where they are.
        cohort: slides, patients and labels that all members share.
        probabilities: float64 [n, C], out of fold; for other targets than classes [n, values].
        metrics: the content of ``metrics.json``.
        averaging: what is averaged: probabilities, their logarithms (then scaled to sum to one), numbers or risks.

    Example:
        >>> ensemble = make_ensemble(["runs/abmil", "runs/transmil"])       # doctest: +SKIP
        >>> ensemble.metrics["out_of_fold"]["macro_f1"]                     # doctest: +SKIP
    """

    folders: tuple[Path, ...]
    cohort: Cohort
    probabilities: FloatArray
    metrics: dict[str, Any]
    averaging: Averaging

    def save(self, folder: str | Path) -> Path:
        """Write ``oof.csv``, ``metrics.json`` and ``ensemble.json``; the look at the test folds is counted.

        Raises:
            RunError: ``folder`` holds anything but an earlier ensemble, or cannot be written.
        """
        folder = Path(folder).absolute()
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else {""} if folder.exists() else set()
        if there - _FILES:
            raise RunError(f"got {folder} for an ensemble → it holds {listed(sorted(there))} → give a new folder")
        look = Look.at(folder, self.cohort, "ensemble", self.metrics["entry"])
        metrics = self.metrics | {"looks": look.count_earlier() + 1}
        with new_folder(folder, overwrite=True) as partial:
            members = {"members": [str(path) for path in self.folders]}
            write_json(partial / ENSEMBLE, asdict(self.averaging) | members)
            write_csv(partial / "oof.csv", out_of_fold_rows(self.cohort, self.probabilities))
            write_json(partial / "metrics.json", metrics)
            look.append()
        return folder


def make_ensemble(folders: Sequence[str | Path], average: Average = "probabilities") -> Ensemble:
    """Average the out-of-fold predictions of runs of the same slides.

    Every prediction comes from a replica that saw neither the slide nor its patient, whatever the folds of its run.
    Of survival runs need the same folds, as patients are compared within a fold alone, and risks are averaged in units
    of their spread among the validation slides of each run and fold, see `mil.evaluation.averaging`.

    Raises:
        RunError: fewer than two runs, one run twice, a run that cannot be read, a packed model or an ensemble, runs of
            other slides, patients, labels, tasks or columns, or an average that the task does not have.
    """
    paths = tuple(Path(folder).absolute() for folder in folders)
    if len(set(paths)) < len(paths) or len(paths) < 2:
        raise RunError(f"got {listed(map(str, paths))} → expected two or more different runs → name each once")
    for path in paths:
        refuse_artefact(path, "runs, which are averaged before they are packed")
        if is_ensemble(path):
            raise RunError(f"got the ensemble {path} → expected runs of mil train → name its members instead")
    runs = [read_predictions(path) for path in paths]
    tested = [run.tested()[0] for run in runs]
    for path, each in zip(paths, tested, strict=True):
        match(str(paths[0]), tested[0], str(path), each)
    predictions = join_runs(runs, average)
    _check_average(average, predictions.cohort.task)
    cohort, values = predictions.tested()
    scales = () if cohort.kind.has_scale else tuple(run.scale() for run in runs)
    averaging = Averaging(average, cohort.task, scales)
    return Ensemble(paths, cohort, values, _metrics(paths, predictions), averaging)


def _check_average(average: Average, task: str) -> None:
    if average == "logits" and not KINDS[task].has_probabilities:
        raise RunError(
            f"got average=logits for runs of task {task} → expected probabilities to take the logarithm of, of which "
            f"{task} has none → leave --average out"
        )


def read_ensemble(folder: Path) -> tuple[tuple[Path, ...], Averaging]:
    """The members of a saved ensemble, and how they are averaged.

    Raises:
        RunError: there is none, or a member has gone.
    """
    try:
        plain = read_json(folder / ENSEMBLE)
        members = tuple(Path(each) for each in plain["members"])
        scales = tuple(Scale(**each) for each in plain.get("scales", ()))
        averaging = Averaging(plain["average"], plain.get("task", CLASSIFICATION), scales)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"got {folder} as ensemble → its {ENSEMBLE} cannot be read → make it again") from error
    gone = [str(path) for path in members if not (path / "metrics.json").is_file()]
    if gone:
        raise RunError(
            f"got the ensemble {folder} → its member {listed(gone)} has gone → bring it back, or make another"
        )
    return members, averaging


def over_members(
    members: Sequence[Path], averaging: Averaging, predict: Callable[[Path], tuple[tuple[str, ...], FloatArray]]
) -> tuple[tuple[str, ...], FloatArray]:
    """Slide ids and predictions [n, values] of an ensemble for new slides, from those of each member."""
    found = [predict(member) for member in members]
    ids = found[0][0]
    for member, (other, _) in zip(members, found, strict=True):
        if other != ids:
            raise RunError(f"got other slides for {member} than for {members[0]} → name the slides, or extract all")
    return ids, averaging.of([values for _, values in found])


def _metrics(paths: Sequence[Path], predictions: ReplicaPredictions) -> dict[str, Any]:
    cohort, together = predictions.cohort, predictions.outcomes()
    found = together.evaluate()
    needed = ("head", "entry", "n_replicas", "synthetic", "out_of_fold")
    facts = [RunFolder.open(path, *needed).metrics for path in paths]
    members = [
        {"run": str(path), "head": run["head"], "entry": run["entry"]}
        | {name: run["out_of_fold"][name] for name in brief_metrics(cohort.task)}
        | gain_over(together, member.outcomes())
        for path, run, member in zip(paths, facts, predictions.split(), strict=True)
    ]
    return {
        "target": cohort.target,
        "task": cohort.task,
        "class_names": list(cohort.stated_classes),
        "head": "ensemble of " + ", ".join(run["head"] for run in facts),
        "entry": ", ".join(dict.fromkeys(run["entry"] for run in facts)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "average": predictions.average,
        "members": members,
        "n_replicas": sum(run["n_replicas"] for run in facts),
        "synthetic": any(run["synthetic"] for run in facts),
        "warnings": list(found["warnings"]),
        "looks": 1,
        "out_of_fold": found,
    }
