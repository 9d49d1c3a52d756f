"""Figures of curves and calibration, in the style of `mil.plotting`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mil.curves import GRID, Curve
from mil.plotting import BLUE, INK, MUTED, RULE, new_axes, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE_PX = 230


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
        bins: ``reliability`` of `mil.calibration.evaluate_calibration`.
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
