"""The report of a run: one HTML file made from the plain files of a run folder, and nothing else.

The page holds its own styles, figures and thumbnails and asks the network for nothing; a content security policy in
its head holds the browser to that. Slide ids, class names and settings come from other people's files, so all of them
reach the page through jinja2's escaping. matplotlib and jinja2 are optional and imported only here and in
`mil.plotting`, when a report is written.
"""

import base64
import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mil import curve_figures, plotting
from mil.abstention import evaluate_abstention
from mil.calibration import evaluate_calibration
from mil.curves import precision_recall_curve, roc_curve
from mil.errors import ConfigError, RunError
from mil.files import write_atomically
from mil.page import load_template
from mil.plotting import MISSING, ForestRow

THUMBNAIL_PX = 112
METRICS = {
    "macro_f1": "Macro-F1",
    "balanced_accuracy": "Balanced accuracy",
    "auroc": "AUROC",
    "accuracy": "Accuracy",
}
SPREAD_METRICS = ("macro_f1", "balanced_accuracy", "auroc")
CLASS_METRICS = {"recall": "Recall", "precision": "Precision", "f1": "F1", "auroc": "AUROC"}
COUNTS = {"tp": "TP", "fp": "FP", "fn": "FN", "tn": "TN"}
METRICS_KEYS = (
    "target",
    "class_names",
    "head",
    "entry",
    "created",
    "versions",
    "cohort",
    "warnings",
    "looks",
    "synthetic",
)
COLUMNS = {
    "oof.csv": ("slide_id", "patient_id", "target", "predicted"),
    "history.csv": ("replica", "fold", "seed", "epoch", "train_loss", "validation_loss"),
    "splits.csv": ("fold", "slide_id", "split"),
}

Table = list[dict[str, str]]
Thumbnails = Callable[[str], np.ndarray | None]


@dataclass(frozen=True)
class RunFiles:
    """What a report is made of: the files of a run folder, read and checked for their keys and columns."""

    metrics: dict[str, Any]
    out_of_fold: Table
    history: Table
    splits: Table
    config: str
    operating: list[dict[str, Any]]

    @property
    def class_names(self) -> list[str]:
        return list(self.metrics["class_names"])

    @cached_property
    def predictions(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Labels [n], probabilities [n, C] and patients [n], out of fold."""
        names = self.class_names
        labels = np.array([names.index(row["target"]) for row in self.out_of_fold], dtype=np.int64)
        values = np.array([[float(row[f"p_{name}"]) for name in names] for row in self.out_of_fold])
        return labels, values / values.sum(axis=1, keepdims=True), [row["patient_id"] for row in self.out_of_fold]

    @cached_property
    def calibration(self) -> dict[str, Any]:
        """See `mil.calibration.evaluate_calibration`; runs of earlier versions do not hold it."""
        stored: dict[str, Any] | None = self.metrics.get("calibration")
        return stored or evaluate_calibration(*self.predictions, self.class_names)

    @cached_property
    def abstention(self) -> dict[str, Any]:
        """See `mil.abstention.evaluate_abstention`."""
        return evaluate_abstention(*self.predictions, self.class_names)


def write_report(
    run_folder: Path,
    thumbnails: Thumbnails | None = None,
    title: str | None = None,
) -> Path:
    """Write `report.html` and its figures, `figures/*.svg` and `*.png`, into a run folder; returns the page's path.

    Args:
        run_folder: A finished run (see `mil train`). Where its metrics say `synthetic`, page and figures say so too.
        thumbnails: Gives a slide's thumbnail, uint8 [height, width, 3], or None where it has none.
        title: The heading; target and head by default.

    Raises:
        RunError: A file of the run is missing or lacks keys, columns or classes.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    template = load_template(
        "report.html", "the page of a report", number=_number, bracket=_bracket, duration=_duration
    )
    run = _read_run(Path(run_folder))
    synthetic = bool(run.metrics["synthetic"])
    # All of them before the first is written: without matplotlib nothing is left behind.
    drawn = list(_figures(run))
    folder = Path(run_folder) / "figures"
    folder.mkdir(exist_ok=True)
    figures = {}
    for name, figure in drawn:
        svg = plotting.write_figure(folder, name, figure, note="synthetic data" if synthetic else "")
        figures[name] = _data_uri(svg, "image/svg+xml")
    page = template.render(
        title=title or f"{run.metrics['target']} by {run.metrics['head']}",
        synthetic=synthetic,
        figures=figures,
        **_view(run, thumbnails),
    )
    path = Path(run_folder) / "report.html"
    # A file name that is not UTF-8 reaches us with lone surrogates, which no HTML file can hold.
    write_atomically(path, page.encode("utf-8", "backslashreplace"))
    return path


# ---------------------------------------------------------------------------------------------- reading


def _read_run(folder: Path) -> RunFiles:
    metrics = _read_metrics(folder)
    tables = {name: _read_table(folder, name, columns) for name, columns in COLUMNS.items()}
    run = RunFiles(
        metrics=metrics,
        out_of_fold=tables["oof.csv"],
        history=tables["history.csv"],
        splits=tables["splits.csv"],
        config=_read_text(folder, "config.yaml"),
        operating=_operating_points(folder),
    )
    _check_classes(run, folder)
    return run


def _operating_points(folder: Path) -> list[dict[str, Any]]:
    """Every class at the highest Youden index, see `mil.thresholds`; none of a run that holds no such predictions."""
    # they load torch, which no other part of a page needs
    from mil.saved_run import read_predictions
    from mil.thresholds import operate_one_vs_rest

    if not (folder / "predictions.csv").is_file():
        return []
    try:
        points = operate_one_vs_rest(read_predictions(folder))
    except ConfigError:
        # a setting that this version does not know costs the table, not the page
        return []
    return [
        {
            "class_name": point.class_name,
            "thresholds": [min(point.thresholds), max(point.thresholds)],
            "sensitivity": point.sensitivity,
            "specificity": point.specificity,
        }
        for point in points
    ]


def _read_text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(
            f"got the run folder {folder} without {name} → expected a finished run → "
            "let `mil train` finish there, or give the folder that it named at its end"
        ) from error


def _read_metrics(folder: Path) -> dict[str, Any]:
    text = _read_text(folder, "metrics.json")
    try:
        # Python writes NaN, which JSON does not know and which no reader is to see.
        metrics = json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise RunError(
            f"got {folder / 'metrics.json'} that is not JSON ({error}) → expected the file that "
            "`mil train` wrote → run `mil train` again"
        ) from error
    keys = (*METRICS_KEYS, "out_of_fold", "per_replica")
    missing = [key for key in keys if not isinstance(metrics, dict) or key not in metrics]
    if missing:
        raise RunError(
            f"got {folder / 'metrics.json'} without {', '.join(missing)} → expected {', '.join(keys)} → "
            "train again with this version of tessera-mil"
        )
    return dict(metrics)


def _read_table(folder: Path, name: str, columns: Sequence[str]) -> Table:
    reader = csv.DictReader(io.StringIO(_read_text(folder, name), newline=""))
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise RunError(
            f"got {folder / name} with the columns {', '.join(reader.fieldnames or ()) or 'none'} → expected "
            f"also {', '.join(missing)} → train again with this version of tessera-mil"
        )
    return list(reader)


def _check_classes(run: RunFiles, folder: Path) -> None:
    """Every label and probability column of oof.csv belongs to a class of metrics.json."""
    names = run.class_names
    for row in run.out_of_fold:
        lacking = [f"p_{name}" for name in names if f"p_{name}" not in row]
        strange = [row[key] for key in ("target", "predicted") if row[key] not in names]
        if lacking or strange:
            found = f"without {', '.join(lacking)}" if lacking else f"with the class {strange[0]!r}"
            raise RunError(
                f"got {folder / 'oof.csv'} {found} (slide {row['slide_id']!r}) → expected the classes "
                f"{', '.join(map(repr, names))} of metrics.json → keep the files of one run together"
            )


# ---------------------------------------------------------------------------------------------- figures


def _figures(run: RunFiles) -> Iterator[tuple[str, Any]]:
    """The figures of a run by file name."""
    evaluation = run.metrics["out_of_fold"]
    guesses = _guesses(run)
    yield (
        "metrics",
        plotting.forest_plot(
            [ForestRow(label, *_triple(evaluation[key]), reference=guesses[key]) for key, label in METRICS.items()]
        ),
    )
    yield (
        "classes",
        plotting.forest_plot(
            [
                ForestRow(label, *_triple(evaluation["classes"][name][key]), group=name)
                for name in run.class_names
                for key, label in CLASS_METRICS.items()
            ]
        ),
    )
    yield "confusion", plotting.confusion_plot(np.asarray(evaluation["confusion"]), run.class_names)
    yield from _class_curves(run)
    yield "reliability", curve_figures.reliability_plot(run.calibration["reliability"])
    yield "abstention", curve_figures.abstention_plot({"": run.abstention["curve"]})
    yield from _learning_curves(run)
    folds = _folds(run)
    for metric in SPREAD_METRICS:
        by_fold: dict[int, list[float | None]] = defaultdict(list)
        for replica in sorted(run.metrics["per_replica"], key=lambda replica: int(replica["seed"])):
            by_fold[int(replica["fold"])].append(replica[metric])
        yield f"spread-{metric}", plotting.spread_plot([by_fold[fold] for fold in folds], folds)


def _learning_curves(run: RunFiles) -> Iterator[tuple[str, Any]]:
    limit = plotting.loss_limit(_losses(run.history))
    rows_of = defaultdict(list)
    for row in run.history:
        rows_of[row["replica"]].append(row)
    for replica in run.metrics["per_replica"]:
        rows = rows_of[replica["replica"]]
        train, validation = _losses(rows)
        epochs = np.array([int(row["epoch"]) for row in rows], dtype=np.int64)
        yield (
            _curve_name(replica),
            plotting.learning_curve(epochs, train, validation, replica["best_epoch"], limit),
        )


def _class_curves(run: RunFiles) -> Iterator[tuple[str, Any]]:
    """ROC and precision-recall curves of the classes that have slides on both sides."""
    labels, probabilities, patients = run.predictions
    for at in _curved_classes(run):
        positive, scores = labels == at, probabilities[:, at]
        yield f"roc-{at}", curve_figures.roc_plot(roc_curve(positive, scores, patients))
        found = precision_recall_curve(positive, scores, patients)
        yield f"precision-recall-{at}", curve_figures.precision_recall_plot(found, float(positive.mean()))


def _curved_classes(run: RunFiles) -> list[int]:
    """Classes with a curve, by number; of two classes one tells all."""
    labels, _, _ = run.predictions
    found = [at for at in range(len(run.class_names)) if 0 < (labels == at).sum() < len(labels)]
    return found[1:] if len(run.class_names) == 2 else found


def _losses(rows: Table) -> np.ndarray:
    """Train and validation loss [2, rows]; NaN where there is none."""
    columns = [[_float(row[key]) for row in rows] for key in ("train_loss", "validation_loss")]
    return np.array(columns, dtype=np.float64)


def _curve_name(replica: dict[str, Any]) -> str:
    return f"learning-fold{int(replica['fold'])}-seed{int(replica['seed'])}"


def _guesses(run: RunFiles) -> dict[str, float | None]:
    """What guessing without looking at the slides gives: always the commonest class, or a draw."""
    evaluation = run.metrics["out_of_fold"]
    supports = [evaluation["classes"][name]["support"] for name in run.class_names]
    return {
        "macro_f1": None,
        "balanced_accuracy": 1 / sum(support > 0 for support in supports),
        "auroc": 0.5,
        "accuracy": max(supports) / sum(supports),
    }


# ---------------------------------------------------------------------------------------------- the page


def _view(run: RunFiles, thumbnails: Thumbnails | None) -> dict[str, Any]:
    """All that the template shows, besides the figures."""
    metrics, evaluation = run.metrics, run.metrics["out_of_fold"]
    losses = _losses(run.history)
    limit = plotting.loss_limit(losses)
    guesses = _guesses(run)
    slides = _slides(run, thumbnails)
    return {
        "facts": _facts(run),
        "warnings": _warnings(run),
        "headline": evaluation,
        "level": f"{100 * evaluation['confidence']:g} %",
        "class_names": run.class_names,
        "metric_rows": [(label, evaluation[key], guesses[key]) for key, label in METRICS.items()],
        "class_rows": [(name, evaluation["classes"][name]) for name in run.class_names],
        "class_metrics": CLASS_METRICS,
        "counts": COUNTS,
        "curves": [(at, run.class_names[at]) for at in _curved_classes(run)],
        "calibration": run.calibration,
        "abstention": run.abstention,
        "operating": run.operating,
        "replicas": [(replica, _curve_name(replica)) for replica in metrics["per_replica"]],
        "loss_limit": limit,
        "losses_above": int((losses > limit).sum()),
        "spread": [(key, METRICS[key], *_mean_and_deviation(run, key)) for key in SPREAD_METRICS],
        "composition": _composition(run),
        "attrition": metrics["cohort"].get("attrition", []),
        "slides": slides,
        "has_thumbnails": any(slide["thumbnail"] for slide in slides),
        "config": run.config,
        "n_seeds": len({replica["seed"] for replica in metrics["per_replica"]}),
        "looks": metrics["looks"],
    }


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    metrics, evaluation = run.metrics, run.metrics["out_of_fold"]
    seeds = sorted({int(replica["seed"]) for replica in metrics["per_replica"]})
    n_replicas, looks = len(metrics["per_replica"]), metrics["looks"]
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    return [
        ("Target", metrics["target"]),
        ("Head", metrics["head"]),
        ("Embeddings", metrics["entry"]),
        ("Slides", f"{evaluation['n_slides']}"),
        ("Patients", f"{evaluation['n_patients']}"),
        ("Classes", f"{len(run.class_names)}"),
        ("Replicas", f"{n_replicas} ({len(_folds(run))} folds, seeds {', '.join(map(str, seeds))})"),
        ("Created", metrics["created"].replace("T", " ")),
        ("Test folds looked at", "once" if looks == 1 else f"{looks} times"),
        ("Versions", versions or MISSING),
    ]


def _warnings(run: RunFiles) -> list[str]:
    """What the run itself warned of (rare classes, classes absent from folds), and repeated looks."""
    found = list(run.metrics["warnings"])
    if run.metrics["looks"] > 1:
        found.append(
            f"The test folds of this cohort have been looked at {run.metrics['looks']} times: "
            "the best of several results is likely better than what new patients will give."
        )
    return found


def _folds(run: RunFiles) -> list[int]:
    return sorted({int(replica["fold"]) for replica in run.metrics["per_replica"]})


def _mean_and_deviation(run: RunFiles, metric: str) -> tuple[float | None, float | None]:
    known = [replica[metric] for replica in run.metrics["per_replica"] if replica[metric] is not None]
    mean = float(np.mean(known)) if known else None
    return mean, float(np.std(known, ddof=1)) if len(known) > 1 else None


def _test_folds(run: RunFiles) -> dict[str, list[int]]:
    """The folds that test each slide, the same for every seed; several where folds are repeated."""
    found = sorted({(row["slide_id"], int(row["fold"])) for row in run.splits if row["split"] == "test"})
    folds: dict[str, list[int]] = defaultdict(list)
    for slide_id, fold in found:
        folds[slide_id].append(fold)
    return folds


def _composition(run: RunFiles) -> list[tuple[int, list[tuple[int, int]]]]:
    """By fold, the (slides, patients) of each class in its test part."""
    test_folds = _test_folds(run)
    patients: dict[tuple[int, str], list[str]] = defaultdict(list)
    for row in run.out_of_fold:
        for fold in test_folds.get(row["slide_id"], []):
            patients[fold, row["target"]].append(row["patient_id"])
    return [
        (fold, [(len(ids), len(set(ids))) for ids in (patients[fold, name] for name in run.class_names)])
        for fold in _folds(run)
    ]


def _slides(run: RunFiles, thumbnails: Thumbnails | None) -> list[dict[str, Any]]:
    test_folds = _test_folds(run)
    rows = []
    for row in run.out_of_fold:
        image = thumbnails(row["slide_id"]) if thumbnails else None
        rows.append(
            {
                "slide_id": row["slide_id"],
                "patient_id": row["patient_id"],
                "fold": ", ".join(map(str, test_folds.get(row["slide_id"], []))) or None,
                "true": row["target"],
                "predicted": row["predicted"],
                "wrong": row["predicted"] != row["target"],
                "probabilities": [(name, _float(row[f"p_{name}"])) for name in run.class_names],
                "thumbnail": None if image is None else _thumbnail_uri(image),
            }
        )
    return rows


def _thumbnail_uri(image: np.ndarray) -> str:
    small = Image.fromarray(np.ascontiguousarray(image))
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    # JPEG at a sixth of PNG's size: 300 stained thumbnails stay below 2 MB.
    small.save(buffer, "JPEG", quality=85)
    return _data_uri(buffer.getvalue(), "image/jpeg")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---------------------------------------------------------------------------------------------- formats


def _float(text: str) -> float | None:
    """A CSV field as a finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _triple(interval: dict[str, float | None]) -> tuple[float | None, float | None, float | None]:
    return interval["value"], interval["low"], interval["high"]


def _number(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _bracket(interval: dict[str, float | None], digits: int = 2) -> str:
    """`[0.75, 0.90]`, or a dash where no interval is claimed."""
    low, high = interval["low"], interval["high"]
    return MISSING if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"
