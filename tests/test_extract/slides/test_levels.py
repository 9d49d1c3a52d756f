"""A level is read in place of level 0 only if it shows the same places."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.slides.levels import Size, trusted_levels
from extract.slides.opening import open_slide
from tests.test_extract.slides.dicom_files import write_level
from tests.test_extract.small import tissue_image


def never(*_: object) -> np.ndarray:
    raise AssertionError("sizes that leave no doubt need no pixels")


@given(
    size=st.tuples(st.integers(2000, 200_000), st.integers(2000, 200_000)),
    factor=st.sampled_from([2, 4, 8, 16, 32]),
    rounding=st.sampled_from([math.floor, math.ceil, round]),
)
def test_levels_of_whole_downsamples_are_trusted_however_they_were_rounded(size: Size, factor: int, rounding: object):
    small = tuple(rounding(side / factor) for side in size)  # type: ignore[operator]
    downsample = (size[0] / small[0] + size[1] / small[1]) / 2
    assert trusted_levels([size, small], [1.0, downsample], never) == ((0, 1), "")


@given(
    size=st.tuples(st.integers(2000, 100_000), st.integers(2000, 100_000)),
    pad=st.tuples(st.integers(0, 500), st.integers(0, 500)),
)
def test_a_level_padded_out_of_proportion_is_not_used(size: Size, pad: tuple[int, int]):
    small = (size[0] // 2 + pad[0], size[1] // 2 + pad[1])
    ratios = size[0] / small[0], size[1] / small[1]
    # out of proportion by more than rounding does, of a pixel on each side
    if abs(size[1] / ratios[0] - small[1]) < 1.1 * (1 + small[1] / small[0]) + 0.1:
        return
    kept, note = trusted_levels([size, small], [1.0, sum(ratios) / 2], never)
    assert kept == (0,)
    assert "level 1" in note
    assert "level 0 is read" in note


def reader(levels: list[np.ndarray], downsamples: list[float]):
    """Reads regions of pictures as a slide reads its levels."""

    def read(x_l0: int, y_l0: int, level: int, size: Size) -> np.ndarray:
        x, y = (round(at / downsamples[level]) for at in (x_l0, y_l0))
        region = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
        part = levels[level][y : y + size[1], x : x + size[0]]
        region[: part.shape[0], : part.shape[1]] = part
        return region

    return read


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 50), factor=st.sampled_from([2, 4]), pad=st.sampled_from([0, 60, 128]))
def test_where_sizes_fit_by_chance_pixels_decide(seed: int, factor: int, pad: int):
    side = 1024
    full = tissue_image(side, side, seed=seed, margin=20)
    small = full.reshape(side // factor, factor, side // factor, factor, 3).mean(axis=(1, 3)).astype(np.uint8)
    padded = np.pad(small, ((0, pad), (0, pad), (0, 0)), constant_values=255)
    sizes = [(side, side), padded.shape[1::-1]]
    downsamples = [1.0, side / padded.shape[1]]
    kept, _ = trusted_levels(sizes, downsamples, reader([full, padded], downsamples))
    assert kept == ((0, 1) if pad == 0 else (0,))


def test_flat_levels_of_odd_ratio_are_trusted_since_nothing_speaks_against_them():
    levels = [np.full((1000, 1000, 3), 240, np.uint8), np.full((400, 400, 3), 240, np.uint8)]
    assert trusted_levels([(1000, 1000), (400, 400)], [1.0, 2.5], reader(levels, [1.0, 2.5]))[0] == (0, 1)


@pytest.mark.parametrize("pad", [0, 64])
def test_a_padded_level_of_a_series_is_not_read(tmp_path: Path, pad: int):
    full = tissue_image(1024, 768, margin=30)
    half = full.reshape(384, 2, 512, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
    write_level(tmp_path / "s" / "a.dcm", full, 0.25, series="1.2.3", number=1)
    padded = np.pad(half, ((0, pad), (0, pad), (0, 0)), constant_values=255)
    write_level(tmp_path / "s" / "b.dcm", padded, 0.5, series="1.2.3", number=2)
    with open_slide(tmp_path / "s" / "a.dcm") as slide:
        assert slide.level_sizes == ((1024, 768), (512, 384))[: 1 if pad else 2]
        assert ("level 1 of 576 x 448 px" in slide.reader_note) == (pad > 0)
