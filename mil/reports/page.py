"""What the report of every run holds, whatever its target: facts, learning curves, spread, slides; and its writing."""

import base64
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mil.arrays import BoolArray, FloatArray
from mil.errors import RunError
from mil.files import write_atomically
from mil.runs.run_tables import RunFiles, Table, finite
from mil.statistics.curves import precision_recall_curve, roc_curve
from mil.statistics.regression import OF_A_UNIT
from mil.visualization import curve_figures, plotting
from mil.visualization.html_page import load_template
from mil.visualization.plotting import MISSING

THUMBNAIL_PX = 112

Thumbnails = Callable[[str], np.ndarray | None]
Interval = Mapping[str, float | None]


def write_page(
    run: RunFiles,
    template: str,
    figures: Callable[[], Iterable[tuple[str, Any]]],
    view: Callable[[], Mapping[str, Any]],
    title: str | None = None,
) -> Path:
    """Write ``report.html`` and ``figures/`` into a run folder; returns the page's path.

    Args:
        run: of the folder.
        template: file below ``templates/`` that extends ``_report.html``.
        figures: gives every figure by file name.
        view: gives all that the template shows besides them.
        title: the heading; target and head by default.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed; then nothing is written.
    """
    filters: dict[str, Callable[..., Any]] = {
        "number": number,
        "bracket": bracket,
        "duration": _duration,
        "significant": significant,
        "score": score,
        "score_bracket": score_bracket,
    }
    page = load_template(template, "the page of a report", **filters)
    synthetic = bool(run.metrics["synthetic"])
    # All of them before the first is written: without matplotlib nothing is left behind.
    drawn = list(figures())
    folder = run.folder / "figures"
    if folder.is_symlink():
        raise RunError(
            f"got {folder}, a link to {folder.resolve()} → expected a folder of the run → remove the link: figures are "
            f"written into the run alone"
        )
    folder.mkdir(exist_ok=True)
    sources = {}
    for name, figure in drawn:
        svg = plotting.write_figure(folder, name, figure, note="synthetic data" if synthetic else "")
        sources[name] = _data_uri(svg, "image/svg+xml")
    heading = title or f"{run.metrics['target']} by {run.metrics['head']}"
    text = page.render(title=heading, synthetic=synthetic, figures=sources, **view())
    path = run.folder / "report.html"
    # A file name that is not UTF-8 reaches us with lone surrogates, which no HTML file can hold.
    write_atomically(path, text.encode("utf-8", "backslashreplace"))
    return path


# ---------------------------------------------------------------------------------------------- figures


def learning_curves(run: RunFiles) -> Iterator[tuple[str, Any]]:
    """One figure a replica by file name, all on one scale."""
    limit = plotting.loss_limit(_losses(run.history))
    rows_of = defaultdict(list)
    for row in run.history:
        rows_of[row["replica"]].append(row)
    for replica in run.replicas:
        rows = rows_of[replica["replica"]]
        train, validation = _losses(rows)
        epochs = np.array([int(row["epoch"]) for row in rows], dtype=np.int64)
        yield (
            _curve_name(replica),
            plotting.learning_curve(epochs, train, validation, replica["best_epoch"], limit),
        )


def curve_pair(
    at: int, positive: BoolArray, scores: FloatArray, patient_ids: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """ROC and precision-recall curve of a class or label, by file name.

    Args:
        at: its number, which names the files.
        positive: bool [n], with slides on both sides.
        scores: [n].
        patient_ids: [n].
    """
    yield f"roc-{at}", curve_figures.roc_plot(roc_curve(positive, scores, patient_ids))
    found = precision_recall_curve(positive, scores, patient_ids)
    yield f"precision-recall-{at}", curve_figures.precision_recall_plot(found, float(positive.mean()))


def spread_of(run: RunFiles, metric: str) -> list[list[float | None]]:
    """A metric of every replica, [folds][seeds]."""
    by_fold: dict[int, list[float | None]] = defaultdict(list)
    for replica in sorted(run.replicas, key=lambda replica: int(replica["seed"])):
        by_fold[int(replica["fold"])].append(replica[metric])
    return [by_fold[fold] for fold in run.folds]


def _losses(rows: Table) -> np.ndarray:
    """Train and validation loss [2, rows]; NaN where there is none."""
    columns = [[finite(row[key]) for row in rows] for key in ("train_loss", "validation_loss")]
    return np.array(columns, dtype=np.float64)


def _curve_name(replica: Mapping[str, Any]) -> str:
    return f"learning-fold{int(replica['fold'])}-seed{int(replica['seed'])}"


# ---------------------------------------------------------------------------------------------- the page


def shared_view(run: RunFiles, outputs: tuple[str, str], spread: Mapping[str, str]) -> dict[str, Any]:
    """What ``_report.html`` shows, but for the slides.

    Args:
        run: the files.
        outputs: the fact that tells what is predicted, such as ("Classes", "4").
        spread: names of the metrics of replicas, by key.
    """
    evaluation, losses = run.evaluation, _losses(run.history)
    limit = plotting.loss_limit(losses)
    return {
        "facts": _facts(run, outputs),
        "warnings": _warnings(run),
        "headline": evaluation,
        "level": f"{100 * evaluation['confidence']:g} %",
        "replicas": [(replica, _curve_name(replica)) for replica in run.replicas],
        "loss_limit": limit,
        "losses_above": int((losses > limit).sum()),
        "spread": [(key, label, *_mean_and_deviation(run, key)) for key, label in spread.items()],
        "attrition": run.metrics["cohort"].get("attrition", []),
        "config": run.config,
        "n_seeds": len(run.seeds),
        "looks": run.metrics["looks"],
    }


def slide_rows(run: RunFiles, thumbnails: Thumbnails | None) -> list[dict[str, Any]]:
    """Id, patient, test folds and thumbnail of every slide, in the order of ``oof.csv``."""
    rows = []
    for row in run.out_of_fold:
        image = thumbnails(row["slide_id"]) if thumbnails else None
        rows.append(
            {
                "slide_id": row["slide_id"],
                "patient_id": row["patient_id"],
                "fold": ", ".join(map(str, run.test_folds.get(row["slide_id"], []))) or None,
                "thumbnail": None if image is None else _thumbnail_uri(image),
            }
        )
    return rows


def _facts(run: RunFiles, outputs: tuple[str, str]) -> list[tuple[str, str]]:
    metrics, looks = run.metrics, run.metrics["looks"]
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    seeds = ", ".join(map(str, run.seeds))
    return [
        ("Target", metrics["target"]),
        ("Head", metrics["head"]),
        ("Embeddings", metrics["entry"]),
        ("Slides", f"{run.evaluation['n_slides']}"),
        ("Patients", f"{run.evaluation['n_patients']}"),
        outputs,
        ("Replicas", f"{len(run.replicas)} ({len(run.folds)} folds, seeds {seeds})"),
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


def _mean_and_deviation(run: RunFiles, metric: str) -> tuple[float | None, float | None]:
    known = [replica[metric] for replica in run.replicas if replica[metric] is not None]
    mean = float(np.mean(known)) if known else None
    return mean, float(np.std(known, ddof=1)) if len(known) > 1 else None


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


def triple(interval: Interval) -> tuple[float | None, float | None, float | None]:
    """Value, low and high end."""
    return interval["value"], interval["low"], interval["high"]


def number(value: float | None, digits: int = 2) -> str:
    """With so many decimals, or a dash."""
    return MISSING if value is None else f"{value:.{digits}f}"


def bracket(interval: Interval, digits: int = 2) -> str:
    """`[0.75, 0.90]`, or a dash where no interval is claimed."""
    low, high = interval["low"], interval["high"]
    return MISSING if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def significant(value: float | None) -> str:
    """Four digits of a number of any unit, or a dash.

    >>> significant(1234.56), significant(0.00123456), significant(1.5e-9)
    ('1235', '0.001235', '1.5e-09')
    """
    if value is None:
        return MISSING
    exponent = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.4g}" if not -6 < exponent < 9 else f"{value:.{max(0, 3 - exponent)}f}"


def score(value: float | None, metric: str) -> str:
    """A metric by its key: errors, which have the unit of their target, by significant digits."""
    return significant(value) if metric in OF_A_UNIT else number(value, 3)


def score_bracket(interval: Interval, metric: str) -> str:
    """As `bracket`, of a metric by its key."""
    low, high = interval["low"], interval["high"]
    return MISSING if low is None or high is None else f"[{score(low, metric)}, {score(high, metric)}]"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"
