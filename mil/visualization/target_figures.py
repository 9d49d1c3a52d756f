"""Figures of numbers and survival, in the style of `mil.visualization.plotting`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mil.arrays import BoolArray, FloatArray
from mil.statistics.survival import kaplan_meier
from mil.visualization.plotting import (
    BLUE,
    INK,
    MUTED,
    POINTS_PER_PX,
    PX,
    RULE,
    VERMILLION,
    new_axes,
    new_figure,
    spread_plot,
    styled,
    wrap_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SIDE_PX = 300


@styled
def scatter_plot(truth: FloatArray, predicted: FloatArray) -> "Figure":
    """Predicted against true numbers, one dot a slide; on the dotted line they are equal.

    Args:
        truth: [n].
        predicted: [n].
    """
    values = np.concatenate([truth, predicted])
    margin = 0.04 * float(np.ptp(values) or 1.0)
    limits = (float(values.min()) - margin, float(values.max()) + margin)
    figure = new_figure(SIDE_PX, SIDE_PX - 16)
    axes = new_axes(figure, 76, 12, 8, 40, xlim=limits, ylim=limits)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.plot(limits, limits, color=INK, linewidth=1, linestyle=":")
    axes.plot(truth, predicted, "o", color=BLUE, markersize=3.5, alpha=0.6, markeredgewidth=0)
    for axis in (axes.xaxis, axes.yaxis):
        _few_ticks(axis)
    axes.set_xlabel("true")
    axes.set_ylabel("predicted")
    # beside the longest numbers, which would push it out of the figure
    axes.yaxis.set_label_coords(-64 / (SIDE_PX - 88), 0.5)
    return figure


@styled
def free_spread_plot(values: Sequence[Sequence[float | None]], folds: Sequence[int]) -> "Figure":
    """As `mil.visualization.plotting.spread_plot`, for metrics that do not lie between 0 and 1.

    Args:
        values: [folds][seeds], None where one is undefined.
        folds: their numbers.
    """
    figure = spread_plot(values, folds)
    axes = figure.axes[0]
    known = [value for seeds in values for value in seeds if value is not None] or [0.0, 1.0]
    margin = 0.08 * (max(known) - min(known) or max(abs(known[0]), 1.0))
    axes.set_ylim(min(known) - margin, max(known) + margin)
    _few_ticks(axes.yaxis)
    # wider numbers than 0.25 need more room on the left
    left = 66 * PX / figure.get_figwidth()
    box = axes.get_position()
    axes.set_position((left, box.y0, box.x1 - left, box.height))
    return figure


@styled
def survival_plot(groups: Mapping[str, tuple[FloatArray, BoolArray]], time_label: str) -> "Figure":
    """Kaplan-Meier curves, with a mark where somebody was last seen; how many are at risk stands below the ticks.

    Args:
        groups: by name, at most two: times [n] and events [n].
        time_label: of the time axis.
    """
    figure = new_figure(460, 320)
    longest = max((float(times.max()) for times, _ in groups.values() if len(times)), default=1.0) or 1.0
    axes = new_axes(figure, 54, 12, 28, 88, xlim=(0, 1.02 * longest), ylim=(0, 1.03))
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    _few_ticks(axes.xaxis)
    for at, (name, (times, events)) in enumerate(groups.items()):
        colour, style = ((VERMILLION, "-"), (BLUE, "--"))[at % 2]
        curve = kaplan_meier(times, events)
        steps = np.r_[curve.times, times.max(initial=0.0)], np.r_[curve.alive, curve.alive[-1]]
        axes.step(*steps, where="post", color=colour, linestyle=style, linewidth=1.8, label=name)
        seen = times[~events]
        axes.plot(seen, curve.alive[np.searchsorted(curve.times, seen, side="right") - 1], "|", color=colour, ms=5)
        _numbers_at_risk(axes, times, at, colour)
    _below(axes, "at risk", 0, 0, MUTED, shift_px=-34)
    axes.set_xlabel(wrap_label(time_label, 60, 1))
    axes.xaxis.set_label_coords(0.5, -72 / 204)
    axes.set_ylabel("share without the event")
    # above the axes, where no curve runs
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return figure


def _numbers_at_risk(axes: "Axes", times: FloatArray, row: int, colour: str) -> None:
    """How many are still observed at each tick of the time axis, in a row below it."""
    longest = axes.get_xlim()[1]
    for tick in axes.get_xticks():
        if 0 <= tick <= longest:
            _below(axes, str(int((times >= tick).sum())), tick, row, colour)


def _below(axes: "Axes", text: str, x: float, row: int, colour: str, shift_px: float = 0) -> None:
    offset = (shift_px * POINTS_PER_PX, -(46 + 15 * row) * POINTS_PER_PX)
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "annotation_clip": False}
    axes.annotate(text, (x, 0), offset, color=colour, size=7.5, **place)


def _few_ticks(axis: "Axis") -> None:
    """A few round numbers, in few letters whatever the unit."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}".replace("-", "\N{MINUS SIGN}")))
