"""Tissue: exact fractions, and pictures whose answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.store import TissueRecipe
from extract.tissue import tissue_fraction, tissue_mask
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
