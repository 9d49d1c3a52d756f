"""The report of a run: one HTML file made from the plain files of a run folder, and nothing else.

The page holds its own styles, figures and thumbnails and asks the network for nothing; a content security policy in
its head holds the browser to that. Slide ids, class names and settings come from other people's files, so all of them
reach the page through jinja2's escaping. matplotlib and jinja2 are optional and imported only in
`mil.visualization.html_page` and `mil.visualization.plotting`, when a report is written.

What a task's page holds of its own is in `class_page`, `multi_label_page`, `regression_page` and `survival_page`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL, REGRESSION, SURVIVAL, TASKS
from mil.errors import RunError, listed
from mil.evaluation.headlines import HEADLINES, RECORDS, replica_metrics
from mil.reports.class_page import class_figures, class_view, read_classes
from mil.reports.multi_label_page import label_figures, label_view
from mil.reports.page import (
    Thumbnails,
    learning_curves,
    shared_view,
    slide_rows,
    spread_of,
    write_page,
)
from mil.reports.regression_page import number_figures, number_view
from mil.reports.survival_page import survival_figures, survival_view
from mil.reports.values import Answers, read_answers
from mil.runs.folders import refuse_artefact
from mil.runs.run_tables import RunFiles, read_metrics
from mil.visualization import plotting, target_figures


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
        RunError: A file of the run is missing or lacks keys, columns or classes; its task is unknown; or the folder
            holds a packed model.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    folder = Path(run_folder)
    refuse_artefact(folder)
    metrics = read_metrics(folder)
    task = metrics["task"]
    if task not in TASKS:
        raise RunError(
            f"got {folder}, a run of task {task!r} → expected one of {listed(TASKS)} → write its report with the "
            "version of tessera-mil that trained it"
        )
    if task != CLASSIFICATION:
        return write_target_report(folder, metrics, thumbnails, title)
    classes = read_classes(folder, metrics)
    return write_page(
        classes.run, "report.html", lambda: class_figures(classes), lambda: class_view(classes, thumbnails), title
    )


def write_target_report(
    folder: Path, metrics: dict[str, Any], thumbnails: Thumbnails | None = None, title: str | None = None
) -> Path:
    """Write the page and figures of a run of labels, numbers or survival; returns the page's path.

    Args:
        folder: of the run.
        metrics: see `mil.runs.run_tables.read_metrics`.
        thumbnails: gives a slide's thumbnail, uint8 [height, width, 3], or None where it has none.
        title: the heading; target and head by default.

    Raises:
        RunError: a file of the run is missing, or lacks columns or values.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    answers = read_answers(folder, metrics)
    own = _PAGES[answers.run.metrics["task"]]

    def figures() -> Iterator[tuple[str, Any]]:
        yield from own.figures(answers)
        yield from learning_curves(answers.run)
        yield from _spread_figures(answers.run)

    def view() -> dict[str, Any]:
        shown = _view(answers) | own.view(answers)
        bases = slide_rows(answers.run, thumbnails)
        slides = [base | row for base, row in zip(bases, shown["slides"], strict=True)]
        has_thumbnails = any(slide["thumbnail"] for slide in slides)
        return shown | {"slides": sorted(slides, key=lambda slide: slide["place"]), "has_thumbnails": has_thumbnails}

    return write_page(answers.run, "target_report.html", figures, view, title)


def _spread_metrics(run: RunFiles) -> list[str]:
    """Those that have a value somewhere: errors of several units have no mean, see `mil.statistics.regression`."""
    wanted = replica_metrics(run.metrics["task"])
    found = [key for key in wanted if any(replica[key] is not None for replica in run.replicas)]
    return found or [wanted[0]]


def _spread_figures(run: RunFiles) -> Iterator[tuple[str, Any]]:
    task = run.metrics["task"]
    # R² has no lower end, and errors have the unit of their target
    draw = target_figures.free_spread_plot if task == REGRESSION else plotting.spread_plot
    for metric in _spread_metrics(run):
        yield f"spread-{metric}", draw(spread_of(run, metric), run.folds)


def _view(answers: Answers) -> dict[str, Any]:
    """What the template shows of every task, besides figures and slides."""
    run = answers.run
    task, evaluation = run.metrics["task"], run.evaluation
    names = HEADLINES[task]
    word = {MULTI_LABEL: "Labels", REGRESSION: "Numbers"}.get(task)
    outputs = (word, f"{len(answers.columns)}") if word else ("Patients with the event", f"{evaluation['n_events']}")
    return shared_view(run, outputs, {key: names[key] for key in _spread_metrics(run)}) | {
        "task": task,
        "columns": list(answers.columns),
        "metric_rows": [(key, label, evaluation[key], RECORDS[task][key].guessed()) for key, label in names.items()],
    }


class _Page(NamedTuple):
    """What is a task's own."""

    figures: Callable[[Answers], Iterator[tuple[str, Any]]]
    view: Callable[[Answers], dict[str, Any]]


_PAGES = {
    MULTI_LABEL: _Page(label_figures, label_view),
    REGRESSION: _Page(number_figures, number_view),
    SURVIVAL: _Page(survival_figures, survival_view),
}
