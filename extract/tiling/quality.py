"""Quality flags of tiles, computed from their pixels while they are read: blurred, empty, pen."""

import math

import numpy as np

from extract.store.core.recipes import QualityRecipe
from extract.tiling.pen import find_colours

BLURRED, EMPTY, PEN = 1, 2, 4
"""The bits of `tile_flags`."""

FLAGS = {"blurred": BLURRED, "empty": EMPTY, "pen": PEN}
"""Name of each bit, as it stands in records and reports."""


def tile_flags(pixels: np.ndarray, recipe: QualityRecipe, mpp: float | None) -> np.ndarray:
    """What is wrong with tiles; 0 where nothing is.

    *Empty*: hardly a pixel is stained, or all have one colour. *Pen*: a part of the pixels has the colour of ink, or is
    black (ink, or the edge of the scanned area). *Blurred*: see `sharpness`; an empty tile has nothing to be blurred.
    Only every ``sampling_px``-th row and column is looked at. A run of tiles costs a third of single ones.

    Args:
        pixels: uint8 [n, s, s, 3].
        recipe: the thresholds.
        mpp: µm/px of the tiles, or None when unknown.

    Returns:
        uint8 [n], sums of the bits `BLURRED`, `EMPTY` and `PEN` that hold.
    """
    step = recipe.sampling_px
    sample = pixels[:, step // 2 :: step, step // 2 :: step]
    if sample.size == 0:
        sample = pixels
    colours = find_colours(sample, recipe.pen)
    n_pixels = colours.range[0].size
    stained = np.count_nonzero(colours.range > recipe.empty_range, axis=(1, 2))
    empty = (stained < recipe.empty_fraction * n_pixels) | _are_constant(sample)
    inked = np.count_nonzero(colours.pen | colours.black, axis=(1, 2))
    blurred = ~empty & (sharpness(pixels, recipe, mpp) < recipe.blur_threshold)
    flags = BLURRED * blurred + EMPTY * empty + PEN * (inked >= recipe.pen_fraction * n_pixels)
    return np.asarray(flags, dtype=np.uint8)


def _are_constant(pixels: np.ndarray) -> np.ndarray:
    """bool [n]: which tiles have one colour only."""
    # two corners differ in nearly every picture, and tell so ten times as fast
    constant = np.asarray((pixels[:, 0, 0] == pixels[:, -1, -1]).all(axis=1))
    for i in np.flatnonzero(constant):
        constant[i] = (pixels[i] == pixels[i, 0, 0]).all()
    return constant


def sharpness(pixels: np.ndarray, recipe: QualityRecipe, mpp: float | None) -> np.ndarray:
    """Energy of the second difference of green, divided by green's standard deviation, in grey levels.

    The Laplacian's energy falls fast with blur, but also with contrast: dividing by the standard deviation makes pale
    and dark tissue comparable. Second differences are taken along sampled rows and columns only, over neighbours that
    are ``blur_mpp`` apart, so that a finer scan does not look blurred. All sums are of whole numbers below 2^53, hence
    exact, and equal on every machine.

    Args:
        pixels: uint8 [n, s, s, 3].
        recipe: sampling and scale.
        mpp: µm/px of the tiles, or None when unknown.

    Returns:
        float64 [n]: above 1 for most sharp tiles of 0.5 µm/px, below 0.2 once blurred with sigma 3; infinite where
        tiles are too small to tell.

    References:
        J. L. Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy: a comparative study", ICPR 2000
        (variance of the Laplacian). Deviations: one-dimensional differences on sampled lines; divided by the standard
        deviation.
    """
    reach = max(1, round(recipe.blur_mpp / mpp)) if mpp else 1
    first, step = 2 * recipe.sampling_px, 4 * recipe.sampling_px
    rows, columns = pixels[:, first::step, :, 1], pixels[:, :, first::step, 1].swapaxes(1, 2)
    if rows.shape[1] == 0 or rows.shape[2] <= 2 * reach:
        return np.full(len(pixels), math.inf)
    lines = np.concatenate([rows, columns], axis=1, dtype=np.float32)
    curvature = lines[..., : -2 * reach] + lines[..., 2 * reach :]
    curvature -= 2.0 * lines[..., reach:-reach]
    mean = lines.sum(axis=(1, 2), dtype=np.float64) / lines[0].size
    # one grey level of noise stands in for the contrast that a constant tile has not
    result: np.ndarray = _mean_square(curvature) / np.sqrt(_mean_square(lines) - mean * mean + 1.0)
    return result


def _mean_square(values: np.ndarray) -> np.ndarray:
    """float64 [n] of float32 [n, a, b]; the squares are whole numbers below 2^24, so nothing is rounded."""
    flat = values.reshape(len(values), -1)
    return np.asarray(np.square(flat).sum(axis=1, dtype=np.float64) / flat.shape[1])


def flagged_rows(flags: np.ndarray) -> dict[str, list[int]]:
    """The rows that carry each flag.

    Args:
        flags: uint8 [n], one `tile_flags` a row.

    Returns:
        For each name of `FLAGS`, the rows in ascending order.
    """
    return {name: np.flatnonzero(flags & bit).tolist() for name, bit in FLAGS.items()}
