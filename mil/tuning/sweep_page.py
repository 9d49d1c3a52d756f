"""A sweep as one HTML page and one figure: what was chosen, how good the choosing is, and which dimensions matter."""

import base64
from pathlib import Path

from mil.evaluation.headlines import HEADLINES, selection_name, tie_breaker
from mil.files import write_atomically
from mil.tuning.search_space import value_name
from mil.tuning.sweep_figures import importance_plot
from mil.tuning.sweep_folder import PROCEDURE, Sweep
from mil.visualization.html_page import load_template
from mil.visualization.plotting import write_figure

MOST_SETTINGS = 50
"""Settings in the page's table; the CSV file has all."""


def write_sweep_page(folder: Path, found: Sweep) -> Path:
    """Write ``sweep.html`` and ``figures/sensitivity`` (SVG and PNG) into a sweep's folder, and return the page's path.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    template = load_template("sweep.html", "the page of a sweep", value_name=value_name, number=_number)
    note = "synthetic data" if found.metrics["synthetic"] else ""
    task = found.cohort.task
    score = selection_name(task, found.config.select)
    figure = importance_plot(found.importances, score)
    (folder / "figures").mkdir(exist_ok=True)
    svg = write_figure(folder / "figures", "sensitivity", figure, note)
    page = template.render(
        found=found,
        metrics=found.metrics,
        nested=found.metrics["out_of_fold"],
        names=HEADLINES[task],
        score=score,
        loss=selection_name(task, tie_breaker(task)),
        procedure=PROCEDURE,
        averages=found.averages[:MOST_SETTINGS],
        figure=f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}",
    )
    path = folder / "sweep.html"
    # an id that is not UTF-8 reaches us with lone surrogates, which no HTML file can hold
    write_atomically(path, page.encode("utf-8", "backslashreplace"))
    return path


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
