"""The importance of hyper-parameters as a figure, in the style of `mil.visualization.plotting`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mil.tuning.importance import Importance, Level
from mil.tuning.search_space import Interval, value_name
from mil.visualization.plotting import BLUE, INK, MUTED, RULE, VERMILLION, new_axes, new_figure, styled, wrap_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2
_WIDTH_PX, _HEIGHT_PX = 360, 220


@styled
def importance_plot(found: Sequence[Importance], score: str) -> "Figure":
    """Validation score against every dimension: a dot a trial (hollow if pruned), a bar at the median of a level.

    Args:
        found: in the order of the panels.
        score: what the scores are, such as ``AUROC``.
    """
    rows = max(1, math.ceil(len(found) / COLUMNS))
    columns = min(COLUMNS, max(1, len(found)))
    figure = new_figure(_WIDTH_PX * columns, _HEIGHT_PX * rows)
    limits = _limits(found)
    for at, each in enumerate(found):
        row, column = divmod(at, columns)
        left, top = _WIDTH_PX * column, _HEIGHT_PX * row
        right, bottom = _WIDTH_PX * (columns - 1 - column), _HEIGHT_PX * (rows - 1 - row)
        axes = new_axes(figure, left + 64, right + 12, top + 40, bottom + 46, ylim=limits)
        _panel(axes, each)
        axes.set_ylabel(f"validation {score}" if column == 0 else "")
    return figure


def _limits(found: Sequence[Importance]) -> tuple[float, float]:
    """One score axis for all panels, so that they can be compared."""
    scores = found[0].y if found else np.zeros(0)
    if not scores.size:
        return 0.0, 1.0
    margin = 0.08 * float(np.ptp(scores)) or 0.02
    return float(scores.min()) - margin, float(scores.max()) + margin


def _panel(axes: "Axes", each: Importance) -> None:
    interval = each.dimension.interval
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    if interval is None:
        _name_columns(axes, each)
    else:
        _scale(axes, interval)
    x = each.x + _jitter(len(each.x)) if interval is None else each.x
    for chosen, face in ((each.whole, BLUE), (~each.whole, "white")):
        axes.plot(x[chosen], each.y[chosen], "o", color=BLUE, markerfacecolor=face, markersize=4, alpha=0.55)
    for level in each.levels:
        axes.plot(_ends(level, interval), [level.median] * 2, color=VERMILLION, linewidth=2.4, zorder=3)
    share = "too few trials to say" if each.share is None else f"explains {100 * each.share:.0f} %"
    axes.set_title(wrap_label(each.dimension.key, 36, 1), loc="left", color=INK, weight="bold", pad=18, size=9.5)
    axes.text(0, 1.03, share, transform=axes.transAxes, color=MUTED, va="bottom")


def _scale(axes: "Axes", interval: Interval) -> None:
    """The axis of an interval, its numbers without exponents set as formulas."""
    if interval.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    elif interval.integer:
        axes.locator_params(axis="x", integer=True, nbins=6)


def _ends(level: Level, interval: Interval | None) -> list[float]:
    """From where to where the bar of a level goes; one value alone is given some width."""
    if interval is None:
        return [level.low - 0.36, level.high + 0.36]
    if level.low < level.high:
        return [level.low, level.high]
    if interval.log:
        half = (interval.high / interval.low) ** 0.03
        return [level.low / half, level.low * half]
    half = 0.03 * (interval.high - interval.low)
    return [level.low - half, level.low + half]


def _name_columns(axes: "Axes", each: Importance) -> None:
    """One column for each value of a list, tried or not."""
    values = each.dimension.values
    letters = max(4, 46 // max(1, len(values)))
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_xticks(range(len(values)), [wrap_label(value_name(value), letters, 2) for value in values])


def _jitter(n: int) -> np.ndarray:
    """Small shifts that keep dots apart, the same for the same number of them."""
    return np.random.default_rng(0).uniform(-0.22, 0.22, n)
