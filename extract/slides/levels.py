"""Which levels of a slide show the same as level 0: sizes that fit, and pixels where sizes leave a doubt."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from extract.errors import ExtractError
from extract.geometry import resample_area

Size = tuple[int, int]
ReadRegion = Callable[[int, int, int, Size], np.ndarray]
"""(x_l0, y_l0, level, size) → uint8 [h, w, 3]."""

_PLACES = ((0.72, 0.72), (0.45, 0.6), (0.6, 0.35), (0.85, 0.5), (0.5, 0.85))
_REGION_PX = 128
_MAX_READ_PX = 2048
_LEAST_CONTRAST = 4.0
_LEAST_CORRELATION = 0.7


def trusted_levels(
    sizes: Sequence[Size], downsamples: Sequence[float], read: ReadRegion
) -> tuple[tuple[int, ...], str]:
    """The levels that can be read in place of level 0, and why others cannot.

    A level whose width and height are not level 0's divided by one number, give or take a pixel, is padded or shows
    something else. Where that number is no whole one, padding may hide in it: then a few places are compared with the
    level above, once.

    Args:
        sizes: width and height of every level.
        downsamples: level-0 pixels per pixel of each level, as the reader of the slide uses them.
        read: reads a region.

    Returns:
        indices of the levels, 0 first, and a note on those left out; the note is empty where there is none.
    """
    kept, notes = [0], []
    for level in range(1, len(sizes)):
        low, high = _possible_downsamples(sizes[0], sizes[level])
        if low > high or not _is_between(downsamples[level], sizes[0], sizes[level]):
            ratios = " and ".join(f"{a / b:.4g}" for a, b in zip(sizes[0], sizes[level], strict=True))
            notes.append(f"level {level} of {sizes[level][0]} x {sizes[level][1]} px is {ratios} times smaller")
        elif (
            not _is_whole(low, high)
            and read is not None
            and not _shows_the_same(level, kept[-1], downsamples, sizes, read)
        ):
            notes.append(f"level {level} shows other places than level 0")
        else:
            kept.append(level)
    note = f"{'; '.join(notes)}: not used, level 0 is read and resampled" if notes else ""
    return tuple(kept), note


def _possible_downsamples(full: Size, small: Size) -> tuple[float, float]:
    """The least and the largest number by which both sides can have been divided, whatever way they were rounded."""
    low = max(a / (b + 1.01) for a, b in zip(full, small, strict=True))
    high = min(a / max(b - 1.01, 0.5) for a, b in zip(full, small, strict=True))
    return low, high


def _is_between(downsample: float, full: Size, small: Size) -> bool:
    """Whether a downsample is one of either side, or their mean, as readers take it of levels that were rounded."""
    least = min(a / (b + 1.01) for a, b in zip(full, small, strict=True))
    most = max(a / max(b - 1.01, 0.5) for a, b in zip(full, small, strict=True))
    return least <= downsample <= most


def _is_whole(low: float, high: float) -> bool:
    return math.floor(high) >= low


def _shows_the_same(
    level: int, above: int, downsamples: Sequence[float], sizes: Sequence[Size], read: ReadRegion
) -> bool:
    """Whether a level agrees with a finer one at the places where both show something."""
    factor = downsamples[level] / downsamples[above]
    side = min(_REGION_PX, *sizes[level], int(_MAX_READ_PX / factor))
    if side < 8:
        return True
    seen = []
    for across, down in _PLACES:
        corner = [round(max(n * part - side / 2, 0)) for n, part in zip(sizes[level], (across, down), strict=True)]
        corner = [min(at, n - side) for at, n in zip(corner, sizes[level], strict=True)]
        x_l0, y_l0 = (round(at * downsamples[level]) for at in corner)
        wide = int(np.ceil(side * factor - 1e-6))
        try:
            small = read(x_l0, y_l0, level, (side, side))
            large = resample_area(read(x_l0, y_l0, above, (wide, wide)), side * factor, side)
        except ExtractError:
            continue
        correlation = _correlation(small, large)
        if correlation is not None:
            seen.append(correlation)
    return not seen or float(np.median(seen)) >= _LEAST_CORRELATION


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Correlation of two pictures uint8 [n, n, 3]; None where one of them is flat."""
    a, b = (each.astype(np.float64).mean(axis=2).ravel() for each in (one, other))
    a, b = a - a.mean(), b - b.mean()
    if min(a.std(), b.std()) < _LEAST_CONTRAST:
        return None
    return float((a * b).mean() / (a.std() * b.std()))
