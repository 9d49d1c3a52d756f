"""Runs on the same slides compared with the first of them, and what the cohort could have shown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from mil import statistics
from mil.board import NOTHING, SIGNIFICANT, Interval
from mil.comparison import corrected_t_test, holm, permutation_test
from mil.delong import delong_test
from mil.ensemble import is_ensemble
from mil.errors import EvaluationError, RunError, listed
from mil.files import Row, write_csv
from mil.fold_scores import FoldScore, differing_folds, mean_over_seeds, mean_test_to_train, read_fold_scores
from mil.out_of_fold import OutOfFold, aligned_probabilities, read_out_of_fold, require_same_slides
from mil.power import minimum_detectable_difference

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
        p_delong: of the difference in AUROC, DeLong's test over patients; None unless there are two classes.
        p_t_test: of the mean difference over test folds, the corrected resampled t test; None under other folds, and
            for ensembles, which have none.
        detectable: difference that cohorts like this one find in four of five cases, see `mil.power`.
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
                plain |= {item.name: value.value, f"{item.name}_low": value.low, f"{item.name}_high": value.high}
            else:
                plain[item.name] = value
        return plain


@dataclass(frozen=True)
class RunComparison:
    """Several runs on the same slides.

    Attributes:
        metric: what the runs are compared by, one of `mil.statistics.SUMMARY_METRICS`.
        target: the label column.
        n_slides: slides that all runs were scored on.
        n_patients: their patients.
        rows: the reference first, then as given.
        warnings: what a reader must know.
        synthetic: whether slides were drawn by `extract.synthetic`.
    """

    metric: str
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
    found: OutOfFold
    folds: list[FoldScore]


def compare_runs(
    folders: Sequence[str | Path], metric: str = "macro_f1", replicates: int = 2000, seed: int = 0
) -> RunComparison:
    """Compare run folders with the first of them, paired slide by slide and resampled by patients.

    A run is called better or worse where the interval of the paired difference excludes 0 and the permutation test,
    corrected after Holm for the number of runs, is below 0.05. These tests and DeLong's speak of the trained heads on
    further patients; the corrected t test over folds speaks of training again.

    Args:
        folders: two or more folders that `mil train` or `mil ensemble` wrote; the first is the reference.
        metric: one of `mil.statistics.SUMMARY_METRICS`.
        replicates: bootstrap and permutation resamples.
        seed: of the resamples.

    Raises:
        RunError: fewer than two folders, one given twice, one that cannot be read, or runs of other slides, patients or
            labels, which are named.
        EvaluationError: an unknown metric.

    Example:
        >>> comparison = compare_runs(["runs/mean", "runs/abmil"])      # doctest: +SKIP
        >>> comparison.rows[1].verdict                                  # doctest: +SKIP
        'no difference shown'
    """
    statistics.check_metric(metric)
    runs = _read(folders)
    reference = runs[0]
    rows = [_row(run, reference, metric, replicates, seed) for run in runs]
    adjusted = holm([row.p if row.p is not None else 1.0 for row in rows[1:]])
    judged = [_judged(replace(row, p_holm=p)) for row, p in zip(rows[1:], adjusted, strict=True)]
    found = reference.found
    warnings = statistics.few_patients(found.class_names, found.labels, found.patient_ids)
    warnings += _warn_of_ensembles(runs) + [text for run in runs[1:] for text in _warn_of_folds(run, reference)]
    warnings += _warn_of_looks(runs)
    return RunComparison(
        metric=metric,
        target=str(found.metrics.get("target", "")),
        n_slides=len(found.slide_ids),
        n_patients=len(set(found.patient_ids)),
        rows=(rows[0], *judged),
        warnings=tuple(warnings),
        synthetic=any(bool(run.found.metrics.get("synthetic")) for run in runs),
    )


def _row(run: _RunToCompare, reference: _RunToCompare, metric: str, replicates: int, seed: int) -> ComparedRun:
    found, patients = run.found, reference.found.patient_ids
    scored = statistics.evaluate(
        found.labels, found.probabilities, patients, found.class_names, replicates=replicates, seed=seed
    )
    head, entry = (str(found.metrics.get(key, "")) for key in ("head", "entry"))
    row = ComparedRun(run.name, head, entry, Interval(**scored[metric]))
    if run is reference:
        return row
    both = (found.labels, found.probabilities, reference.found.probabilities, patients, metric)
    return replace(
        row,
        difference=Interval(*statistics.paired_difference(*both, replicates=replicates, seed=seed)),
        p=permutation_test(*both, resamples=replicates, seed=seed),
        p_delong=_delong(found, reference.found),
        p_t_test=_t_test(run, reference, metric),
        detectable=minimum_detectable_difference(*both, replicates=replicates, seed=seed),
    )


def _judged(row: ComparedRun) -> ComparedRun:
    """The row with its verdict, which needs an interval on one side of 0 and a small corrected p value."""
    low, high = row.difference.low, row.difference.high
    if low is None or high is None or low <= 0 <= high or row.p_holm is None or row.p_holm >= SIGNIFICANT:
        return replace(row, verdict=NO_DIFFERENCE)
    return replace(row, verdict="better" if low > 0 else "worse")


def _delong(found: OutOfFold, reference: OutOfFold) -> float | None:
    """DeLong's p value, where there are two classes and two patients of each."""
    if len(found.class_names) != 2:
        return None
    scores = (found.probabilities[:, 1], reference.probabilities[:, 1])
    try:
        return delong_test(found.labels, *scores, found.patient_ids).p
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
        looks[ledger] = max(looks.get(ledger, 0), int(run.found.metrics.get("looks", 1)))
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
    found = [read_out_of_fold(path) for path in absolute]
    for name, each in zip(names[1:], found[1:], strict=True):
        _require_same(names[0], found[0], name, each)
    require_same_slides(zip(names, found, strict=True))
    return [
        _RunToCompare(
            name,
            path,
            replace(found[0], probabilities=aligned_probabilities(each, found[0]), metrics=each.metrics),
            _fold_scores(path, found[0].class_names),
        )
        for name, path, each in zip(names, absolute, found, strict=True)
    ]


def _fold_scores(folder: Path, class_names: Sequence[str]) -> list[FoldScore]:
    return [] if is_ensemble(folder) else read_fold_scores(folder, class_names)


def _require_same(first_name: str, first: OutOfFold, name: str, other: OutOfFold) -> None:
    """Refuse a run of other slides, patients or labels, with the slides that differ."""
    if not first.slide_ids or set(first.class_names) != set(other.class_names):
        raise RunError(
            f"got {first_name} of the classes {listed(first.class_names)} on {len(first.slide_ids)} slides and {name} "
            f"of {listed(other.class_names)} → expected the same → train both with one label table and target"
        )
    facts, others = _facts(first), _facts(other)
    differences = {
        f"only in {first_name}": [slide for slide in facts if slide not in others],
        f"only in {name}": [slide for slide in others if slide not in facts],
        "of another patient": [s for s in facts if s in others and facts[s][0] != others[s][0]],
        "of another class": [s for s in facts if s in others and facts[s][1] != others[s][1]],
    }
    told = [f"{len(slides)} slides {what}: {listed(slides)}" for what, slides in differences.items() if slides]
    if told:
        raise RunError(
            f"got {first_name} and {name} of different slides ({'; '.join(told)}) → expected runs of the same slides, "
            f"patients and labels → train both with one label table and target, on stores with the same slides"
        )


def _facts(run: OutOfFold) -> dict[str, tuple[str, str]]:
    """Patient and class name of every slide."""
    names = [run.class_names[label] for label in run.labels.tolist()]
    return dict(zip(run.slide_ids, zip(run.patient_ids, names, strict=True), strict=True))
