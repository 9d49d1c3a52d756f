"""Figures of numbers and survival, in the style of `mil.plotting`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mil.plotting import BLUE, INK, MUTED, POINTS_PER_PX, RULE, VERMILLION, new_axes, new_figure, styled
from mil.survival import kaplan_meier

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
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
    figure = new_figure(SIDE_PX, SIDE_PX)
    axes = new_axes(figure, 60, 10, 8, 40, xlim=limits, ylim=limits)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.plot(limits, limits, color=INK, linewidth=1, linestyle=":")
    axes.plot(truth, predicted, "o", color=BLUE, markersize=3.5, alpha=0.6, markeredgewidth=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_few_ticks())
    axes.set_xlabel("true")
    axes.set_ylabel("predicted")
    return figure


@styled
def survival_plot(groups: Mapping[str, tuple[FloatArray, BoolArray]], time_label: str) -> "Figure":
    """Kaplan-Meier curves, with a mark where somebody was last seen; how many are at risk stands below the ticks.

    Args:
        groups: by name, at most two: times [n] and events [n].
        time_label: of the time axis.
    """
    figure = new_figure(460, 300)
    longest = max((float(times.max()) for times, _ in groups.values() if len(times)), default=1.0) or 1.0
    axes = new_axes(figure, 54, 12, 8, 88, xlim=(0, 1.02 * longest), ylim=(0, 1.03))
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(_few_ticks())
    for at, (name, (times, events)) in enumerate(groups.items()):
        colour, style = ((VERMILLION, "-"), (BLUE, "--"))[at % 2]
        curve = kaplan_meier(times, events)
        steps = np.r_[curve.times, times.max(initial=0.0)], np.r_[curve.alive, curve.alive[-1]]
        axes.step(*steps, where="post", color=colour, linestyle=style, linewidth=1.8, label=name)
        seen = times[~events]
        axes.plot(seen, curve.alive[np.searchsorted(curve.times, seen, side="right") - 1], "|", color=colour, ms=5)
        for tick in axes.get_xticks():
            if 0 <= tick <= longest:
                below = (0, -(46 + 15 * at) * POINTS_PER_PX)
                at_risk = str(int((times >= tick).sum()))
                axes.annotate(at_risk, (tick, 0), below, textcoords="offset points", ha="center", color=colour, size=7)
    axes.annotate("at risk", (0, 0), (-50 * POINTS_PER_PX, -46 * POINTS_PER_PX), textcoords="offset points",
                  color=MUTED, size=7)  # fmt: skip
    axes.set_xlabel(time_label)
    axes.xaxis.set_label_coords(0.5, -72 / 204)
    axes.set_ylabel("share without the event")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def _few_ticks() -> "MaxNLocator":
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)
