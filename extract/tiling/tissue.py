"""Tissue on a thumbnail: channel range or saturation, Otsu's threshold, pen marks left out, morphology."""

import numpy as np

from extract.errors import MaskError
from extract.store import TissueRecipe
from extract.tiling.pen import Colours, find_colours

_GLASS_DARKEST = 180
"""A pixel with a darker channel is not taken for glass, however it is tinted."""
_GLASS_WIDTH = 6
"""Grey levels, in each channel, by which glass differs from its most frequent colour."""
_GLASS_TINT = 40
"""Largest channel range that is a tint of glass."""
_GLASS_SHARE, _GLASS_WHOLE = 0.1, 0.5
"""Least part of a picture that is glass, and least part of the glass whose neighbours all are."""


def tissue_mask(
    thumbnail: np.ndarray, recipe: TissueRecipe, tile_area_px: float, given: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Tell stained tissue from glass, pen marks and black borders.

    Stain gives a pixel colour, glass and black borders have none: the range of its channels (largest minus smallest;
    with ``saturation``, divided by the largest) is thresholded with Otsu's method on its 256-bin histogram, the
    threshold being kept within the recipe's limits so that a field without background is not split into pale and dark
    tissue. Closing and opening with a disk, then small holes and small objects are removed. Pen marks are left out of
    the histogram and of the mask; see `extract.tiling.pen.find_colours` for the rule. Where the glass itself has a
    colour (a channel range above the recipe's lower limit), every pixel is first divided by it.

    Args:
        thumbnail: uint8 [h, w, 3].
        recipe: method and limits; ``none`` calls everything tissue.
        tile_area_px: area of one tile in thumbnail pixels; the unit of small holes and objects.
        given: bool [h, w], the mask that came with the slide; it is the answer, whatever the method.

    Returns:
        bool [h, w], and the threshold that was used (0 to 255; 0 where none was).

    Raises:
        MaskError: the method is ``mask`` and none was given.

    References:
        N. Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. SMC 9 (1979).
    """
    if given is not None:
        return np.array(given, dtype=bool), 0.0
    if recipe.method == "none":
        return np.ones(thumbnail.shape[:2], dtype=bool), 0.0
    if recipe.method == "mask":
        raise MaskError(
            "got no mask → tissue method 'mask' needs one for every slide → name it in the mask column of --slides "
            "TABLE, or use --tissue default"
        )
    colours = find_colours(_on_white_glass(thumbnail, recipe), recipe.pen)
    pen = _pen_marks(colours, recipe, tile_area_px)
    stain = _stain(colours, recipe)
    glass_and_tissue = stain if pen is None else stain[~pen]
    threshold = float(np.clip(_otsu(glass_and_tissue), recipe.threshold_low, recipe.threshold_high))
    return _clean(stain > threshold, pen, recipe, tile_area_px), threshold


def _on_white_glass(thumbnail: np.ndarray, recipe: TissueRecipe) -> np.ndarray:
    """The thumbnail as it would be on glass without a tint; the same array where the glass has none, or none is seen.

    Glass is what is bright, of one colour and in one piece: the most frequent bright colour, if enough of the picture
    has it and most of these pixels have only such neighbours. Pale tissue is neither.
    """
    bright = thumbnail.min(axis=2) >= _GLASS_DARKEST
    if not bright.any():
        return thumbnail
    packed = (thumbnail[bright].astype(np.int64) // 4) @ np.array([4096, 64, 1])
    colour = 4 * np.array(np.unravel_index(np.bincount(packed).argmax(), (64, 64, 64))) + 2
    distance = np.abs(thumbnail.astype(np.int16) - colour.astype(np.int16))
    like: np.ndarray = np.max(distance, axis=2) <= _GLASS_WIDTH
    if like.mean() < _GLASS_SHARE or _erode(like, 1).sum() < _GLASS_WHOLE * like.sum():
        return thumbnail
    glass = np.median(thumbnail[like], axis=0)
    # pale pink is what eosin leaves of tissue: of that colour glass is believed to be a little only
    most = recipe.threshold_high if glass.argmin() == 1 else _GLASS_TINT
    if not recipe.threshold_low < np.ptp(glass) <= most:
        return thumbnail
    white: np.ndarray = np.minimum(np.rint(thumbnail * (glass.max() / glass)), 255).astype(np.uint8)
    return white


def _stain(colours: Colours, recipe: TissueRecipe) -> np.ndarray:
    """How stained each pixel is, uint8 [h, w]: channel range, or HSV saturation times 255."""
    stain = colours.range
    if recipe.method == "saturation":
        # black noise has any saturation; at least 1 keeps 0 / 0 away
        stain = (stain.astype(np.uint16) * 255 // np.maximum(colours.largest, 1)).astype(np.uint8)
    return np.where(colours.black, np.uint8(0), stain) if recipe.exclude_pen else stain


def _pen_marks(colours: Colours, recipe: TissueRecipe, tile_area_px: float) -> np.ndarray | None:
    """Pen marks with their margin, bool [h, w]; None where there are none.

    Strokes are wide and long: what is thinner than three pixels, or smaller than the smallest object, is left alone,
    since single nuclei and blood cells may have the colour of ink.
    """
    from skimage.morphology import remove_small_objects

    smallest = round(recipe.min_object_tiles * tile_area_px)
    if not recipe.exclude_pen or np.count_nonzero(colours.pen) <= smallest:
        return None
    strokes = remove_small_objects(_dilate(_erode(colours.pen, 1), 1), max_size=smallest)
    return _dilate(strokes, recipe.pen_margin_px) if strokes.any() else None


def _clean(mask: np.ndarray, pen: np.ndarray | None, recipe: TissueRecipe, tile_area_px: float) -> np.ndarray:
    """Close and open with a disk, fill small holes, take pen marks out, drop small objects."""
    from skimage.morphology import remove_small_holes, remove_small_objects

    if pen is not None:
        mask &= ~pen
    border = 2 * recipe.closing_px + 1
    # a tissue that runs out of the picture goes on there: pad by repeating the edge, or morphology would erode it
    padded = np.pad(mask, border, mode="edge")
    closed = _erode(_dilate(padded, recipe.closing_px), recipe.closing_px)
    opened = _dilate(_erode(closed, recipe.closing_px), recipe.closing_px)
    mask = opened[border:-border, border:-border]
    mask = remove_small_holes(mask, max_size=round(recipe.min_hole_tiles * tile_area_px))
    if pen is not None:
        mask = mask & ~pen
    return np.asarray(remove_small_objects(mask, max_size=round(recipe.min_object_tiles * tile_area_px)))


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Dilate with a disk row by row of the disk; equal to SciPy's ``binary_dilation`` and ten times as fast."""
    result, height = mask.copy(), len(mask)
    for dy in range(min(radius + 1, height)):
        # 0.3 more than the radius makes small disks round: 5 x 5 without its corners for a radius of 2
        half_width = int(np.sqrt((radius + 0.3) ** 2 - dy**2))
        wide = mask.copy()
        for dx in range(1, half_width + 1):
            wide[:, dx:] |= mask[:, :-dx]
            wide[:, :-dx] |= mask[:, dx:]
        result[dy:] |= wide[: height - dy]
        result[: height - dy] |= wide[dy:]
    return result


def _erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """Erode with the same disk; what lies outside the picture is background, as in SciPy's ``binary_erosion``."""
    result = ~_dilate(~mask, radius)
    if radius:
        result[:radius] = result[-radius:] = False
        result[:, :radius] = result[:, -radius:] = False
    return result


def _otsu(values: np.ndarray) -> float:
    from skimage.filters import threshold_otsu

    counts = np.bincount(values.ravel(), minlength=256)
    if np.count_nonzero(counts) < 2:
        # one value, or none where ink covers everything
        return float(counts.argmax())
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
