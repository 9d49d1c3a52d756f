"""Finished runs, scored again from the predictions that they saved: other intervals, operating points, abstention.

Nothing is trained, and nothing is chosen by test folds: thresholds come from validation parts. The heads, slides and
out-of-fold predictions are those of the run's own metrics, so that scoring them again is no further look at the test
folds; how often these were looked at is repeated beside the figures. Whoever scores at many operating points and keeps
the best has looked more often than any file can tell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mil.cohort.targets import CLASSIFICATION
from mil.errors import RunError, listed
from mil.evaluation.headlines import HEADLINES
from mil.evaluation.operating_points import check_targets, operate, operate_one_vs_rest
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.files import Row, new_folder, write_csv, write_json
from mil.runs.folders import is_ensemble, refuse_artefact
from mil.runs.run_folder import RunFolder
from mil.runs.saved_outcomes import read_outcomes
from mil.statistics.abstention import evaluate_abstention
from mil.statistics.bootstrap import USUAL_RESAMPLING, Resampling
from mil.statistics.calibration import evaluate_calibration
from mil.statistics.classification import CLASS_METRICS

SCORES, SCORES_CSV, OPERATING_CSV, ABSTENTION_CSV = "scores.json", "scores.csv", "operating.csv", "abstention.csv"
_ENDS = ("value", "low", "high")


@dataclass(frozen=True)
class OperatingTarget:
    """What thresholds are to reach on validation parts; without a target, the highest Youden index.

    Attributes:
        sensitivity: at least this share of a class is found.
        specificity: at least this share of the others is left alone.
        class_name: the positive class; None takes every class against the others.

    Raises:
        EvaluationError: two targets, or one that is no share.
    """

    sensitivity: float | None = None
    specificity: float | None = None
    class_name: str | None = None

    def __post_init__(self) -> None:
        check_targets(self.sensitivity, self.specificity)

    def __str__(self) -> str:
        for name in ("sensitivity", "specificity"):
            if getattr(self, name) is not None:
                return f"{name} of at least {getattr(self, name):g}"
        return "the highest Youden index"


@dataclass(frozen=True, eq=False)
class ScoredRun:
    """One run and what its saved predictions are worth, in plain values.

    Attributes:
        name: of its folder.
        facts: ``target``, ``head``, ``entry``, ``looks`` and ``synthetic``, as in its ``metrics.json``.
        task: one of `mil.cohort.targets.TASKS`.
        metrics: see `mil.evaluation.outcomes.Outcomes.evaluate`.
        calibration: see `mil.statistics.calibration.evaluate_calibration`; None for other targets than classes.
        abstention: see `mil.statistics.abstention.evaluate_abstention`; likewise.
        operating: for every class that was asked for {class, chosen_by, thresholds, sensitivity, specificity,
            warnings}; thresholds are by replica, rates {value, low, high}.
        warnings: what a reader must know, those of the run's split included.
    """

    name: str
    facts: dict[str, Any]
    task: str
    metrics: dict[str, Any]
    calibration: dict[str, Any] | None
    abstention: dict[str, Any] | None
    operating: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Scores:
    """Several runs, scored in one way.

    Example:
        >>> scores = score_runs(["runs/abmil"], operating=OperatingTarget(sensitivity=0.95))      # doctest: +SKIP
        >>> scores.runs[0].operating[1]["specificity"]                                            # doctest: +SKIP
        {'value': 0.58, 'low': 0.47, 'high': 0.7}
    """

    runs: tuple[ScoredRun, ...]
    resampling: Resampling

    def save(self, folder: str | Path) -> Path:
        """Write ``scores.json``, ``scores.csv``, of classes ``abstention.csv`` and, if asked for, ``operating.csv``.

        Raises:
            RunError: ``folder`` exists and is not empty, or cannot be written.
        """
        folder = Path(folder).absolute()
        with new_folder(folder) as partial:
            plain = {"resampling": asdict(self.resampling), "runs": [asdict(run) for run in self.runs]}
            write_json(partial / SCORES, plain)
            write_csv(partial / SCORES_CSV, _score_rows(self.runs))
            if any(run.abstention for run in self.runs):
                write_csv(partial / ABSTENTION_CSV, _abstention_rows(self.runs))
            if any(run.operating for run in self.runs):
                write_csv(partial / OPERATING_CSV, _operating_rows(self.runs))
        return folder

    def draw(self, folder: str | Path) -> None:
        """Write ``figures/abstention.svg`` and ``.png`` into a folder that `save` wrote; nothing without classes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        curves = {run.name: run.abstention["curve"] for run in self.runs if run.abstention is not None}
        if not curves:
            return
        from mil.visualization.curve_figures import abstention_plot
        from mil.visualization.plotting import write_figure

        figure = abstention_plot(curves)
        figures = Path(folder) / "figures"
        figures.mkdir(exist_ok=True)
        synthetic = any(run.facts["synthetic"] for run in self.runs)
        write_figure(figures, "abstention", figure, "synthetic data" if synthetic else "")


def score_runs(
    folders: Sequence[str | Path],
    resampling: Resampling = USUAL_RESAMPLING,
    operating: OperatingTarget | None = None,
) -> Scores:
    """Score the saved out-of-fold predictions of runs; nothing is trained, and no look is counted.

    Args:
        folders: written by `mil train`; without operating points, ensembles and sweeps too.
        resampling: how the intervals are made.
        operating: what thresholds are to reach, chosen on validation parts; None leaves operating points out.

    Raises:
        RunError: no folder, one given twice, one that is no finished run or lacks a file, or an ensemble, a sweep or
            a run of another target than classes that operating points are asked of.
        EvaluationError: a class that a run does not have.
    """
    paths = [Path(folder).absolute() for folder in folders]
    if not paths or len(set(paths)) < len(paths):
        raise RunError(
            f"got the run folders {listed(map(str, folders))} → expected one or more, each once → give the --out "
            f"folders of mil train"
        )
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    # all are read before any is scored: a mistyped folder is told at once
    read = [_read(path, operating is not None) for path in paths]
    runs = [_score(name, *each, resampling, operating) for name, each in zip(names, read, strict=True)]
    return Scores(tuple(runs), resampling)


def _read(folder: Path, operating: bool) -> tuple[RunFolder, Outcomes, ReplicaPredictions | None]:
    """A run with its out-of-fold predictions, and those of every replica where operating points are asked for."""
    refuse_artefact(folder)
    run = RunFolder.open(folder)
    outcomes = read_outcomes(run)
    if not operating:
        return run, outcomes, None
    task = outcomes.cohort.task
    if task != CLASSIFICATION:
        raise RunError(
            f"got {folder}, a run of task {task}, for operating points → expected a run of classes, whose thresholds "
            f"they are → leave --sensitivity, --specificity and --youden out"
        )
    what = "an ensemble" if is_ensemble(folder) else "a sweep" if "sweep" in run.metrics else None
    if what is not None:
        raise RunError(
            f"got {folder}, {what}, for operating points → expected a run, whose replicas each have a validation part "
            f"to choose a threshold by → score its runs, or leave the operating points out"
        )
    return run, outcomes, run.predictions()


def _score(
    name: str,
    run: RunFolder,
    outcomes: Outcomes,
    predictions: ReplicaPredictions | None,
    resampling: Resampling,
    target: OperatingTarget | None,
) -> ScoredRun:
    metrics = outcomes.evaluate(resampling)
    calibration, abstention = _of_classes(outcomes, resampling)
    operating = _operate(predictions, target, resampling) if predictions is not None and target is not None else []
    warnings = [*_of_split(run.metrics), *metrics["warnings"], *(calibration or {"warnings": []})["warnings"]]
    warnings += [text for point in operating for text in point["warnings"]]
    return ScoredRun(
        name=name,
        facts={
            **{key: str(run.metrics.get(key, "")) for key in ("target", "head", "entry")},
            "looks": int(run.metrics.get("looks", 1)),
            "synthetic": bool(run.metrics.get("synthetic")),
        },
        task=outcomes.cohort.task,
        metrics=metrics,
        calibration=calibration,
        abstention=abstention,
        operating=tuple(operating),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _of_classes(outcomes: Outcomes, resampling: Resampling) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Calibration and abstention, which only classes have."""
    cohort = outcomes.cohort
    if not cohort.has_classes:
        return None, None
    slides = (cohort.labels, outcomes.predicted, cohort.patient_ids, cohort.class_names)
    return evaluate_calibration(*slides, resampling=resampling), evaluate_abstention(*slides, resampling)


def _operate(predictions: ReplicaPredictions, target: OperatingTarget, resampling: Resampling) -> list[dict[str, Any]]:
    """Operating points in plain values."""
    how = (target.sensitivity, target.specificity, resampling)
    points = (
        operate_one_vs_rest(predictions, *how)
        if target.class_name is None
        else [operate(predictions, target.class_name, *how)]
    )
    names = [replica.name for replica in predictions.replicas]
    return [
        {
            "class": point.class_name,
            "chosen_by": f"{target} on validation parts",
            "thresholds": dict(zip(names, point.thresholds, strict=True)),
            "sensitivity": point.sensitivity,
            "specificity": point.specificity,
            "warnings": list(point.warnings),
        }
        for point in points
    ]


def _of_split(metrics: dict[str, Any]) -> list[str]:
    """The run's own warnings but for those of its intervals, which are made anew."""
    of_intervals = metrics.get("out_of_fold", {}).get("warnings", [])
    return [text for text in metrics.get("warnings", []) if text not in of_intervals]


def _score_rows(runs: Sequence[ScoredRun]) -> Iterator[Row]:
    """One figure a row: summaries, then the classes, labels or numbers."""
    yield ("run", "class" if any(run.task == CLASSIFICATION for run in runs) else "target", "metric", *_ENDS)
    for run in runs:
        for name in HEADLINES[run.task]:
            yield (run.name, "", name, *_cells(run.metrics[name]))
        if run.calibration is not None and run.abstention is not None:
            yield from _class_rows(run, run.calibration, run.abstention)
        for column, values in run.metrics.get("targets", {}).items():
            for name, entry in values.items():
                if isinstance(entry, dict):
                    yield (run.name, column, name, *_cells(entry))


def _class_rows(run: ScoredRun, calibration: dict[str, Any], abstention: dict[str, Any]) -> Iterator[Row]:
    for name in ("brier", "nll"):
        yield (run.name, "", name, *_cells(calibration[name]))
    yield (run.name, "", "ece", _cell(calibration["ece"]), "", "")
    yield (run.name, "", "abstention_area", *_cells(abstention["area"]))
    for row in abstention["coverages"]:
        yield (run.name, "", f"accuracy_at_coverage_{row['asked']:g}", *_cells(row["accuracy"]))
    for class_name, values in run.metrics["classes"].items():
        for name in CLASS_METRICS:
            yield (run.name, class_name, name, *_cells(values[name]))


def _operating_rows(runs: Sequence[ScoredRun]) -> Iterator[Row]:
    rates = ("sensitivity", "specificity")
    columns = [f"{name}{end}" for name in rates for end in ("", "_low", "_high")]
    yield ("run", "class", "chosen_by", "threshold_lowest", "threshold_median", "threshold_highest", *columns)
    for run in runs:
        for point in run.operating:
            cuts = list(point["thresholds"].values())
            told = [_cell(float(value)) for value in (min(cuts), np.median(cuts), max(cuts))]
            cells = [cell for name in rates for cell in _cells(point[name])]
            yield (run.name, point["class"], point["chosen_by"], *told, *cells)


def _abstention_rows(runs: Sequence[ScoredRun]) -> Iterator[Row]:
    names = ("coverage", "confidence", "accuracy", "balanced_accuracy")
    yield ("run", *names)
    for run in runs:
        for step in run.abstention["curve"] if run.abstention is not None else []:
            yield (run.name, *(_cell(step[name]) for name in names))


def _cells(entry: dict[str, float | None]) -> tuple[str, str, str]:
    return _cell(entry["value"]), _cell(entry["low"]), _cell(entry["high"])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
