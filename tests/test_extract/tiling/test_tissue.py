"""Tissue: exact fractions, and pictures whose answer is known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from extract.errors import MaskError
from extract.slides.slide import Slide
from extract.store import TissueRecipe
from extract.tiling import tissue
from extract.tiling.pen import find_colours
from extract.tiling.tissue import _dilate, _erode, tissue_fraction, tissue_mask
from tests.test_extract.small import tissue_image

RECIPE = TissueRecipe()
TILE_AREA = 16.0**2


def brute_fraction(mask: np.ndarray, x: float, y: float, width: float, height: float) -> float:
    """Tissue area under one rectangle, pixel by pixel in float64."""
    area = 0.0
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            w = min(x + width, column + 1) - max(x, column)
            h = min(y + height, row + 1) - max(y, row)
            area += max(w, 0.0) * max(h, 0.0) * bool(mask[row, column])
    return area / (width * height)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    corner=st.tuples(st.floats(-1, 11), st.floats(-1, 11)),
    size=st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_fractions_are_exact(shape: tuple, corner: tuple, size: tuple, density: float, seed: int):
    mask = np.random.default_rng(seed).random(shape) < density
    got = tissue_fraction(mask, np.array([corner, corner]), size)
    assert got.dtype == np.float32
    assert got == pytest.approx(brute_fraction(mask, *corner, *size), abs=1e-5)


def test_everything_is_exactly_one_under_a_full_mask():
    mask = np.ones((123, 77), dtype=bool)
    corners = np.random.default_rng(0).uniform(0, 60, (500, 2))
    assert (tissue_fraction(mask, corners, (16.37, 16.41)) == 1.0).all()


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (3, 200)])
def test_black_grey_and_white_are_no_tissue(value: int, shape: tuple[int, int]):
    mask, threshold = tissue_mask(np.full((*shape, 3), value, dtype=np.uint8), RECIPE, TILE_AREA)
    assert not mask.any()
    assert RECIPE.threshold_low <= threshold <= RECIPE.threshold_high


def test_noisy_glass_and_black_borders_are_no_tissue(rng: np.random.Generator):
    glass = rng.integers(238, 247, (120, 160, 3), dtype=np.uint8)
    glass[:, :20] = 0
    assert not tissue_mask(glass, RECIPE, TILE_AREA)[0].any()


@pytest.mark.parametrize("colour", [(200, 120, 170), (235, 200, 225), (120, 60, 140)])
def test_a_field_without_background_is_all_tissue(rng: np.random.Generator, colour: tuple[int, int, int]):
    field = np.clip(np.array(colour) + rng.integers(-8, 9, (100, 150, 1)), 0, 255).astype(np.uint8)
    mask, _ = tissue_mask(field, RECIPE, TILE_AREA)
    assert mask.all()


def test_a_field_of_pale_and_dark_tissue_is_not_split():
    field = np.full((100, 150, 3), (230, 195, 220), dtype=np.uint8)
    field[:, 75:] = (120, 50, 140)
    assert tissue_mask(field, RECIPE, TILE_AREA)[0].all()


def test_tissue_at_the_border_is_not_eroded():
    picture = np.full((96, 128, 3), 245, dtype=np.uint8)
    picture[:, 64:] = (200, 120, 170)
    mask, _ = tissue_mask(picture, RECIPE, TILE_AREA)
    assert mask[:, 66:].all()
    assert not mask[:, :62].any()
    # a rim too thin for the disk goes on beyond the picture
    picture[:, :125] = 245
    assert tissue_mask(picture, RECIPE, TILE_AREA)[0][:, 125:].all()


def test_tissue_on_glass_is_found_to_within_a_few_pixels():
    mask, _ = tissue_mask(tissue_image(200, 160, margin=40), RECIPE, TILE_AREA)
    truth = np.zeros((160, 200), dtype=bool)
    truth[40:120, 40:160] = True
    assert (mask & truth).sum() / (mask | truth).sum() > 0.97


def test_specks_go_and_small_holes_fill_by_their_area_in_tiles():
    picture = np.full((200, 300, 3), 245, dtype=np.uint8)
    picture[20:180, 20:180] = (200, 120, 170)
    picture[95:102, 95:102] = 245  # 49 px, less than a quarter of a 256 px tile: filled
    picture[120:150, 120:150] = 245  # 900 px: a real hole
    picture[50:57, 220:227] = (200, 120, 170)  # a speck
    picture[100:130, 220:250] = (200, 120, 170)  # a piece
    mask, _ = tissue_mask(picture, RECIPE, TILE_AREA)
    assert mask[95:102, 95:102].all()
    assert not mask[125:145, 125:145].any()
    assert not mask[40:70, 210:240].any()
    assert mask[105:125, 225:245].all()


def test_method_none_calls_everything_tissue():
    mask, threshold = tissue_mask(np.full((5, 7, 3), 255, dtype=np.uint8), TissueRecipe(method="none"), TILE_AREA)
    assert mask.all()
    assert mask.shape == (5, 7)
    assert threshold == 0.0


# ---------------------------------------------------------------- saturation, given masks


def test_saturation_finds_the_tissue_that_the_default_finds():
    picture = tissue_image(200, 160, margin=40)
    mask, threshold = tissue_mask(picture, TissueRecipe(method="saturation"), TILE_AREA)
    default, _ = tissue_mask(picture, RECIPE, TILE_AREA)
    assert RECIPE.threshold_low <= threshold <= RECIPE.threshold_high
    assert (mask & default).sum() / (mask | default).sum() > 0.97


def test_saturation_takes_dark_grey_tissue_for_more_stained_than_the_channel_range_does():
    picture = np.full((96, 128, 3), 245, dtype=np.uint8)
    picture[:, 64:] = (100, 90, 98)  # range 10, saturation 0.1
    assert not tissue_mask(picture, RECIPE, TILE_AREA)[0].any()
    assert tissue_mask(picture, TissueRecipe(method="saturation"), TILE_AREA)[0][:, 66:].all()


@pytest.mark.parametrize("method", ["default", "saturation"])
def test_black_borders_with_noise_are_no_tissue(rng: np.random.Generator, method: str):
    picture = np.full((120, 160, 3), 245, dtype=np.uint8)
    picture[:, :40] = rng.integers(0, 16, (120, 40, 3))
    picture[40:80, 80:120] = (200, 120, 170)
    mask, _ = tissue_mask(picture, TissueRecipe(method=method), TILE_AREA)
    assert not mask[:, :60].any()
    assert mask[45:75, 85:115].all()


@pytest.mark.parametrize("method", ["default", "none", "mask"])
def test_a_given_mask_is_the_answer_whatever_the_method(rng: np.random.Generator, method: str):
    given_mask = rng.random((20, 30)) < 0.5
    mask, threshold = tissue_mask(np.zeros((20, 30, 3), np.uint8), TissueRecipe(method=method), TILE_AREA, given_mask)
    assert np.array_equal(mask, given_mask)
    assert mask is not given_mask
    assert threshold == 0.0


def test_method_mask_needs_a_mask():
    with pytest.raises(MaskError, match=r"got no mask → .* mask column"):
        tissue_mask(np.zeros((20, 30, 3), np.uint8), TissueRecipe(method="mask"), TILE_AREA)


# ---------------------------------------------------------------- morphology


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    radius=st.integers(0, 4),
    density=st.sampled_from([0.02, 0.5, 0.98]),
    seed=st.integers(0, 99),
)
def test_morphology_is_that_of_scipy(shape: tuple, radius: int, density: float, seed: int):
    mask = np.random.default_rng(seed).random(shape) < density
    disk = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius + 0.3
    assert np.array_equal(_dilate(mask, radius), ndimage.binary_dilation(mask, disk))
    assert np.array_equal(_erode(mask, radius), ndimage.binary_erosion(mask, disk))


# ---------------------------------------------------------------- pen marks

INK = {
    "blue": (40, 60, 170),
    "dark blue": (25, 30, 95),
    "green": (40, 130, 80),
    "fresh green": (60, 170, 90),
    "cyan": (30, 130, 150),
    "red": (210, 30, 45),
    "black": (30, 30, 34),
}
STAIN = {
    "haematoxylin": (75, 50, 125),
    "dense haematoxylin": (60, 35, 95),
    "bluish haematoxylin": (85, 88, 160),
    "counterstain": (150, 160, 195),
    "eosin": (225, 130, 175),
    "strong eosin": (215, 60, 120),
    "pale": (238, 215, 230),
    "blood": (185, 70, 85),
    "DAB": (130, 85, 45),
    "dense DAB": (75, 42, 22),
    "fold": (95, 30, 80),
}


def stroke(picture: np.ndarray, ink: str, rows: slice = slice(40, 60)) -> np.ndarray:
    """The picture with a stroke of ink across it, pale at its rims; ink filters the light that tissue lets through."""
    cover = np.zeros(picture.shape[:2])
    cover[rows] = 1.0
    cover = ndimage.gaussian_filter(cover, 1.0)[..., None]
    below = picture / 245.0
    return np.clip(picture * (1 - cover) + np.array(INK[ink]) * below * cover, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("ink", INK)
def test_a_stroke_on_glass_is_no_tissue(ink: str):
    glass = np.full((200, 240, 3), 245, dtype=np.uint8)
    assert not tissue_mask(stroke(glass, ink), RECIPE, TILE_AREA)[0].any()
    # and is, black apart, without the rule
    plain = tissue_mask(stroke(glass, ink), replace(RECIPE, exclude_pen=False), TILE_AREA)[0]
    assert plain[45:55].all() == (ink != "black")


@pytest.mark.parametrize("ink", INK)
def test_a_stroke_over_tissue_takes_itself_and_little_more(ink: str):
    picture = np.full((200, 240, 3), 245, dtype=np.uint8)
    picture[10:190, 20:220] = (225, 130, 175)
    mask, _ = tissue_mask(stroke(picture, ink), RECIPE, TILE_AREA)
    assert not mask[44:56].any()
    assert mask[12:34, 22:218].all()
    assert mask[66:188, 22:218].all()


@pytest.mark.parametrize("stain", STAIN)
def test_no_stain_is_taken_for_ink(rng: np.random.Generator, stain: str):
    picture = np.full((160, 200, 3), 245, dtype=np.uint8)
    noise = rng.integers(-6, 7, (120, 140, 3))
    picture[20:140, 30:170] = np.clip(np.array(STAIN[stain]) + noise, 0, 255)
    mask, _ = tissue_mask(picture, RECIPE, TILE_AREA)
    assert np.array_equal(mask, tissue_mask(picture, replace(RECIPE, exclude_pen=False), TILE_AREA)[0])
    assert mask[24:136, 34:166].all()


def test_a_fold_and_a_few_inky_nuclei_stay():
    picture = np.full((160, 200, 3), 245, dtype=np.uint8)
    picture[20:140, 30:170] = STAIN["eosin"]
    picture[20:140, 90:100] = STAIN["fold"]
    picture[60:66, 40:46] = INK["blue"]  # 36 px: less than a quarter of a tile
    picture[80:82, 30:170] = INK["green"]  # long, but thinner than any stroke
    assert tissue_mask(picture, RECIPE, TILE_AREA)[0][24:136, 34:166].all()


def test_ink_is_no_hole_to_be_filled():
    picture = np.full((200, 240, 3), STAIN["eosin"], dtype=np.uint8)
    picture[80:120, 80:120] = INK["blue"]
    mask, _ = tissue_mask(picture, replace(RECIPE, min_hole_tiles=100), TILE_AREA)
    assert not mask[80:120, 80:120].any()


@pytest.mark.parametrize("margin", [0, 3, 9])
def test_the_margin_goes_with_the_mark(margin: int):
    picture = np.full((200, 240, 3), STAIN["eosin"], dtype=np.uint8)
    picture[80:120] = INK["green"]
    mask, _ = tissue_mask(picture, replace(RECIPE, pen_margin_px=margin), TILE_AREA)
    assert np.flatnonzero(~mask[:, 100]).tolist() == list(range(80 - margin, 120 + margin))


def test_a_picture_of_nothing_but_ink_has_no_tissue():
    mask, _ = tissue_mask(np.full((60, 80, 3), INK["blue"], dtype=np.uint8), RECIPE, TILE_AREA)
    assert not mask.any()


def test_ink_does_not_move_the_threshold_of_the_tissue():
    picture = np.full((200, 240, 3), 245, dtype=np.uint8)
    picture[100:190, 20:220] = STAIN["pale"]
    _, clean = tissue_mask(picture, replace(RECIPE, threshold_high=255), TILE_AREA)
    _, inked = tissue_mask(stroke(picture, "blue"), replace(RECIPE, threshold_high=255), TILE_AREA)
    assert inked == pytest.approx(clean, abs=6)


def test_excluding_pen_changes_no_mask_of_glas(data_folder: Path):
    files = sorted((data_folder / "glas").glob("*.tif"))
    assert len(files) == 106
    for file in files[::10]:
        with Slide(file) as slide:
            picture, _ = slide.read_thumbnail(1.5)
        with_rule, _ = tissue_mask(picture, RECIPE, 149.0**2)
        without, _ = tissue_mask(picture, replace(RECIPE, exclude_pen=False), 149.0**2)
        assert np.array_equal(with_rule, without)


def test_real_immunostain_is_no_ink():
    from skimage.data import immunohistochemistry

    picture = immunohistochemistry()
    colours = find_colours(picture, RECIPE.pen)
    assert colours.pen.mean() < 0.001
    assert colours.black.mean() < 0.001


def _section(glass: tuple[int, int, int], noise: float = 1.0) -> np.ndarray:
    """A third of pink, textured tissue on glass of this colour; light is what glass lets through."""
    rng = np.random.default_rng(0)
    stain = np.ones((120, 150, 3))
    stain[20:100, 30:85] = np.array([0.85, 0.6, 0.75]) + rng.normal(0, 0.05, (80, 55, 1))
    return np.clip(stain * np.array(glass) + rng.normal(0, noise, stain.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("method", ["default", "saturation"])
@pytest.mark.parametrize("glass", [(243, 242, 226), (240, 240, 205), (225, 235, 245), (245, 228, 240)])
def test_tinted_glass_is_no_tissue(glass, method):
    expected, _ = tissue_mask(_section((243, 243, 243)), TissueRecipe(method=method), TILE_AREA)
    mask, _ = tissue_mask(_section(glass), TissueRecipe(method=method), TILE_AREA)
    assert 0.2 < expected.mean() < 0.3
    assert (mask != expected).mean() < 0.01


@given(st.tuples(*[st.integers(232, 241)] * 3), st.floats(0, 3))
@settings(max_examples=20, deadline=None)
def test_glass_without_a_tint_is_taken_as_it_is(glass, noise):
    picture = _section(glass, noise)
    assert tissue._on_white_glass(picture, RECIPE) is picture


@pytest.mark.parametrize("deviation", [6.0, 12.0])
def test_a_field_of_pale_tissue_has_no_glass(deviation):
    rng = np.random.default_rng(0)
    pale = np.array([240, 205, 225]) + rng.normal(0, deviation, (150, 150, 1)) + rng.normal(0, 2, (150, 150, 3))
    mask, _ = tissue_mask(np.clip(pale, 0, 255).astype(np.uint8), RECIPE, TILE_AREA)
    assert mask.all()


@pytest.mark.data
def test_fields_of_real_tissue_have_no_glass(data_folder):
    for path in sorted((data_folder / "glas").rglob("*.tif"))[:40]:
        with Image.open(path) as image:
            picture = np.asarray(image.convert("RGB").reduce(2))
        assert tissue._on_white_glass(picture, RECIPE) is picture, path
