"""Colours that no stain has: pen marks, and the black of ink and of scanner edges."""

from dataclasses import dataclass

import numpy as np

from extract.store.core.recipes import PenRecipe

_DARK_PART = 0.9


@dataclass(frozen=True)
class Colours:
    """What the three channels of each pixel say; all arrays have the shape of the picture.

    Attributes:
        largest: uint8, the largest channel.
        range: uint8, largest minus smallest channel.
        pen: bool, coloured ink: blue, cyan, green or red.
        black: bool, dark and colourless: black ink, or the edge of the scanned area.
    """

    largest: np.ndarray
    range: np.ndarray
    pen: np.ndarray
    black: np.ndarray


def find_colours(pixels: np.ndarray, recipe: PenRecipe) -> Colours:
    """Tell ink from stain, pixel by pixel.

    A stain is known by the channel that it absorbs most: haematoxylin and eosin green, DAB blue. Blue, cyan and green
    ink absorb red most. So a pixel is *cool* ink where red is the smallest channel, or above it by no more than
    ``cool_tilt`` of the channel range (ink over pink tissue). Where green is at least blue that is enough, beyond a
    trace of colour; but haematoxylin without eosin, as in immunostains, is bluish too, though never as strong as ink:
    blue has to reach ``blue_range`` and ``blue_saturation``, and pale blue ink goes unseen. *Red* ink absorbs green and
    blue alike, where eosin lets more blue through and DAB more green, and is stronger than both. Red chromogens (AEC,
    fast red) look like red ink: such slides need ``exclude_pen=False``. *Black* has neither light nor colour.

    Args:
        pixels: uint8 [h, w, 3].
        recipe: the thresholds.
    """
    red, green, blue = (np.ascontiguousarray(pixels[..., channel]) for channel in range(3))
    green_or_blue_high, green_or_blue_low = np.maximum(green, blue), np.minimum(green, blue)
    largest, smallest = np.maximum(red, green_or_blue_high), np.minimum(red, green_or_blue_low)
    spread = largest - smallest
    # few pixels pass the first test of each colour, in most tiles none
    pen = _at_most(red - smallest, recipe.cool_tilt, spread) & (spread >= min(recipe.green_range, recipe.blue_range))
    if pen.any():
        green_ink = (green >= blue) & (spread >= recipe.green_range)
        green_ink &= _at_least(spread, recipe.green_saturation, largest)
        blue_ink = (spread >= recipe.blue_range) & _at_least(spread, recipe.blue_saturation, largest)
        pen &= green_ink | blue_ink
    red_ink = (spread >= recipe.red_range) & (red == largest)
    if red_ink.any():
        red_ink &= _at_most(green_or_blue_high - green_or_blue_low, recipe.red_tilt, spread)
        pen |= red_ink & _at_least(spread, recipe.red_saturation, largest)
    black = (largest <= recipe.black_value) & (spread <= recipe.black_range)
    return Colours(largest, spread, pen, black)


def is_dark_field(picture: np.ndarray, recipe: PenRecipe) -> bool:
    """Whether a slide is lit from the side or glows by itself: over nine tenths of its picture are dark.

    Where there is no light glass, black is the background and colours are light, so that nothing is ink. A pixel is
    dark where the mean of its channels is at most ``black_value``; one bright channel alone reaches 85.

    Args:
        picture: uint8 [h, w, 3] of the whole slide; a tile does not tell, since borders of scans are black.
        recipe: the threshold.
    """
    dark = picture.sum(axis=2, dtype=np.uint16) <= 3 * recipe.black_value
    return bool(np.count_nonzero(dark) > _DARK_PART * dark.size)


def _at_most(part: np.ndarray, share: float, whole: np.ndarray) -> np.ndarray:
    """``part <= share * whole`` of uint8 arrays; the share counts in 256ths, since integers are three times as fast."""
    result: np.ndarray = np.left_shift(part, 8, dtype=np.uint16) <= np.multiply(
        whole, round(share * 256), dtype=np.uint16
    )
    return result


def _at_least(part: np.ndarray, share: float, whole: np.ndarray) -> np.ndarray:
    """``part >= share * whole`` of uint8 arrays, in the same way."""
    result: np.ndarray = np.left_shift(part, 8, dtype=np.uint16) >= np.multiply(
        whole, round(share * 256), dtype=np.uint16
    )
    return result
