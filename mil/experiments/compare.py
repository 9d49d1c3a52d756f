"""Runs on the same slides compared with the first of them, and what the cohort could have shown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mil.cohort.targets import MULTI_LABEL
from mil.errors import EvaluationError, RunError, did_you_mean, listed
from mil.evaluation.alignment import aligned
from mil.evaluation.fold_scores import FoldScore, differing_folds, fold_scores, mean_over_seeds, mean_test_to_train
from mil.evaluation.headlines import HEADLINES, LOWER_IS_BETTER, first_headline
from mil.evaluation.outcomes import Outcomes
from mil.evaluation.paired import NOTHING, SIGNIFICANT, Interval, Pair
from mil.files import Row, write_csv
from mil.runs.folders import is_ensemble
from mil.runs.run_folder import RunFolder
from mil.runs.saved_outcomes import read_outcomes
from mil.statistics.bootstrap import Resampling
from mil.statistics.delong import delong_test
from mil.statistics.paired_tests import corrected_t_test, holm
from mil.statistics.regression import OF_A_UNIT

NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class ComparedRun:
    """One run beside the reference.

    Attributes:
        name: its folder.
        head: name of the head.
        entry: features entry.
        value: the metric out of fold, interval over patients.
        difference: this run minus the reference, interval over the same resamples of patients.
        p: of the difference, by exchanging predictions patient by patient.
        p_holm: corrected for the number of runs that are compared with the reference.
        p_delong: of the difference in AUROC, DeLong's test over patients; None but for two classes or one label.
        p_t_test: of the mean difference over test folds, the corrected resampled t test; None under other folds, and
            for ensembles, which have none.
        detectable: difference that cohorts like this one find in four of five cases, see `mil.statistics.paired_tests`.
        verdict: "reference", "better", "worse" or "no difference shown".
    """

    name: str
    head: str
    entry: str
    value: Interval
    difference: Interval = NOTHING
    p: float | None = None
    p_holm: float | None = None
    p_delong: float | None = None
    p_t_test: float | None = None
    detectable: float | None = None
    verdict: str = "reference"

    def flat(self) -> dict[str, object]:
        """The row as columns of the CSV file."""
        plain: dict[str, object] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Interval):
                plain |= value.flat(item.name)
            else:
                plain[item.name] = value
        return plain


@dataclass(frozen=True)
class RunComparison:
    """Several runs on the same slides.

    Attributes:
        metric: what the runs are compared by.
        task: one of `mil.cohort.targets.TASKS`; `mil.evaluation.headlines.HEADLINES` has its metrics.
        target: the label column, or columns.
        n_slides: slides that all runs were scored on.
        n_patients: their patients.
        rows: the reference first, then as given.
        warnings: what a reader must know.
        synthetic: whether slides were drawn by `extract.synthetic.cohort`.
    """

    metric: str
    task: str
    target: str
    n_slides: int
    n_patients: int
    rows: tuple[ComparedRun, ...]
    warnings: tuple[str, ...]
    synthetic: bool

    def table(self) -> list[dict[str, object]]:
        """The columns of the CSV file, one mapping a run."""
        return [{"metric": self.metric, **row.flat()} for row in self.rows]

    def write_csv(self, path: Path) -> None:
        """Write the table, atomically."""
        write_csv(path, self._csv_rows())

    def _csv_rows(self) -> Iterator[Row]:
        table = self.table()
        yield tuple(table[0])
        for row in table:
            values = ("" if value is None else value for value in row.values())
            yield tuple(f"{value:.6g}" if isinstance(value, float) else value for value in values)


@dataclass(frozen=True, eq=False)
class _RunToCompare:
    """A run folder as comparisons read it, its slides and classes in the order of the first run's.

    An ensemble has no folds.
    """

    name: str
    folder: Path
    outcomes: Outcomes
    metrics: dict[str, Any]
    folds: list[FoldScore]


def compare_runs(
    folders: Sequence[str | Path], metric: str | None = None, replicates: int = 2000, seed: int = 0
) -> RunComparison:
    """Compare run folders with the first of them, paired slide by slide and resampled by patients.

    A run is called better or worse where the interval of the paired difference excludes 0 and the permutation test,
    corrected after Holm for the number of runs, is below 0.05. These tests and DeLong's speak of the trained heads on
    further patients; the corrected t test over folds speaks of training again.

    Args:
        folders: two or more folders that `mil train` or `mil ensemble` wrote; the first is the reference.
        metric: one of the task's, see `mil.evaluation.headlines.HEADLINES`; by default the first of them.
        replicates: bootstrap and permutation resamples.
        seed: of the resamples.

    Raises:
        RunError: fewer than two folders, one given twice, one that cannot be read, or runs of other tasks, columns,
            slides, patients or labels, which are named; runs for survival that were tested in other folds.
        EvaluationError: a metric that the task does not have.

    Example:
        >>> comparison = compare_runs(["runs/mean", "runs/abmil"])      # doctest: +SKIP
        >>> comparison.rows[1].verdict                                  # doctest: +SKIP
        'no difference shown'
    """
    runs = _read(folders)
    reference = runs[0]
    cohort = reference.outcomes.cohort
    metric = metric or first_headline(cohort.task)
    _check_metric(metric, cohort.task, len(cohort.columns))
    resampling = Resampling(replicates, seed)
    scored = [run.outcomes.evaluate(resampling) for run in runs]
    rows = [
        _row(run, reference, Interval(**found[metric]), metric, resampling)
        for run, found in zip(runs, scored, strict=True)
    ]
    adjusted = holm([row.p if row.p is not None else 1.0 for row in rows[1:]])
    judged = [
        _judged(replace(row, p_holm=None if row.p is None else p), metric)
        for row, p in zip(rows[1:], adjusted, strict=True)
    ]
    # what there are too few patients for is a matter of the truth, which all share
    warnings = list(scored[0]["warnings"])
    warnings += _warn_of_ensembles(runs) + [text for run in runs[1:] for text in _warn_of_folds(run, reference)]
    warnings += _warn_of_looks(runs)
    return RunComparison(
        metric=metric,
        task=cohort.task,
        target=cohort.target,
        n_slides=len(set(cohort.slide_ids)),
        n_patients=len(set(cohort.patient_ids)),
        rows=(rows[0], *judged),
        warnings=tuple(warnings),
        synthetic=any(bool(run.metrics.get("synthetic")) for run in runs),
    )


def _check_metric(metric: str, task: str, n_columns: int) -> None:
    """Refuse a metric that the task does not have, or that several targets have no mean of.

    Raises:
        EvaluationError: as said.
    """
    known = [name for name in HEADLINES[task] if n_columns == 1 or name not in OF_A_UNIT]
    if metric not in known:
        raise EvaluationError(
            f"got metric {metric!r} for runs of task {task} → expected one of {listed(known)} → "
            f"{did_you_mean(metric, known)}choose one of these"
        )


def _row(
    run: _RunToCompare, reference: _RunToCompare, value: Interval, metric: str, resampling: Resampling
) -> ComparedRun:
    head, entry = (str(run.metrics.get(key, "")) for key in ("head", "entry"))
    row = ComparedRun(run.name, head, entry, value)
    if run is reference:
        return row
    pair = Pair(run.outcomes, reference.outcomes, metric, resampling)
    return replace(
        row,
        difference=Interval.of(pair.difference()),
        p=pair.p(),
        p_delong=_delong(run.outcomes, reference.outcomes),
        p_t_test=_t_test(run, reference, metric),
        detectable=pair.detectable(),
    )


def _judged(row: ComparedRun, metric: str) -> ComparedRun:
    """The row with its verdict, which needs an interval on one side of 0 and a small corrected p value."""
    low, high = row.difference.low, row.difference.high
    if low is None or high is None or low <= 0 <= high or row.p_holm is None or row.p_holm >= SIGNIFICANT:
        return replace(row, verdict=NO_DIFFERENCE)
    return replace(row, verdict="better" if (low > 0) != (metric in LOWER_IS_BETTER) else "worse")


def _delong(found: Outcomes, reference: Outcomes) -> float | None:
    """DeLong's p value, where there are two classes, or a single label, and two patients of each answer."""
    cohort = found.cohort
    if cohort.has_classes and len(cohort.class_names) == 2:
        labels, rows = cohort.labels, np.arange(len(cohort))
    elif cohort.task == MULTI_LABEL and len(cohort.columns) == 1:
        rows = np.flatnonzero(np.isfinite(found.truth[:, 0]))
        labels = found.truth[rows, 0].astype(np.int64)
    else:
        return None
    scores = (found.predicted[rows, -1], reference.predicted[rows, -1])
    try:
        return delong_test(labels, *scores, [cohort.patient_ids[row] for row in rows]).p
    except EvaluationError:
        # too few patients, of which the warnings speak
        return None


def _t_test(run: _RunToCompare, reference: _RunToCompare, metric: str) -> float | None:
    """The corrected resampled t test over test folds that both runs have; None under other folds, or fewer than two."""
    if not run.folds or not reference.folds:
        return None
    if {each.test for each in run.folds} != {each.test for each in reference.folds}:
        return None
    scores, expected = (mean_over_seeds(each.folds, metric) for each in (run, reference))
    differences = [scores[test] - expected[test] for test in sorted(scores.keys() & expected.keys(), key=sorted)]
    return corrected_t_test(differences, mean_test_to_train(run.folds)).p if len(differences) > 1 else None


def _warn_of_ensembles(runs: Sequence[_RunToCompare]) -> list[str]:
    names = [run.name for run in runs if not run.folds]
    return [
        f"{name} is an ensemble, whose runs may have other folds: its t test over test folds is left out, and all "
        f"other figures are of its out-of-fold predictions"
        for name in names
    ]


def _warn_of_folds(run: _RunToCompare, reference: _RunToCompare) -> list[str]:
    if not run.folds or not reference.folds:
        return []
    how = differing_folds(reference.folds, run.folds)
    if how is None:
        return []
    return [
        f"{run.name} was trained under other folds than {reference.name} ({how}): a part of their difference is the "
        f"split's"
    ]


def _warn_of_looks(runs: Sequence[_RunToCompare]) -> list[str]:
    """Looks at the test folds beyond those of the runs themselves: choices that no p value here is corrected for."""
    looks: dict[Path, int] = {}
    for run in runs:
        ledger = run.folder.parent
        looks[ledger] = max(looks.get(ledger, 0), int(run.metrics.get("looks", 1)))
    total = sum(looks.values())
    if total <= len(runs):
        return []
    return [
        f"the test folds of this cohort were looked at {total} times for the {len(runs)} runs compared here: if these "
        f"were chosen for their scores, the differences are too large and the p values too small"
    ]


def _read(folders: Sequence[str | Path]) -> list[_RunToCompare]:
    """The runs, aligned with the first."""
    paths = [Path(folder) for folder in folders]
    absolute = [path.absolute() for path in paths]
    if len(paths) < 2 or len(set(absolute)) < len(paths):
        raise RunError(
            f"got the run folders {listed(map(str, paths))} → expected two or more, each once → give the folders of "
            f"the runs to compare, the reference first"
        )
    names = [path.name for path in absolute]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = [RunFolder.open(path) for path in absolute]
    outcomes = [read_outcomes(run) for run in runs]
    return [
        _RunToCompare(
            name=name,
            folder=run.path,
            outcomes=aligned(names[0], outcomes[0], name, each),
            metrics=run.metrics,
            folds=[] if is_ensemble(run.path) else fold_scores(run.predictions()),
        )
        for name, run, each in zip(names, runs, outcomes, strict=True)
    ]
