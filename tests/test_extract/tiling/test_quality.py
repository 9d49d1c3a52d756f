"""Quality flags: known defects are found, real tissue is not accused."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from extract.slides.slide import Slide
from extract.store.core.recipes import PenRecipe, QualityRecipe
from extract.tiling import quality
from extract.tiling.pen import find_colours
from extract.tiling.quality import BLURRED, EMPTY, FLAGS, PEN, flagged_rows

RECIPE = QualityRecipe()


def tile_flags(pixels: np.ndarray, recipe: QualityRecipe, mpp: float | None) -> int:
    """The flags of one tile."""
    return int(quality.tile_flags(pixels[None], recipe, mpp)[0])


def sharpness(pixels: np.ndarray, recipe: QualityRecipe, mpp: float | None) -> float:
    """The sharpness of one tile."""
    return float(quality.sharpness(pixels[None], recipe, mpp)[0])


def tissue(side: int = 224, seed: int = 0, contrast: float = 1.0) -> np.ndarray:
    """A tile of round dark nuclei on grainy pink, uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    nuclei = ndimage.gaussian_filter((rng.random((side, side)) < 0.01).astype(float), 2.5) * 40 > 0.5
    light = np.where(nuclei[..., None], (90.0, 60.0, 140.0), (225.0, 150.0, 190.0))
    light = ndimage.gaussian_filter(light, (0.6, 0.6, 0)) + rng.normal(size=(side, side, 1)) * 4
    return np.clip((light - 170) * contrast + 170, 0, 255).astype(np.uint8)


def blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    return np.clip(ndimage.gaussian_filter(pixels.astype(float), (sigma, sigma, 0)) + 0.5, 0, 255).astype(np.uint8)


def test_a_sharp_tile_has_no_flag_and_a_blurred_one_has():
    assert tile_flags(tissue(), RECIPE, 0.5) == 0
    assert tile_flags(blur(tissue(), 4), RECIPE, 0.5) == BLURRED


@pytest.mark.parametrize("contrast", [0.6, 1.0])
def test_sharpness_falls_with_blur_whatever_the_contrast(contrast: float):
    values = [sharpness(blur(tissue(contrast=contrast), sigma), RECIPE, 0.5) for sigma in (0.01, 1, 2, 4)]
    assert all(b < a / 1.5 for a, b in pairwise(values))
    assert values[0] > RECIPE.blur_threshold > values[-1]


def test_sharpness_is_the_ratio_of_its_definition():
    pixels = tissue(96)
    green = pixels[..., 1].astype(np.float64)
    lines = np.concatenate([green[16::32], green[:, 16::32].T])
    second = np.diff(lines, 2, axis=1)
    assert sharpness(pixels, RECIPE, 0.5) == pytest.approx((second**2).mean() / np.sqrt(lines.var() + 1))


def test_rows_and_columns_count_alike():
    streaks = tissue()
    streaks[:] = streaks[:, :1]  # varies downwards only
    assert sharpness(streaks, RECIPE, 0.5) == pytest.approx(sharpness(streaks.swapaxes(0, 1), RECIPE, 0.5))


def test_a_finer_scan_is_judged_over_the_same_distance():
    fine = ndimage.zoom(tissue(112), (2, 2, 1), order=1)
    green = fine[..., 1].astype(np.float64)
    lines = np.concatenate([green[16::32], green[:, 16::32].T])
    second = lines[:, 4:] - 2 * lines[:, 2:-2] + lines[:, :-4]
    assert sharpness(fine, RECIPE, 0.25) == pytest.approx((second**2).mean() / np.sqrt(lines.var() + 1))
    assert sharpness(fine, RECIPE, 0.25) > 3 * sharpness(fine, RECIPE, 0.5)
    assert sharpness(fine, RECIPE, None) == sharpness(fine, RECIPE, 0.5) == sharpness(fine, RECIPE, 2.0)


@pytest.mark.parametrize("value", [0, 128, 245, 255])
def test_grey_tiles_are_empty_and_not_blurred(value: int, rng: np.random.Generator):
    noise = np.clip(value + rng.integers(-3, 4, (224, 224, 1)).repeat(3, axis=2), 0, 255).astype(np.uint8)
    for pixels in (np.full((224, 224, 3), value, dtype=np.uint8), noise):
        assert tile_flags(pixels, RECIPE, 0.5) & (EMPTY | BLURRED) == EMPTY


def test_a_run_of_tiles_has_the_flags_of_each(rng: np.random.Generator):
    tiles = [tissue(seed=1), blur(tissue(seed=2), 4), np.full((224, 224, 3), 250, np.uint8), tissue(seed=3)]
    tiles[3][:45] = (40, 60, 170)
    run = np.stack(tiles)
    assert quality.tile_flags(run, RECIPE, 0.5).tolist() == [0, BLURRED, EMPTY, PEN]
    assert quality.sharpness(run, RECIPE, 0.5).tolist() == [sharpness(tile, RECIPE, 0.5) for tile in tiles]


def test_a_constant_colour_is_empty():
    assert tile_flags(np.full((64, 64, 3), (225, 130, 175), dtype=np.uint8), RECIPE, 0.5) == EMPTY


def test_a_corner_of_tissue_is_not_empty_but_a_speck_is():
    pixels = np.full((224, 224, 3), 245, dtype=np.uint8)
    pixels[:32, :32] = tissue(32)
    assert tile_flags(pixels, RECIPE, 0.5) & EMPTY
    pixels[:80, :80] = tissue(80)
    assert not tile_flags(pixels, RECIPE, 0.5) & EMPTY


@pytest.mark.parametrize("ink", [(40, 60, 170), (40, 130, 80), (210, 30, 45), (25, 25, 28)])
def test_ink_over_a_fifth_of_the_tile_is_flagged(ink: tuple[int, int, int]):
    pixels = tissue()
    pixels[:45] = ink
    assert tile_flags(pixels, RECIPE, 0.5) & PEN
    pixels = tissue()
    pixels[:12] = ink
    assert not tile_flags(pixels, RECIPE, 0.5) & PEN


@pytest.mark.parametrize("side", [1, 2, 5, 9, 17, 31, 64])
def test_tiles_of_any_size_have_flags(side: int):
    assert tile_flags(tissue(side), RECIPE, 0.5) in range(8)
    assert tile_flags(tissue(side), RECIPE, 0.02) in range(8)


def test_thresholds_come_from_the_recipe():
    pixels = tissue()
    assert tile_flags(pixels, replace(RECIPE, blur_threshold=1e6), 0.5) == BLURRED
    assert tile_flags(pixels, replace(RECIPE, empty_range=254), 0.5) == EMPTY
    assert tile_flags(pixels, replace(RECIPE, pen=PenRecipe(black_value=255, black_range=255)), 0.5) == PEN
    assert tile_flags(pixels, replace(RECIPE, pen_fraction=0.0), 0.5) == PEN


def test_flagged_rows_name_each_flag_and_its_rows():
    flags = np.array([0, BLURRED, EMPTY | PEN, PEN, 0, BLURRED | PEN], dtype=np.uint8)
    assert flagged_rows(flags) == {"blurred": [1, 5], "empty": [2], "pen": [2, 3, 5]}
    assert flagged_rows(np.zeros(3, dtype=np.uint8)) == {name: [] for name in FLAGS}
    assert all(type(row) is int for row in flagged_rows(flags)["pen"])


def test_colours_are_those_of_their_definition(rng: np.random.Generator):
    pixels = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    recipe = PenRecipe()
    colours = find_colours(pixels, recipe)
    red, green, blue = pixels.reshape(-1, 3).astype(float).T
    largest, smallest = pixels.max(axis=2).ravel() * 1.0, pixels.min(axis=2).ravel() * 1.0
    spread = largest - smallest
    saturation = spread / np.maximum(largest, 1)
    in_256ths = {name: round(share * 256) / 256 for name, share in vars(recipe).items() if isinstance(share, float)}
    green_ink = (green >= blue) & (spread >= recipe.green_range) & (saturation >= in_256ths["green_saturation"])
    blue_ink = (spread >= recipe.blue_range) & (saturation >= in_256ths["blue_saturation"])
    cool = (red - smallest <= in_256ths["cool_tilt"] * spread) & (green_ink | blue_ink)
    cool &= spread >= min(recipe.green_range, recipe.blue_range)
    hot = (red == largest) & (np.abs(green - blue) <= in_256ths["red_tilt"] * spread)
    hot &= (spread >= recipe.red_range) & (saturation >= in_256ths["red_saturation"])
    assert 0.05 < colours.pen.mean() < 0.95
    assert np.array_equal(colours.pen.ravel(), cool | hot)
    assert np.array_equal(colours.black.ravel(), (largest <= 80) & (spread <= 16))
    assert np.array_equal(colours.range.ravel(), spread)


# ---------------------------------------------------------------- real tiles


def test_blur_of_real_tissue_is_told_from_sharp_tissue(data_folder: Path):
    sharp, blurred = [], []
    for file in sorted((data_folder / "glas").glob("*.tif"))[::9]:
        with Slide(file) as slide:
            pixels = slide.read_region(0, 0, 0, slide.size_l0)
        soft = blur(pixels, 3)
        for y, x in ((0, 0), (100, 300), (200, 150)):
            square = (slice(y, y + 224), slice(x, x + 224))
            if not tile_flags(pixels[square], RECIPE, 0.62) & EMPTY:
                sharp.append(tile_flags(pixels[square], RECIPE, 0.62))
                blurred.append(tile_flags(soft[square], RECIPE, 0.62))
    assert len(sharp) > 30
    assert set(sharp) == {0}
    assert set(blurred) == {BLURRED}
