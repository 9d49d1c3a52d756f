"""Tissue on a thumbnail: channel range, Otsu's threshold, morphology."""

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

from extract.store import TissueRecipe


def tissue_mask(thumbnail: np.ndarray, recipe: TissueRecipe, tile_area_px: float) -> tuple[np.ndarray, float]:
    """Tell stained tissue from glass.

    Stain gives a pixel colour, glass and black borders have none: the range of its channels (largest minus smallest) is
    thresholded with Otsu's method on its 256-bin histogram, the threshold being kept within the recipe's limits so that
    a field without background is not split into pale and dark tissue. Closing and opening with a disk, then small
    holes and small objects are removed.

    Args:
        thumbnail: uint8 [h, w, 3].
        recipe: method and limits; ``none`` calls everything tissue.
        tile_area_px: area of one tile in thumbnail pixels; the unit of small holes and objects.

    Returns:
        bool [h, w], and the threshold that was used (0 to 255).

    References:
        N. Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. SMC 9 (1979).
    """
    if recipe.method == "none":
        return np.ones(thumbnail.shape[:2], dtype=bool), 0.0
    channel_range = thumbnail.max(axis=2) - thumbnail.min(axis=2)
    threshold = float(np.clip(_otsu(channel_range), recipe.threshold_low, recipe.threshold_high))
    mask = channel_range > threshold
    radius = recipe.closing_px
    # a tissue that runs out of the picture goes on there: pad by repeating the edge, or morphology would erode it
    padded = np.pad(mask, 2 * radius + 1, mode="edge")
    disk = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius + 0.3
    padded = ndimage.binary_opening(ndimage.binary_closing(padded, disk), disk)
    mask = padded[2 * radius + 1 : -2 * radius - 1, 2 * radius + 1 : -2 * radius - 1]
    mask = remove_small_holes(mask, max_size=round(recipe.min_hole_tiles * tile_area_px))
    mask = remove_small_objects(mask, max_size=round(recipe.min_object_tiles * tile_area_px))
    return mask, threshold


def _otsu(values: np.ndarray) -> float:
    counts = np.bincount(values.ravel(), minlength=256)
    if np.count_nonzero(counts) < 2:
        return float(values.flat[0])
    return float(threshold_otsu(hist=(counts, np.arange(256))))


def tissue_fraction(mask: np.ndarray, corners_px: np.ndarray, size_px: tuple[float, float]) -> np.ndarray:
    """Exact part of each rectangle's area that is tissue, fractions of mask pixels included.

    Args:
        mask: bool [h, w].
        corners_px: float [n, 2], top-left (x, y) of each rectangle in mask pixels.
        size_px: width and height of the rectangles in mask pixels.

    Returns:
        float32 [n], 0 to 1.
    """
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    integral[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1)
    left, top = np.asarray(corners_px, dtype=float).T
    right, bottom = left + size_px[0], top + size_px[1]
    area = (
        _interpolate(integral, right, bottom)
        - _interpolate(integral, left, bottom)
        - _interpolate(integral, right, top)
        + _interpolate(integral, left, top)
    )
    return np.asarray(np.clip(area / (size_px[0] * size_px[1]), 0.0, 1.0), dtype=np.float32)


def _interpolate(integral: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear value of an integral image; exact, since the mask is constant within a pixel."""
    x, y = np.clip(x, 0, integral.shape[1] - 1), np.clip(y, 0, integral.shape[0] - 1)
    column = np.minimum(x.astype(np.int64), integral.shape[1] - 2)
    row = np.minimum(y.astype(np.int64), integral.shape[0] - 2)
    dx, dy = x - column, y - row
    upper = integral[row, column] * (1 - dx) + integral[row, column + 1] * dx
    lower = integral[row + 1, column] * (1 - dx) + integral[row + 1, column + 1] * dx
    result: np.ndarray = upper * (1 - dy) + lower * dy
    return result
