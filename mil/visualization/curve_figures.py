"""Figures of curves and calibration, in the style of `mil.visualization.plotting`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mil.statistics.curves import GRID, Curve
from mil.visualization.plotting import BLUE, INK, MUTED, OKABE_ITO, RULE, new_axes, new_figure, styled, wrap_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE_PX = 230
LEGEND_LINE_PX = 17
_DASHES = ("-", "--", ":")


def _square(x_label: str, y_label: str) -> "tuple[Figure, Axes]":
    figure = new_figure(SIDE_PX, SIDE_PX)
    axes = new_axes(figure, 52, 10, 8, 38, xlim=(0, 1), ylim=(0, 1.005))
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])
    return figure, axes


@styled
def roc_plot(curve: Curve) -> "Figure":
    """One ROC curve with its band; the dotted diagonal is guessing."""
    figure, axes = _square("false positive rate", "true positive rate")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
    axes.fill_between(GRID, curve.low, curve.high, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(curve.x, curve.y, color=BLUE, linewidth=1.8, solid_joinstyle="round")
    return figure


@styled
def precision_recall_plot(curve: Curve, share: float) -> "Figure":
    """One precision-recall curve with its band; the dotted line is the share of the class, which guessing gives."""
    figure, axes = _square("recall", "precision")
    axes.axhline(share, color=INK, linewidth=1, linestyle=":")
    axes.fill_between(GRID, curve.low, curve.high, color=BLUE, alpha=0.18, linewidth=0)
    axes.step(curve.x, curve.y, where="pre", color=BLUE, linewidth=1.8)
    return figure


@styled
def reliability_plot(bins: Sequence[Mapping[str, Any]]) -> "Figure":
    """How often the prediction is right against how sure it is, one dot a bin, with intervals over patients.

    Args:
        bins: ``reliability`` of `mil.statistics.calibration.evaluate_calibration`.
    """
    figure = new_figure(460, 250)
    axes = new_axes(figure, 54, 12, 8, 40, xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
    most = max((each["n"] for each in bins), default=1)
    for each in bins:
        accuracy = each["accuracy"]
        if accuracy["low"] is not None:
            axes.plot([each["confidence"]] * 2, [accuracy["low"], accuracy["high"]], color=BLUE, linewidth=2, alpha=0.5)
        size = 3.5 + 5 * float(np.sqrt(each["n"] / most))
        axes.plot(each["confidence"], accuracy["value"], "o", color=BLUE, markersize=size, clip_on=False, zorder=3)
        axes.annotate(
            str(each["n"]),
            (each["confidence"], accuracy["value"]),
            (6, -9),
            textcoords="offset points",
            color=MUTED,
            size=7,
        )
    axes.set_xlabel("mean probability of the predicted class")
    axes.set_ylabel("share that is right")
    return figure


@styled
def abstention_plot(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Share that is right of the slides that are answered, against their share of all; the surest are answered first.

    Args:
        curves: ``curve`` of `evaluate_abstention` by the name of its head; several are told apart in a
            legend below. The dotted line, drawn for one alone, is what abstaining at random keeps.
    """
    legend_px = LEGEND_LINE_PX * len(curves) if len(curves) > 1 else 0
    figure = new_figure(460, 250 + legend_px)
    axes = new_axes(figure, 54, 12, 8, 40 + legend_px, xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for at, steps in enumerate(curves.values()):
        coverage, accuracy = ([each[key] for each in steps] for key in ("coverage", "accuracy"))
        turn, colour = divmod(at, len(OKABE_ITO))
        style = {"color": OKABE_ITO[colour], "linestyle": _DASHES[turn % len(_DASHES)], "linewidth": 1.8}
        # a share between two steps is reached by the later one
        axes.step([0.0, *coverage], [accuracy[0], *accuracy], where="pre", **style)
        if len(curves) == 1:
            axes.axhline(accuracy[-1], color=INK, linewidth=1, linestyle=":")
    axes.set_xlabel("share of slides that are answered")
    axes.set_ylabel("share of these that is right")
    if legend_px:
        _legend(figure, axes, list(curves))
    return figure


def _legend(figure: "Figure", axes: "Axes", names: Sequence[str]) -> None:
    """Names of the curves, one a line, at the bottom of the figure."""
    # matplotlib leaves out a name that begins with an underscore
    labels = [f" {wrap_label(name, 60, 1)}" for name in names]
    figure.legend(axes.lines, labels, loc="lower left", frameon=False, fontsize=8, labelspacing=0.35, borderaxespad=0.2)
