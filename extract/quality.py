"""Quality flags of a tile, computed from its pixels while it is read: blurred, empty, pen."""

import math

import numpy as np

from extract.pen import find_colours
from extract.store.fingerprint import QualityRecipe

BLURRED, EMPTY, PEN = 1, 2, 4
"""The bits of `tile_flags`."""

FLAGS = {"blurred": BLURRED, "empty": EMPTY, "pen": PEN}
"""Name of each bit, as it stands in records and reports."""


def tile_flags(pixels: np.ndarray, recipe: QualityRecipe, mpp: float | None) -> int:
    """What is wrong with a tile; 0 when nothing is.

    *Empty*: hardly a pixel is stained, or all have one colour. *Pen*: a part of the pixels has the colour of ink, or is
    black (ink, or the edge of the scanned area). *Blurred*: see `sharpness`; an empty tile has nothing to be blurred.
    Only every ``sampling_px``-th row and column is looked at, which costs about 50 µs for a tile of 224 px.

    Args:
        pixels: uint8 [s, s, 3].
        recipe: the thresholds.
        mpp: µm/px of the tile, or None when unknown.

    Returns:
        The sum of `BLURRED`, `EMPTY` and `PEN` that hold.
    """
    step = recipe.sampling_px
    sample = pixels[step // 2 :: step, step // 2 :: step]
    if sample.size == 0:
        sample = pixels
    colours = find_colours(sample, recipe.pen)
    n_pixels = colours.range.size
    flags = 0
    stained = np.count_nonzero(colours.range > recipe.empty_range)
    if stained < recipe.empty_fraction * n_pixels or _is_constant(sample):
        flags |= EMPTY
    elif sharpness(pixels, recipe, mpp) < recipe.blur_threshold:
        flags |= BLURRED
    if np.count_nonzero(colours.pen | colours.black) >= recipe.pen_fraction * n_pixels:
        flags |= PEN
    return flags


def _is_constant(pixels: np.ndarray) -> bool:
    # two corners differ in nearly every picture, and tell so ten times as fast
    return bool((pixels[0, 0] == pixels[-1, -1]).all()) and bool((pixels == pixels[0, 0]).all())


def sharpness(pixels: np.ndarray, recipe: QualityRecipe, mpp: float | None) -> float:
    """Energy of the second difference of green, divided by green's standard deviation, in grey levels.

    The Laplacian's energy falls fast with blur, but also with contrast: dividing by the standard deviation makes pale
    and dark tissue comparable. Second differences are taken along sampled rows and columns only, over neighbours that
    are ``blur_mpp`` apart, so that a finer scan does not look blurred. All sums are of whole numbers below 2^53, hence
    exact, and equal on every machine.

    Args:
        pixels: uint8 [s, s, 3].
        recipe: sampling and scale.
        mpp: µm/px of the tile, or None when unknown.

    Returns:
        Above 1 for most sharp tiles of 0.5 µm/px, below 0.2 once blurred with sigma 3; infinite where the tile is too
        small to tell.

    References:
        J. L. Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy: a comparative study", ICPR 2000
        (variance of the Laplacian). Deviations: one-dimensional differences on sampled lines; divided by the standard
        deviation.
    """
    reach = max(1, round(recipe.blur_mpp / mpp)) if mpp else 1
    step = recipe.sampling_px
    green = pixels[..., 1]
    rows, columns = green[2 * step :: 4 * step], green[:, 2 * step :: 4 * step].T
    if len(rows) == 0 or rows.shape[1] <= 2 * reach:
        return math.inf
    lines = np.concatenate([rows, columns]).astype(np.float64)
    curvature = lines[:, : -2 * reach] + lines[:, 2 * reach :]
    curvature -= 2.0 * lines[:, reach:-reach]
    mean = float(lines.sum()) / lines.size
    # one grey level of noise stands in for the contrast that a constant tile has not
    return _mean_square(curvature) / math.sqrt(_mean_square(lines) - mean * mean + 1.0)


def _mean_square(values: np.ndarray) -> float:
    flat = values.ravel()
    return float(flat @ flat) / flat.size


def flagged_rows(flags: np.ndarray) -> dict[str, list[int]]:
    """The rows that carry each flag.

    Args:
        flags: uint8 [n], one `tile_flags` a row.

    Returns:
        For each name of `FLAGS`, the rows in ascending order.
    """
    return {name: np.flatnonzero(flags & bit).tolist() for name, bit in FLAGS.items()}
