"""Statistics: what intervals cost beside scikit-learn in a loop, and how long a report takes.

    python -m benchmarks.bench_statistics

The bootstrap scores 2,000 resamples of 1,000 patients (one slide each, four classes): macro-F1, balanced accuracy,
AUROC, accuracy and the confusion, recall, precision, F1 and AUROC of every class. scikit-learn scores the same numbers
from the same resamples, one after another, for some of them; its time is scaled to all. The largest difference between
the two on these resamples is a row of its own. The report is that of a run with 15 replicas (5 folds, 3 seeds), its
figures as SVG and PNG, on drawn predictions.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn import metrics as reference

from benchmarks.drawn_run import draw_predictions, write_drawn_run
from benchmarks.machine import Result, print_results, write_results
from mil.evaluation.operating_points import operate_one_vs_rest
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.reports.report import write_report
from mil.statistics import metrics
from mil.statistics.abstention import evaluate_abstention
from mil.statistics.bootstrap import Resampling, patient_bootstrap
from mil.statistics.calibration import evaluate_calibration
from mil.statistics.classification import evaluate

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
SUMMARIES = ("macro-F1", "balanced accuracy", "AUROC", "accuracy")


@dataclass(frozen=True)
class Slides:
    """Labels [n], probabilities [n, C] and patients [n] of a drawn cohort."""

    labels: IntArray
    probabilities: FloatArray
    patient_ids: tuple[str, ...]
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, predictions: ReplicaPredictions) -> "Slides":
        """The out-of-fold predictions."""
        cohort, probabilities = predictions.tested()
        return cls(cohort.labels, probabilities, cohort.patient_ids, cohort.class_names)

    def given(self) -> tuple[IntArray, FloatArray, tuple[str, ...], tuple[str, ...]]:
        """As the functions of `mil` take them."""
        return self.labels, self.probabilities, self.patient_ids, self.class_names


def timed(task: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def drawn_weights(slides: Slides, replicates: int) -> FloatArray:
    """How often each slide is in the first resamples of `evaluate`, [replicates, n]."""
    return patient_bootstrap(lambda weights: {"weights": weights}, slides.patient_ids, replicates)["weights"]


def score_by_loop(slides: Slides, weights: FloatArray) -> FloatArray:
    """The summaries [B, 4] by scikit-learn, one resample after another; figures of classes are made too."""
    found = []
    for times in weights.astype(np.int64):
        rows = np.repeat(np.arange(len(times)), times)
        labels, scores = slides.labels[rows], slides.probabilities[rows]
        predicted = scores.argmax(axis=1)
        reference.confusion_matrix(labels, predicted)
        _, _, f1, _ = reference.precision_recall_fscore_support(labels, predicted)
        areas = reference.roc_auc_score(np.eye(scores.shape[1])[labels], scores, average=None)
        balanced = reference.balanced_accuracy_score(labels, predicted)
        found.append((f1.mean(), balanced, areas.mean(), reference.accuracy_score(labels, predicted)))
    return np.array(found)


def score_at_once(slides: Slides, weights: FloatArray) -> FloatArray:
    """The same [B, 4] by `mil.statistics.metrics`."""
    labels, scores = slides.labels, slides.probabilities
    matrix = metrics.confusion(labels, scores.argmax(axis=1), scores.shape[1], weights)
    columns = (
        metrics.macro_f1(matrix),
        metrics.balanced_accuracy(matrix),
        metrics.auroc(labels, scores, weights),
        metrics.accuracy(matrix),
    )
    return np.stack(columns, axis=1)


def measure_bootstrap(slides: Slides, replicates: int, looped: int, repeats: int) -> list[Result]:
    """Ours, the loop's scaled to as many replicates, and how far apart the two are."""
    subject = f"{len(set(slides.patient_ids))} patients, {len(slides.class_names)} classes"
    ours = timed(lambda: evaluate(*slides.given(), resampling=Resampling(replicates)), repeats)
    by_bca = timed(lambda: evaluate(*slides.given(), resampling=Resampling(replicates, interval="bca")), repeats)
    weights = drawn_weights(slides, looped)
    scale = replicates / looped
    theirs = [scale * seconds for seconds in timed(lambda: score_by_loop(slides, weights), repeats)]
    apart = np.abs(score_by_loop(slides, weights) - score_at_once(slides, weights)).max(axis=0)
    ratios = [loop / mine for loop, mine in zip(theirs, ours, strict=True)]
    name = f"{replicates} resamples"
    return [
        Result.of(subject, f"{name}: tessera, percentile", "s", ours),
        Result.of(subject, f"{name}: tessera, BCa", "s", by_bca),
        Result.of(subject, f"{name}: scikit-learn in a loop, scaled from {looped}", "s", theirs),
        Result.of(subject, f"{name}: tessera, times faster", "x", ratios),
        *(
            Result.of(subject, f"largest difference in {what}", "", [float(value)])
            for what, value in zip(SUMMARIES, apart, strict=True)
        ),
    ]


def measure_parts(predictions: ReplicaPredictions, slides: Slides, repeats: int) -> list[Result]:
    """What else a report or `mil score` asks of the same slides."""
    subject = f"{len(set(slides.patient_ids))} patients, {len(slides.class_names)} classes"
    parts: dict[str, Callable[[], object]] = {
        "calibration": lambda: evaluate_calibration(*slides.given()),
        "abstention": lambda: evaluate_abstention(*slides.given()),
        "operating points, one against the others": lambda: operate_one_vs_rest(predictions, sensitivity=0.95),
    }
    return [Result.of(subject, f"2000 resamples: {name}", "s", timed(task, repeats)) for name, task in parts.items()]


def measure_report(predictions: ReplicaPredictions, repeats: int) -> list[Result]:
    """Seconds to write the page and all figures, and what they weigh."""
    subject = f"{len(predictions.cohort)} slides, {len(predictions.replicas)} replicas"
    with tempfile.TemporaryDirectory() as folder:
        run = write_drawn_run(Path(folder) / "run", predictions)
        seconds = timed(lambda: write_report(run), repeats)
        sizes = [path.stat().st_size for path in (run / "figures").glob("*.png")]
    return [
        Result.of(subject, "report: page, SVG and PNG figures", "s", seconds),
        Result.of(subject, f"report: {len(sizes)} PNG figures", "MB", [sum(sizes) / 1e6]),
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=1000, help="of one slide each")
    parser.add_argument("--report-patients", type=int, default=200, help="in the run that is reported")
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--looped", type=int, default=100, help="resamples that scikit-learn scores")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/statistics.csv"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure, print and write the CSV."""
    options = parse(arguments)
    predictions = draw_predictions(options.patients, options.folds, options.seeds)
    slides = Slides.of(predictions)
    rows = measure_bootstrap(slides, options.replicates, options.looped, options.repeats)
    rows += measure_parts(predictions, slides, options.repeats)
    reported = draw_predictions(options.report_patients, options.folds, options.seeds)
    rows += measure_report(reported, options.repeats)
    print_results(rows)
    write_results(options.out, rows)
    return rows


if __name__ == "__main__":
    main()
