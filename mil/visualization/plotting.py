"""Figures of a run: intervals, confusion matrix, learning curves and the spread over folds and seeds.

Every function returns a `matplotlib.figure.Figure` that belongs to the caller; no pyplot state is touched, and the
user's matplotlib settings are set aside while a figure is made. `to_svg` turns a figure into text, and is what keeps
class names from being read as markup or as formulas; `to_png` gives it as a picture, and `write_figure` writes both.
matplotlib is an optional dependency: it is imported when the first figure is made. Lengths are CSS pixels (96 to the
inch), so that a figure shows at the size it was made for.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from mil.errors import MissingExtraError
from mil.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

P = ParamSpec("P")
R = TypeVar("R")

MISSING = "–"
INK, MUTED, RULE = "#1b1f24", "#59636e", "#d5dae0"
# Two of Okabe and Ito's colours: they stay apart in every common form of colour blindness and in grey print.
BLUE, VERMILLION = "#0072b2", "#d55e00"
# For several curves: the same two first, without the yellow, which white paper swallows.
OKABE_ITO = (BLUE, VERMILLION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
FONT_STACK = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
PX = 1 / 96
NOTE_PX = 16
PNG_DPI = 200
POINTS_PER_PX = 0.75


@dataclass(frozen=True)
class ForestRow:
    """One line of a forest plot: a metric in [0, 1] with its interval; None where it is undefined.

    `reference` marks what guessing would give; rows of equal `group` stand under one heading.
    """

    label: str
    value: float | None
    low: float | None
    high: float | None
    reference: float | None = None
    group: str = ""


@contextmanager
def _style() -> Iterator[None]:
    """Our settings in place of the user's, for as long as a figure is made or written.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtraError(
            'got no matplotlib → expected it for the figures of a report → run pip install "tessera-mil[report]"'
        ) from error
    ours = {
        "svg.fonttype": "none",
        "svg.hashsalt": "tessera",
        "text.parse_math": False,
        "font.family": ["DejaVu Sans"],
        "font.size": 12 * POINTS_PER_PX,
        "text.color": INK,
        "axes.edgecolor": RULE,
        "axes.labelcolor": MUTED,
        "axes.linewidth": 1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Letters that DejaVu lacks are only measured with it here; the reader's own fonts draw them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours)
        yield


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Draw in our style, whatever the process has set, and leave matplotlib as it was."""

    @wraps(function)
    def in_style(*args: P.args, **keywords: P.kwargs) -> R:
        with _style():
            return function(*args, **keywords)

    return in_style


@styled
def to_svg(figure: "Figure", note: str = "") -> str:
    """A figure as SVG text, the same bytes for the same figure; `note` is printed below it."""
    buffer = io.StringIO()
    with _noted(figure, note) as frame:
        figure.savefig(buffer, format="svg", bbox_inches=frame, metadata={"Date": None, "Creator": None})
    return re.sub(r"'DejaVu Sans'", lambda _: FONT_STACK, buffer.getvalue())


@styled
def to_png(figure: "Figure", note: str = "") -> bytes:
    """A figure as PNG of 200 dots per inch, the same bytes for the same figure; `note` is printed below it.

    Letters that DejaVu Sans lacks, such as Chinese ones, are boxes here; the SVG leaves them to the reader's fonts.
    """
    buffer = io.BytesIO()
    with _noted(figure, note) as frame:
        figure.savefig(buffer, format="png", dpi=PNG_DPI, bbox_inches=frame, metadata={"Software": None})
    return buffer.getvalue()


def write_figure(folder: Path, name: str, figure: "Figure", note: str = "") -> bytes:
    """Write `name`.svg and `name`.png into a folder, and return the bytes of the SVG."""
    svg = to_svg(figure, note).encode("utf-8", "backslashreplace")
    write_atomically(folder / f"{name}.svg", svg)
    write_atomically(folder / f"{name}.png", to_png(figure, note))
    return svg


@contextmanager
def _noted(figure: "Figure", note: str) -> "Iterator[Bbox]":
    """The frame to save, in inches, with the note in a strip of its own below the figure, where it covers nothing."""
    from matplotlib.transforms import Bbox

    width, height = figure.get_size_inches()
    if not note:
        yield Bbox([[0, 0], [width, height]])
        return
    strip = NOTE_PX * PX
    text = figure.text(1, -strip / height / 2, printable(note), ha="right", va="center", color=VERMILLION, size=8)
    try:
        yield Bbox([[0, -strip], [width, height]])
    finally:
        # another format of the same figure prints it anew
        text.remove()


def printable(text: str) -> str:
    """The text with control characters and direction overrides made visible; they are not allowed in SVG."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def wrap_label(text: str, width: int, lines: int) -> str:
    """The text in at most `lines` lines of `width` letters; the middle of a long one gives way to an ellipsis.

    Names of subtypes often differ at their end only, which is therefore kept.
    """
    text = printable(text)
    for room in range(width * lines, 2, -1):
        tail = room // 2
        short = text if len(text) <= room else f"{text[: room - tail - 1].rstrip()}…{text[-tail:].lstrip()}"
        wrapped = textwrap.wrap(short, width)
        if len(wrapped) <= lines:
            break
    return "\n".join(wrapped) or MISSING


def new_figure(width_px: float, height_px: float) -> "Figure":
    """An empty white figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_px * PX, height_px * PX), facecolor="white")


def new_axes(
    figure: "Figure", left_px: float, right_px: float, top_px: float, bottom_px: float, **keywords: Any
) -> "Axes":
    """Axes with the given margins in pixels."""
    width, height = (side / PX for side in figure.get_size_inches())
    box = (left_px / width, bottom_px / height, 1 - (left_px + right_px) / width)
    axes: Axes = figure.add_axes((*box, 1 - (top_px + bottom_px) / height), **keywords)
    axes.tick_params(length=3)
    return axes


@styled
def forest_plot(rows: Sequence[ForestRow]) -> "Figure":
    """Values with their intervals on one axis from 0 to 1, a dotted mark where guessing would be.

    A value without an interval is drawn hollow, an undefined one not at all.
    """
    row_px, left_px, right_px, top_px, bottom_px = 22, 132, 124, 4, 26
    groups = [row.group for row in rows]
    starts = [bool(group) and group != before for group, before in zip(groups, ["", *groups], strict=False)]
    lines = len(rows) + sum(starts)
    figure = new_figure(460, top_px + bottom_px + row_px * max(lines, 1))
    axes = new_axes(figure, left_px, right_px, top_px, bottom_px, xlim=(0, 1), ylim=(max(lines, 1) - 0.5, -0.5))
    axes.set_xticks(np.linspace(0, 1, 5), ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    line = 0
    for row, starts_group in zip(rows, starts, strict=True):
        if starts_group:
            _beside(axes, wrap_label(row.group, 48, 1), line, left_px=left_px - 2, weight="bold")
            line += 1
        _forest_row(axes, row, line, left_px)
        line += 1
    return figure


def _forest_row(axes: "Axes", row: ForestRow, line: int, left_px: float) -> None:
    _beside(axes, wrap_label(row.label, 18, 1), line, left_px=left_px - (14 if row.group else 2))
    _beside(axes, interval_text(row.value, row.low, row.high), line)
    if row.reference is not None:
        axes.plot([row.reference] * 2, [line - 0.38, line + 0.38], color=INK, linewidth=1.2, linestyle=":")
    bounds = [bound for bound in (row.low, row.high) if bound is not None]
    bounded = len(bounds) == 2
    if bounded:
        axes.plot(bounds, [line, line], color=BLUE, linewidth=2.2, solid_capstyle="butt", alpha=0.55)
    if row.value is not None:
        face = BLUE if bounded else "white"
        axes.plot(row.value, line, "o", markersize=5, color=BLUE, markerfacecolor=face, clip_on=False, zorder=3)


def _beside(axes: "Axes", text: str, line: int, left_px: float | None = None, **keywords: Any) -> None:
    """Text in the margin of a line: `left_px` left of the axis, or just right of it."""
    x, offset_px = (1, 10.0) if left_px is None else (0, -left_px)
    offset = (offset_px * POINTS_PER_PX, 0)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (x, line), offset, annotation_clip=False, **place, **keywords)


def interval_text(value: float | None, low: float | None, high: float | None, digits: int = 2) -> str:
    """`0.83 [0.75, 0.90]`, the bracket left out where there is no interval."""
    if value is None:
        return MISSING
    bracket = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{bracket}"


@styled
def confusion_plot(counts: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """Counts and row percentages of a confusion matrix [classes, classes]; rows are true, columns predicted.

    The colour follows the row percentage, so that a rare class is as readable as a frequent one.
    """
    n_classes = len(class_names)
    cell_px = max(58.0, min(80.0, 560 / n_classes))
    left_px, right_px, top_px, bottom_px = 130, 6, 66, 4
    figure = new_figure(left_px + right_px + cell_px * n_classes, top_px + bottom_px + cell_px * n_classes)
    axes = new_axes(figure, left_px, right_px, top_px, bottom_px)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    edges = np.arange(n_classes + 1) - 0.5
    # The upper end of "Blues" is nearly black; stopping short of it keeps the hue.
    axes.pcolormesh(edges, edges, shares, cmap="Blues", vmin=0, vmax=1.15, edgecolors="white", linewidth=2)
    axes.set_ylim(n_classes - 0.5, -0.5)
    for (true, predicted), share in np.ndenumerate(shares):
        percent = f"{100 * share:.0f} %" if totals[true, 0] else MISSING
        ink = "white" if share > 0.78 else INK
        weight = "bold" if true == predicted else "normal"
        axes.text(
            predicted,
            true - 0.1,
            f"{counts[true, predicted]:.0f}",
            ha="center",
            va="center",
            color=ink,
            size=11.5,
            weight=weight,
        )
        axes.text(predicted, true + 0.2, percent, ha="center", va="center", color=ink, size=8)
    rows, columns = _class_labels(class_names, int(cell_px / 7.4))
    rows = [f"{row}\nn = {total:.0f}" for row, total in zip(rows, totals[:, 0], strict=True)]
    axes.set_xticks(range(n_classes), columns, color=INK, size=8.5)
    axes.set_yticks(range(n_classes), rows, color=INK, size=8.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=4)
    axes.spines[:].set_visible(False)
    figure.text(0.006, 1 - 8 / (figure.get_figheight() / PX), "true ↓   predicted →", va="top", color=MUTED)
    return figure


def _class_labels(class_names: Sequence[str], column_letters: int) -> tuple[list[str], list[str]]:
    """Labels of rows and columns; classes are numbered where a name does not fit above its column."""
    columns = [wrap_label(name, column_letters, 3) for name in class_names]
    words = (word for name in class_names for word in name.split())
    if max(map(len, words), default=0) <= column_letters and not any("…" in column for column in columns):
        return [wrap_label(name, 18, 2) for name in class_names], columns
    numbers = [str(number) for number in range(1, len(class_names) + 1)]
    return [wrap_label(f"{n}  {name}", 18, 2) for n, name in zip(numbers, class_names, strict=True)], numbers


@styled
def learning_curve(
    epochs: np.ndarray,
    train_loss: np.ndarray,
    validation_loss: np.ndarray,
    best_epoch: int,
    y_max: float,
) -> "Figure":
    """One replica's losses [epochs] on an axis from 0 to `y_max`; the best epoch is marked, gaps are NaN."""
    figure = new_figure(230, 150)
    axes = new_axes(figure, 34, 10, 8, 24, ylim=(0, y_max))
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.axvline(best_epoch, color=INK, linewidth=1, linestyle=":")
    axes.plot(epochs, train_loss, color=BLUE, linewidth=1.6)
    axes.plot(epochs, validation_loss, color=VERMILLION, linewidth=1.6, linestyle=(0, (4, 1.4)))
    best = epochs == best_epoch
    axes.plot(epochs[best], validation_loss[best], "o", color=VERMILLION, markersize=5)
    axes.locator_params(axis="x", integer=True, nbins=5)
    axes.locator_params(axis="y", nbins=4)
    return figure


@styled
def spread_plot(values: Sequence[Sequence[float | None]], folds: Sequence[int]) -> "Figure":
    """One metric of every replica: a column a fold, a dot a seed (in order from left to right), a bar at the mean.

    `values` [folds][seeds] lie in 0..1; the dotted line is the mean of all.
    """
    figure = new_figure(max(320, 40 + 30 * len(folds)), 190)
    axes = new_axes(figure, 34, 8, 8, 40, ylim=(0, 1.02), xlim=(-0.6, len(folds) - 0.4))
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    known = [value for seeds in values for value in seeds if value is not None]
    if known:
        axes.axhline(float(np.mean(known)), color=INK, linewidth=1, linestyle=":")
    for column, seeds in enumerate(values):
        shift = 0.5 / max(len(seeds) - 1, 1)
        points = [(column + shift * (k - (len(seeds) - 1) / 2), v) for k, v in enumerate(seeds) if v is not None]
        if points:
            mean = float(np.mean([value for _, value in points]))
            axes.plot([column - 0.36, column + 0.36], [mean, mean], color=BLUE, linewidth=2, alpha=0.45)
            axes.plot(*zip(*points, strict=True), "o", color=BLUE, markersize=4.5, alpha=0.9, clip_on=False)
    axes.set_xticks(range(len(folds)), [str(fold) for fold in folds])
    axes.set_xlabel("fold")
    return figure


def loss_limit(losses: np.ndarray) -> float:
    """The upper end of a loss axis shared by all replicas: their maximum, or less where few points tower above."""
    finite = losses[np.isfinite(losses)]
    if not finite.size:
        return 1.0
    typical, highest = float(np.percentile(finite, 98)), float(finite.max())
    limit = highest if highest <= 2 * typical else typical
    return limit * 1.08 if limit > 0 and math.isfinite(limit) else 1.0
